"""What a run does when something goes wrong: every fault is a real one, in real
processes."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launch import CONFIGS, numbers, rows, start, train
from safetensors.torch import load_file

from dsvae import status
from dsvae.data.grammar import generate

PATCHED = Path(__file__).with_name("patched_train.py")
LONG = ("--phase1.steps", "5000", "--checkpoint_every", "5")


def run_of(tiny, stage, directory, *more):
    """The arguments of a run."""
    config = CONFIGS / f"{stage}.json"
    return ("--config", tiny, "--ds_config", config, "--output_dir", directory, *more)


HANG_TIMEOUT = ("--hang_timeout", "30")
"""Seconds. Long, because nothing on a busy machine may be taken for a hang; the runs
that wait for it do so at the same time."""
HANGS = {  # name: (ds_config, ranks, the fault)
    "stands still 0": ("zero2", 2, "stand 0 12"),
    "stands still 1": ("zero2", 2, "stand 1 12"),
    "hangs": ("zero3", 3, "hang 1 12"),
    "device": ("zero2", 3, "device 1 12"),
    "stands still in the beginning": ("zero2", 2, "stop 1"),
}


@pytest.fixture(scope="module")
def slow(tiny, tmp_path_factory):
    """For each of two ranks a started run that goes on at the end of phase 1, with a
    rank whose disk takes much longer than the time limit."""
    finished = tmp_path_factory.mktemp("slow") / "finished"
    train(*run_of(tiny, "zero3", finished, "--phase", "1"), ranks=2)
    shutil.rmtree(finished / "phase1")  # a run that was cut before its export
    runs = []
    try:
        for rank in range(2):
            directory = finished.with_name(f"rank{rank}")
            shutil.copytree(finished, directory)
            again = run_of(tiny, "zero3", directory, "--phase", "1", *HANG_TIMEOUT)
            run = start(*again, ranks=2, script=PATCHED, FAULT=f"slow {rank}", SECONDS="60")
            runs.append((run, directory))
        yield runs
    finally:
        for run, _ in runs:
            run.kill()


@pytest.fixture(scope="module")
def hanging(slow, tiny, tmp_path_factory):
    """(run, its directory) for each of HANGS."""
    runs = {}
    try:
        for name, (stage, ranks, fault) in HANGS.items():
            directory = tmp_path_factory.mktemp("hanging")
            arguments = run_of(tiny, stage, directory, *LONG, *HANG_TIMEOUT)
            run = start(*arguments, ranks=ranks, script=PATCHED, FAULT=fault)
            runs[name] = (run, directory)
        yield runs
    finally:
        for run, _ in runs.values():
            run.kill()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_that_stands_still_is_named_by_the_others(frozen, hanging):
    """SIGSTOP: as on a node that is swapping to death, or cut off. Rank 0 too, on which
    the store of the others lives."""
    run, directory = hanging[f"stands still {frozen}"]
    other = run.processes[1 - frozen]
    _, stderr = other.communicate(timeout=400)
    assert other.returncode == 69
    assert f"dsvae: error: rank {1 - frozen}: rank {frozen}" in stderr
    assert "no longer answers" in stderr
    said = status.read(directory / "status.json")
    if frozen == 1:  # rank 0 could still write why its watchdog ended it
        assert (said.state, said.exit_code) == ("failed", 69)
        assert said.reason.startswith("rank 1 (on ")
        assert said.phase == 1
    else:
        assert said.state == "running"


def test_a_rank_that_lives_but_hangs_is_named_on_all_ranks_and_shows_where(hanging):
    run, directory = hanging["hangs"]
    assert run.wait(400) == 69
    assert run.codes == [69, 69, 69]
    for rank in range(3):
        assert f"dsvae: error: rank {rank}: rank 1 (on " in run.stderr
    assert "in observed_step" in run.stderr  # the hanging rank's stack
    assert (directory / "checkpoints" / "phase1-step00000010" / "COMPLETE").exists()
    said = status.read(directory / "status.json")
    assert (said.state, said.exit_code) == ("failed", 69)
    assert said.reason.startswith("rank 1 (on ")


def test_ranks_that_wait_on_their_devices_name_the_one_that_hangs_and_not_themselves(hanging):
    run, _ = hanging["device"]
    assert run.wait(400) == 69
    assert run.codes == [69, 69, 69]
    for rank in range(3):
        assert f"dsvae: error: rank {rank}: rank 1 (on " in run.stderr


def test_a_rank_that_stands_still_while_the_engine_is_built_is_named(hanging):
    run, _ = hanging["stands still in the beginning"]
    _, stderr = run.processes[0].communicate(timeout=400)
    assert run.processes[0].returncode == 69
    assert "dsvae: error: rank 0: rank 1 (on " in stderr
    assert "no longer answers" in stderr


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("model", "rank 1: model {model}: "),
        ("refuse", "rank 1: this rank alone does not like it"),
    ],
)
def test_a_mistake_that_only_one_rank_meets_is_printed_and_ends_all_at_once(
    fault, says, tiny, tmp_path
):
    """While the engine is built, which has no time limit. After ten minutes a rank is
    given up: `wait` is much shorter."""
    model = tmp_path / "empty"
    model.mkdir()
    patch = {"script": PATCHED, "FAULT": f"{fault} 1", "MODEL": str(model)}
    run = start(*run_of(tiny, "zero2", tmp_path / "run"), ranks=3, **patch)
    run.wait(300)
    assert run.codes == [2, 2, 2]
    lines = [line for line in run.stderr.splitlines() if line.startswith("dsvae: error:")]
    mistakes = [line for line in lines if "left with exit code 2" not in line]
    assert len(mistakes) == 1
    assert mistakes[0].startswith(f"dsvae: error: {says.format(model=model)}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_defect_on_one_rank_is_no_lost_rank(tiny, tmp_path):
    """A job that is repeated after a lost rank would meet it again."""
    patch = {"script": PATCHED, "FAULT": "error 1 6"}
    run = train(*run_of(tiny, "zero2", tmp_path, *LONG), ranks=3, code=1, timeout=300, **patch)
    assert run.codes == [1, 1, 1]
    assert run.stderr.count("RuntimeError: out of memory") == 1
    for rank in (0, 2):
        (line,) = [
            line
            for line in run.stderr.splitlines()
            if f"dsvae: error: rank {rank}: rank 1 (on " in line
        ]
        assert line.endswith("left with exit code 1; that rank's stack says why")


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero2", "zero3"])
def test_a_step_that_is_not_finite_on_one_rank_moves_no_weight_on_any(config, tiny, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    precision = ("--precision", "fp32" if config == "zero2" else "bf16")
    arguments = run_of(tiny, config, tmp_path / "run", *precision, "--phase1.steps", "6")
    patch = {"script": PATCHED, "FAULT": "non_finite 1 2", "WEIGHTS": str(weights)}
    train(*arguments, ranks=2, **patch)
    after = [path.read_text() for path in sorted(weights.iterdir())]
    moved = [a != b for a, b in zip(after, after[1:], strict=False)]
    # Steps of phase 1 (6), then of phase 2 (4); the third of each is not finite.
    # Between the phases nothing moves.
    assert moved == [True, False, True, True, True] + [True] + [True, False, True]
    logged = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in logged] == [0, 0, 1, 1, 1, 1] + [0, 0, 1, 1]
    assert [row["step"] for row in logged if row["rec"] is None] == [3, 9]
    assert [row["lr"] for row in logged[:6]] == [0.001] * 6
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values())


def test_too_many_steps_that_are_not_finite_end_the_run_with_their_batch(tiny, tmp_path):
    arguments = run_of(tiny, "zero2", tmp_path, "--max_skipped_steps", "3", *LONG)
    patch = {"script": PATCHED, "FAULT": "non_finite 1 2 4 5 6"}
    run = train(*arguments, ranks=2, code=65, **patch)
    assert run.codes == [65, 65]
    path = tmp_path / "non_finite.phase1-step00000007.jsonl"  # the third in a row; step 3 was alone
    assert f"the last batch is in {path}" in run.stderr
    batch = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["rank"] for row in batch} == {0, 1}
    assert 28 <= len(batch) <= 32  # the global batch
    assert {row["rank"] for row in batch if row["rec"] is None} == {1}
    assert all(math.isfinite(row["rec"]) for row in batch if row["rank"] == 0)
    assert {row["text"] for row in batch} <= {sentence.text for sentence in generate(600, 0)}
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 7))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, which a test can enlarge."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def free_bytes(path):
    return os.statvfs(path).f_bavail * os.statvfs(path).f_frsize


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_once_there_is_room(
    tiny, small_disk, tmp_path
):
    short = ("--phase1.steps", "20", "--checkpoint_every", "5")
    train(*run_of(tiny, "zero2", tmp_path / "uncut", *short), ranks=2)
    size = sum(
        path.stat().st_size
        for path in (tmp_path / "uncut" / "checkpoints").rglob("*")
        if path.is_file()
    )

    out = small_disk / "run"
    first, filled = out / "checkpoints" / "phase1-step00000005" / "COMPLETE", tmp_path / "filled"
    pause = {"FAULT": "pause 0", "WHEN": str(first), "UNTIL": str(filled)}
    arguments = run_of(tiny, "zero2", out, *short)
    run = start(*arguments, ranks=2, script=PATCHED, **pause)
    run.wait_for(first)
    filler = small_disk / "filler"
    # leaves room for a part of the next checkpoint, or for one export and the reports
    with filler.open("wb") as file:
        file.write(b"\0" * (free_bytes(small_disk) - size * 3 // 10))
    filled.touch()
    run.wait(300)
    assert run.codes == [74, 74]
    assert "cannot be written" in run.stderr
    assert "MiB free" in run.stderr
    kept = sorted(path.name for path in (out / "checkpoints").glob("phase*"))
    assert kept
    assert all((out / "checkpoints" / name / "COMPLETE").exists() for name in kept)

    # Configured to go on, it trains to where the next thing has to be written that it
    # cannot do without.
    continued = train(*arguments, "--on_save_error", "continue", ranks=2, code=74)
    assert "on_save_error is continue" in continued.stdout
    assert ".model.tmp'; make room" in continued.stderr
    assert not (out / "model").exists()
    assert not list(out.rglob(".model.tmp"))

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(*arguments, ranks=2)
    assert numbers(out) == numbers(tmp_path / "uncut")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_disk_is_no_hang(rank, slow):
    """Loading a checkpoint, gathering weights and writing a file of an export, each for
    twice the time limit. The last test here: meanwhile the others ran."""
    run, directory = slow[rank]
    assert run.wait(500) == 0, run.stderr[-3000:]
    assert "resuming from" in run.stdout
    assert len(list((directory / "phase1" / "model").glob("*.safetensors"))) > 1
