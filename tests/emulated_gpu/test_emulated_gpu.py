"""The real command on an emulated GPU: whatever CUDA would refuse fails here."""

import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from launch import CONFIGS, environment, numbers, rows, start, train
from safetensors.torch import load_file

HERE = Path(__file__).parent
SCRIPT = HERE / "train.py"


@pytest.fixture(scope="module", autouse=True)
def built():
    """The extension, built in another process: what is loaded stays in a process."""
    if reason := emulated.missing():
        pytest.skip(reason)
    subprocess.run([sys.executable, emulated.__file__], check=True, timeout=580)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory, built):
    """Two ranks at ZeRO 3 in float32, on the device and on the CPU."""
    directory = tmp_path_factory.mktemp("trained")
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero3.json", "--precision", "fp32")
    common += ("--checkpoint_every", "2", "--keep_checkpoints", "9")
    train(*common, "--output_dir", directory / "emulated", ranks=2, script=SCRIPT)
    train(*common, "--output_dir", directory / "cpu", ranks=2)
    return directory, common


def test_two_ranks_at_zero3(trained):
    directory, _ = trained
    same(directory / "emulated", directory / "cpu")


def test_one_rank_at_zero0(tiny, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero0.json", "--precision", "fp32")
    train(*common, "--output_dir", tmp_path / "emulated", script=SCRIPT)
    train(*common, "--output_dir", tmp_path / "cpu")
    same(tmp_path / "emulated", tmp_path / "cpu")


@pytest.mark.parametrize(("name", "ranks"), [("zero0", 2), ("zero2", 1)])
def test_bf16(name, ranks, tiny, tmp_path):
    common = ("--config", tiny, "--ds_config", CONFIGS / f"{name}.json", "--precision", "bf16")
    train(*common, "--output_dir", tmp_path / "emulated", ranks=ranks, script=SCRIPT)
    losses = [row["loss"] for row in rows(tmp_path / "emulated")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_killed_and_resumed(trained, tmp_path):
    directory, common = trained
    cut = (*common, "--output_dir", tmp_path / "cut")
    run = start(*cut, ranks=2, script=SCRIPT)
    run.wait_for(tmp_path / "cut" / "checkpoints" / "phase1-step00000002" / "COMPLETE")
    run.kill()
    train(*cut, ranks=2, script=SCRIPT)
    assert numbers(tmp_path / "cut") == numbers(directory / "emulated")
    same(tmp_path / "cut", directory / "emulated")


def test_in_a_process_with_the_device(trained):
    """The tests of on_device.py."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "on_device.py"],
        env=environment(MODEL=str(trained[0] / "emulated" / "model")),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def same(found: Path, expected: Path) -> None:
    """Losses and exported weights are equal."""
    losses = [[row["loss"] for row in rows(directory)] for directory in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [load_file(each / "model" / "model.safetensors") for each in (found, expected)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
