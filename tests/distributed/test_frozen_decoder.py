"""Invariant 6: a frozen decoder stays bit-identical, costs no optimizer state, and the injection trains all the same."""

import pytest
import torch
import yaml
from launch import CONFIGS, TINY, train
from safetensors.torch import load_file
from small_models import make_vae

from dsvae.config import DataConfig
from dsvae.data.corpora import load_corpus
from dsvae.data.tokenization import train_tokenizer


@pytest.mark.parametrize("injection", ["memory", "embedding", "both"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_phase_1_with_a_frozen_decoder(stage, injection, cache_dir, tmp_path):
    texts = load_corpus(DataConfig(builtin_size=300), 0).splits["train"]["text"]
    tokenizer = train_tokenizer(texts, 60)
    model = make_vae("t5 v1.1", injection=injection)
    # Weights that bfloat16 cannot hold: a copy that went through the engine's cast would show.
    assert any((w != w.bfloat16().float()).any() for w in model.parameters())
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = {
        **TINY,
        "data": {**TINY["data"], "cache_dir": str(cache_dir)},
        "model": {"name": str(tmp_path / "start"), "latent_dim": 6, "memory_slots": 2, "injection": injection},
        "phase1": {"steps": 3, "lr": 1e-3, "freeze_decoder": True},
        "phase": "1",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    command = ("--config", tmp_path / "config.yaml", "--ds_config", CONFIGS / f"zero{stage}.json", "--output_dir", run)
    train(*command, ranks=2)

    before = load_file(tmp_path / "start" / "model.safetensors")
    after = load_file(run / "phase1" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    frozen = {n for n in before if n.startswith(("decoder.", "shared.", "lm_head."))}
    assert frozen
    for name in before:
        if name in frozen:
            assert torch.equal(before[name], after[name]), f"{name} is frozen and moved"
        else:
            assert not torch.equal(before[name], after[name]), f"{name} should train and did not move"

    trained = sum(w.numel() for name, w in before.items() if name not in frozen)
    states = sum(
        _numbers_of(torch.load(path, map_location="cpu", weights_only=False), "exp_avg")
        for path in (run / "checkpoints" / "phase1-step00000003").glob("*optim_states.pt")
    )
    assert trained <= states < 1.05 * trained + 4096  # partitions are padded to equal parts


def _numbers_of(tree, key):
    """Elements of all tensors under `key`, anywhere in a checkpoint."""
    if isinstance(tree, dict):
        return sum(v.numel() if k == key and torch.is_tensor(v) else _numbers_of(v, key) for k, v in tree.items())
    if isinstance(tree, (list, tuple)):
        return sum(_numbers_of(v, key) for v in tree)
    return 0
