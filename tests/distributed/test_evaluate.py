"""`dsvae evaluate` on two ranks of which one meets something alone: both leave, and the
lines on stderr say which and why."""

import os
import signal
from pathlib import Path

import pytest
from launch import start
from small_models import make_vae, small_tokenizer

from dsvae.data.grammar import generate
from dsvae.reports.evaluation import evaluate_directory

PATCHED = Path(__file__).with_name("patched_evaluate.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory, and test.txt beside it."""
    path = tmp_path_factory.mktemp("evaluate")
    sentences = [drawn.text for drawn in generate(40, seed=3)]
    make_vae().save_pretrained(path / "model")
    small_tokenizer(sentences).save_pretrained(path / "model")
    (path / "test.txt").write_text("\n".join(sentences) + "\n")
    return path


FAULTS = ("load", "gpu", "error", "killed")


@pytest.fixture(scope="module")
def runs(directory, tmp_path_factory):
    """A started run for each fault, all at once: what takes long is that the ranks tell
    each other."""
    started = {}
    try:
        for fault in FAULTS:
            output = tmp_path_factory.mktemp(fault)
            arguments = ("--test_file", directory / "test.txt", "--output", output)
            run = start(
                *("evaluate", directory / "model", *arguments),
                ranks=2,
                script=PATCHED,
                FAULT=fault,
            )
            started[fault] = run, output
        yield started
    finally:
        for run, _ in started.values():
            run.kill()


@pytest.mark.parametrize(
    ("fault", "codes", "lines"),
    [
        ("load", [2, 2], ["error: rank 1: model: no weights"]),
        ("gpu", [2, 2], ["error: rank 1 has LOCAL_RANK 1, but", "error: rank 0: rank 1 (on "]),
        ("error", [1, 1], ["error: rank 0: rank 1 (on "]),
        ("killed", [69, -signal.SIGKILL], ["error: rank 0: rank 1 (on "]),
    ],
)
def test_a_rank_that_fails_alone_ends_the_others(fault, codes, lines, runs):
    """Nothing here waits for the ten minutes after which a rank is given up."""
    run, output = runs[fault]
    run.wait(300)
    assert run.codes == codes, run.stderr[-3000:]
    found = [line for line in run.stderr.splitlines() if line.startswith("dsvae: error")]
    assert len(found) == len(lines), run.stderr[-3000:]
    for line in lines:
        assert any(said.startswith(f"dsvae: {line}") for said in found), found
    assert run.stderr.count("RuntimeError: out of memory") == (fault == "error")
    assert not (output / "metrics.json").exists()


@pytest.mark.parametrize("before", [{}, {"MASTER_PORT": "7", "LOCAL_RANK": "3"}])
def test_the_callers_environment_is_left_as_it_was(before, directory, tmp_path, monkeypatch):
    """Where evaluation succeeds and where it does not: what the caller starts next would
    take itself for a rank."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    arguments = {"test_file": str(directory / "test.txt"), "output": str(tmp_path / "out")}
    evaluate_directory(str(directory / "model"), **arguments)
    assert dict(os.environ) == environment
    with pytest.raises(Exception, match="nowhere"):
        evaluate_directory(str(tmp_path / "nowhere"), **arguments)
    assert dict(os.environ) == environment
