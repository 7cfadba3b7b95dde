"""Invariant 4 for what has weights to begin with: adapters, and a T5Gemma, in both
phases."""

import json
import shutil

import pytest
import torch
import yaml
from launch import CONFIGS, ROOT, TINY, rows, train
from safetensors.torch import load_file
from small_models import make_t5gemma

from dsvae import T5VAE
from dsvae.export import export_checkpoint

SPLITS = [("zero0", 1, 10**6), ("zero3", 2, 60)]
PHASE = {"lr": 1e-3, "adam_eps": 1e-4, "steps": 4, "deletion": 0.2}
LORA = {"rank": 3, "alpha": 6.0, "targets": ["k", "o", "wi"]}


def run(directory, model, ds_config, ranks, budget, cache_dir, precision="fp32", **phase1):
    """Trains both phases, and returns the output directory."""
    config = {
        **TINY,
        "data": {**TINY["data"], "cache_dir": str(cache_dir), "micro_batch_tokens": budget},
        "model": {"latent_dim": 6, "memory_slots": 2, **model},
        "phase1": PHASE | phase1,
        "phase2": PHASE | {"beta": TINY["phase2"]["beta"], "free_bits": 0.2},
        "precision": precision,
    }
    out = directory / f"{ds_config}_{precision}"
    path = directory / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    train(
        *("--config", path, "--ds_config", CONFIGS / f"{ds_config}.json", "--output_dir", out),
        ranks=ranks,
        script=ROOT / "tests/distributed/train_alone.py",
    )
    assert len(rows(out)) == 8
    return out


def same(found, expected, rel):
    # the large random weights amplify rounding in later gradients
    for name, within in (("loss", rel), ("rec", rel), ("kl", rel), ("grad_norm", 5e-3 + rel)):
        values = [[row[name] for row in rows(out)] for out in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=within), name


def test_adapters_with_a_decoder_that_is_frozen_in_phase_1(pretrained_t5, cache_dir, tmp_path):
    model = {"name": str(pretrained_t5), "injection": "both", "lora": LORA}
    found = [run(tmp_path, model, *split, cache_dir, freeze_decoder=True) for split in SPLITS]
    same(*found, 2e-5)
    before = dict(T5VAE.from_t5(str(pretrained_t5), injection="both").named_parameters())
    for out in found:
        after = load_file(out / "phase1" / "model" / "model.safetensors")
        for name, weight in after.items():
            if name.endswith("lora_b"):  # starts at zero
                assert weight.any() == name.startswith("encoder."), name
            elif not name.startswith(("posterior.", "injection.")) and "lora_a" not in name:
                assert torch.equal(weight, before[name]), name
    assert sum(name.endswith("lora_b") for name in after) == 2 * 4 + 3 * 4

    # what peft adds to the matrices of the pretrained model, and puts in place of modules
    merged, adapters = (
        export_checkpoint(
            found[-1], "latest", tmp_path / f"export{alone}", pytest.fail, adapters=alone
        )
        for alone in (False, True)
    )
    merged = load_file(merged / "model.safetensors")
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k", "o", "wi_0", "wi_1"]
    assert config["modules_to_save"] == ["injection", "posterior"]
    saved = {
        name.removeprefix("base_model.model."): weight
        for name, weight in load_file(adapters / "adapter_model.safetensors").items()
    }
    for name, weight in merged.items():
        owner = name.removesuffix(".weight")
        if name.startswith(("posterior.", "injection.")):
            assert torch.equal(saved.pop(name), weight)
            continue
        expected = before[name]
        if f"{owner}.lora_A.weight" in saved:
            a, b = (saved.pop(f"{owner}.lora_{x}.weight") for x in "AB")
            expected = expected + config["lora_alpha"] / config["r"] * (b @ a)
        torch.testing.assert_close(weight, expected)
    assert not saved


def test_a_t5gemma(pretrained_t5, cache_dir, tmp_path):
    start = make_t5gemma(tmp_path / "start")
    for file in pretrained_t5.glob("tokenizer*"):
        shutil.copy(file, start)
    model = {"name": str(start), "injection": "cross"}
    whole, sharded = (run(tmp_path, model, *split, cache_dir) for split in SPLITS)
    same(sharded, whole, 2e-5)
    rounded = run(tmp_path, model, "zero2", 2, 60, cache_dir, precision="bf16")
    same(rounded, whole, 0.05)
