"""A compiled run against the same run without compilation."""

import json
import shutil

import pytest
from launch import CONFIGS, numbers, train
from safetensors import safe_open

STEPS = 4


def names(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return sorted(file.keys())


def test_losses_are_the_same_and_checkpoints_fit(tiny, tmp_path):
    """With dropout, and widths that differ between the steps. The second half is trained
    again without compilation, from the checkpoint of the compiled run."""
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero1.json", "--precision", "fp32")
    common += ("--phase", "2", "--phase2.steps", STEPS, "--model.dropout", "0.1")
    common += ("--checkpoint_every", STEPS // 2, "--eval.iw_samples", "0")
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(*common, "--output_dir", eager)
    run = train(*common, "--output_dir", compiled, "--compile", timeout=900)
    assert "recompile_limit" not in run.stderr

    def agree():
        for found, expected in zip(numbers(compiled), numbers(eager), strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                close = value if isinstance(value, str) else pytest.approx(value, 1e-4, 1e-5)
                assert found[name] == close
        found, expected = (json.loads((d / "metrics.json").read_text()) for d in (compiled, eager))
        for name in ("rec", "kl"):
            assert found["test"][name] == pytest.approx(expected["test"][name], rel=1e-3)
        assert names(compiled / "model") == names(eager / "model")

    agree()
    shutil.rmtree(compiled / "checkpoints" / f"phase2-step{STEPS:08d}")
    (compiled / "metrics.json").unlink()
    train(*common, "--output_dir", compiled)
    agree()
