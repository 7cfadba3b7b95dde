"""Invariant 5: a run cut at any moment and resumed gives the losses, and the weights,
of the uncut one: bit by bit."""

import json
import signal
from pathlib import Path

import pytest
from launch import CONFIGS, numbers, rows, start, train
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsvae.data.grammar import generate

PATCHED = Path(__file__).with_name("patched_train.py")
ARGUMENTS = (
    *("--phase1.steps", "24", "--phase2.steps", "24", "--checkpoint_every", "5"),
    *("--phase1.deletion", "0.2", "--eval.batch_tokens", "64", "--phase2.lr_scale", "rms"),
    *("--phase2.latent_noise", "0.5", "--phase2.latent_dropout", "0.1"),
)
ADAPTERS = (
    *("--model.lora.rank", "2", "--phase1.freeze_decoder", "true", "--heads.align_weight", "0.5"),
)

# How a run is cut: (the checkpoint to wait for, the signal, the ranks that get it, the
# exit code that the others must have).
EVERYONE = (0, 1)
KILLED = (
    ("phase1-step00000010", signal.SIGKILL, EVERYONE),
    ("phase2-step00000005", signal.SIGKILL, EVERYONE),
)
ONE_KILLED = (
    ("phase1-step00000005", signal.SIGKILL, (1,)),
    ("phase2-step00000010", signal.SIGKILL, (0,)),
)
TOLD = (
    ("phase1-step00000005", signal.SIGTERM, EVERYONE),
    ("phase1-step00000015", signal.SIGUSR1, (1,)),
    ("phase2-step00000005", signal.SIGINT, EVERYONE),
)
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


def complete(directory, checkpoint):
    return directory / "checkpoints" / checkpoint / "COMPLETE"


def pause_after(directory, checkpoint):
    """Variables of a run that waits behind the checkpoint after this one: it does not
    come to its end before the test has cut it."""
    phase, step = checkpoint.split("-step")
    following = f"{phase}-step{int(step) + 5:08d}"
    return {"FAULT": "pause 0", "WHEN": str(complete(directory, following))}


def same_as_uncut(cut, uncut):
    """Every step once, in metrics.jsonl and TensorBoard, with the uncut run's numbers;
    its final metrics, and its weights."""
    expected = numbers(uncut)
    assert numbers(cut) == expected
    assert [row["step"] for row in expected] == list(range(1, len(expected) + 1))
    for split in ("valid", "text"):
        assert rows(cut, split) == rows(uncut, split)
    events = EventAccumulator(str(cut / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("main/rec")]
    assert found == [(row["step"], pytest.approx(row["rec"], rel=1e-6)) for row in expected]
    assert (cut / "metrics.json").read_text() == (uncut / "metrics.json").read_text()
    assert not (cut / ".evaluation").exists()
    weights, reference = (
        load_file(directory / "model" / "model.safetensors") for directory in (cut, uncut)
    )
    assert weights.keys() == reference.keys()
    assert all((weights[name] == reference[name]).all() for name in reference)


@pytest.mark.parametrize(
    ("stage", "cuts", "arguments"),
    [
        ("zero0", ONE_KILLED, ()),
        ("zero1", TOLD, ()),
        ("zero2", KILLED, ADAPTERS),
        ("zero3", KILLED, ()),
    ],
    ids=["zero0", "zero1", "zero2", "zero3"],
)
def test_cut_in_both_phases(stage, cuts, arguments, tiny, pretrained_t5, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / f"{stage}.json", *ARGUMENTS, *arguments)
    if arguments == ADAPTERS:
        common += ("--model", pretrained_t5)
    train(*common, "--output_dir", tmp_path / "uncut", ranks=2)

    for saved in (tmp_path / "uncut" / "checkpoints").glob("phase*"):
        files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
        listed = json.loads((saved / "COMPLETE").read_text())["files"]
        assert files == {"COMPLETE", *listed}

    cut = tmp_path / "cut"
    for moment, number, ranks in cuts:
        run = start(
            *common, "--output_dir", cut, ranks=2, script=PATCHED, **pause_after(cut, moment)
        )
        run.wait_for(complete(cut, moment))
        run.signal(number, ranks)
        # Also a rank that was sent nothing leaves by itself, and not because it gives up
        # after ten minutes.
        run.wait(300)
        if number == signal.SIGKILL:
            assert [code for code in run.codes if code != -signal.SIGKILL] == [69] * (
                2 - len(ranks)
            )
            if ranks != EVERYONE:
                assert f"rank {ranks[0]}" in run.stderr
        else:
            assert run.codes == [CODES[number]] * 2
            assert f"dsvae: {number.name}: saved" in run.stderr
    assert not (cut / "metrics.json").exists()
    if cuts == TOLD:
        # in the final evaluation, of which each start does four batches
        for number in range(2):
            patch = {"script": PATCHED, "FAULT": f"told {number} 4"}
            told = train(*common, "--output_dir", cut, ranks=2, code=75, **patch)
            assert told.codes == [75, 75]
            assert "dsvae: SIGTERM: saved" in told.stderr
            assert not (cut / "metrics.json").exists()
        assert len(list((cut / ".evaluation").glob("*/*"))) > 1
    last = train(*common, "--output_dir", cut, ranks=2)
    assert "resuming from" in last.stdout
    same_as_uncut(cut, tmp_path / "uncut")

    again = train(*common, "--output_dir", cut, ranks=2)  # a second run into the same folder
    assert "rec_shuffled" in again.stdout
    same_as_uncut(cut, tmp_path / "uncut")


def test_resume_from_another_directory(tiny, tmp_path):
    """In phase 2, and killed there twice: before it has a checkpoint of its own, and
    after. The sentences are a mixture."""
    lines = [f"{item.text}\n" for item in generate(600, seed=4)]
    for name, part in (("a", lines[:500]), ("b", lines[500:])):
        (tmp_path / f"{name}.txt").write_text("".join(part))
    mixture = ("--train_file", f"{tmp_path}/a.txt,{tmp_path}/b.txt", "--data.weights", "[1, 3]")
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero1.json", *ARGUMENTS, *mixture)
    uncut = train(*common, "--output_dir", tmp_path / "uncut")
    assert ", 0.75 of every step, epochs: " in uncut.stdout
    first, own = tmp_path / "first", tmp_path / "second"
    pause = {"script": PATCHED, **pause_after(first, "phase2-step00000005")}
    run = start(*common, "--output_dir", first, **pause)
    run.wait_for(complete(first, "phase2-step00000005"))
    run.kill()
    again = (*common, "--output_dir", own, "--resume", first)
    written = own / "config.yaml"  # before the first step
    run = start(*again, script=PATCHED, FAULT="pause 0", WHEN=str(written))
    run.wait_for(written)
    run.kill()
    assert not list(own.glob("checkpoints/*/COMPLETE"))
    run = start(*again, script=PATCHED, **pause_after(own, "phase2-step00000015"))
    run.wait_for(complete(own, "phase2-step00000015"))
    run.kill()
    assert not (own / "metrics.json").exists()
    assert f"resuming from {own}" in train(*again).stdout
    found = numbers(own)
    assert found[0]["step"] > 24 + 5
    assert found == [row for row in numbers(tmp_path / "uncut") if row["step"] >= found[0]["step"]]
    assert (own / "metrics.json").exists()


def test_a_damaged_checkpoint_is_named_and_passed_over(tiny, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero2.json", *ARGUMENTS)
    common += ("--output_dir", tmp_path / "run")
    pause = pause_after(tmp_path / "run", "phase1-step00000015")
    run = start(*common, script=PATCHED, **pause)
    run.wait_for(complete(tmp_path / "run", "phase1-step00000015"))
    run.kill()
    newest = max((tmp_path / "run" / "checkpoints").glob("phase1-*/COMPLETE")).parent
    file = next(newest.glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = train(*common)
    assert f"{file} does not match its checksum" in done.stdout
    assert "resuming from" in done.stdout
