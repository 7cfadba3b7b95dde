"""Invariant 5: a run killed at any moment and resumed gives the losses, and the weights, of the uncut one: bit by bit."""

import pytest
from launch import CONFIGS, numbers, rows, start, train
from safetensors.torch import load_file

ARGUMENTS = ("--phase1.steps", "24", "--phase2.steps", "24", "--checkpoint_every", "5", "--phase1.deletion", "0.2")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_killed_in_both_phases(stage, tiny, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / f"{stage}.json", *ARGUMENTS)
    train(*common, "--output_dir", tmp_path / "uncut", ranks=2)

    cut = tmp_path / "cut"
    for moment in ("phase1-step00000010", "phase2-step00000005"):
        run = start(*common, "--output_dir", cut, ranks=2)
        run.wait_for(cut / "checkpoints" / moment / "COMPLETE")
        run.kill()
    assert not (cut / "metrics.json").exists()
    last = train(*common, "--output_dir", cut, ranks=2)
    assert "going on from" in last.stdout

    assert [row["step"] for row in rows(cut)] == list(range(1, 49))  # none twice, none missing
    assert numbers(cut) == numbers(tmp_path / "uncut")
    expected, found = (load_file(d / "model" / "model.safetensors") for d in (tmp_path / "uncut", cut))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)

    again = train(*common, "--output_dir", cut, ranks=2)  # a second run into the same folder
    assert "rec_shuffled" in again.stdout
    assert numbers(cut) == numbers(tmp_path / "uncut")


def test_resume_from_another_directory(tiny, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero1.json", *ARGUMENTS)
    train(*common, "--output_dir", tmp_path / "uncut")
    run = start(*common, "--output_dir", tmp_path / "first")
    run.wait_for(tmp_path / "first" / "checkpoints" / "phase1-step00000015" / "COMPLETE")
    run.kill()
    train(*common, "--output_dir", tmp_path / "second", "--resume", tmp_path / "first")
    found = numbers(tmp_path / "second")
    assert found
    assert found == [row for row in numbers(tmp_path / "uncut") if row["step"] >= found[0]["step"]]
    assert found[0]["step"] > 15


def test_a_damaged_checkpoint_is_named_and_passed_over(tiny, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero2.json", *ARGUMENTS, "--output_dir", tmp_path / "run")
    run = start(*common)
    run.wait_for(tmp_path / "run" / "checkpoints" / "phase1-step00000015" / "COMPLETE")
    run.kill()
    newest = sorted(d for d in (tmp_path / "run" / "checkpoints").glob("phase1-*") if (d / "COMPLETE").exists())[-1]
    file = next(newest.glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = train(*common)
    assert f"{file} does not match its checksum" in done.stdout
    assert "going on from" in done.stdout
