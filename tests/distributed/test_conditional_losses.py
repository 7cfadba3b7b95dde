"""Invariant 4 for conditional models: the same losses, whatever the split."""

import json

import pytest
import torch
import yaml
from launch import CONFIGS, ROOT, TINY, rows, train

SYSTEMS = {
    "gaussian": {},
    "categorical": {"family": "categorical", "categories": 3},
}
SPLITS = [("zero0", 1, 10**6), ("zero3", 2, 150)]
PHASE = {"lr": 1e-3, "draws": 2, "adam_eps": 1e-4, "steps": 4, "deletion": 0.2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sentences of several lengths, each with one of three conditions."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rng = torch.Generator().manual_seed(0)
    words = ["the", "a", "cat", "dog", "bird", "sees", "hears", "old", "new", "small", "big"]
    with path.open("w") as file:
        for i in range(300):
            count = 2 + int(torch.randint(6, (), generator=rng))
            drawn = torch.randint(len(words), (count,), generator=rng).tolist()
            condition = ("one", "two words", "three of them")[i % 3]
            text = " ".join(words[j] for j in drawn)
            file.write(json.dumps({"text": text, "c": condition}) + "\n")
    return path


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_losses_are_those_of_one_rank_and_one_micro_batch(system, pairs, cache_dir, tmp_path):
    """With free bits, several draws, a learned prior and a step with beta 0 in phase 2;
    micro-batches of unequal size, and ranks that have only fillers."""
    config = {
        **TINY,
        "data": {
            "train_file": str(pairs),
            "condition_column": "c",
            "batch_size": 33,
            "max_tokens": 24,
            "cache_dir": str(cache_dir),
        },
        "model": {**TINY["model"], **SYSTEMS[system]},
        "phase1": PHASE,
        "phase2": {**PHASE, "beta": TINY["phase2"]["beta"], "free_bits": 0.2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = []
    for name, ranks, budget in SPLITS:
        out = tmp_path / f"{name}_{ranks}"
        train(
            "--config",
            tmp_path / "config.yaml",
            "--ds_config",
            CONFIGS / f"{name}.json",
            "--precision",
            "fp32",
            "--output_dir",
            out,
            "--data.micro_batch_tokens",
            str(budget),
            ranks=ranks,
            script=ROOT / "tests/distributed/train_alone.py",
        )
        found.append(rows(out))
    assert len(found[0]) == 8
    for row in found[0]:
        kl = row["kl"]
        if row["beta"] == 0:  # phase 1, and the first step of phase 2
            assert row["loss"] == pytest.approx(row["rec"] + kl, rel=1e-5)
    assert sum(row["beta"] == 0 for row in found[0]) == 5
    for other in found[1:]:
        for name in ("loss", "rec", "kl", "grad_norm"):
            expected = [row[name] for row in found[0]]
            assert [row[name] for row in other] == pytest.approx(expected, rel=2e-4)
