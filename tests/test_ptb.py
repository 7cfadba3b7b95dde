"""tests/benchmarks/ptb.py on a tiny directory in the form of Penn Treebank: its numbers
are those of a few lines of torch."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from benchmarks import ptb
from launch import TINY, train
from torch.distributions import Normal

from dsvae import pretrained

NOUNS = ("<unk>", "N shares", "the company", "mr. <unk>", "wall street", "an analyst")
VERBS = ("said", "fell to", "bought", "did n't see")
DRAWS, REPEATS = 20, 25


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptb")
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("valid", 12), ("test", 40)):
        lines = [
            f" {rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(NOUNS)} \n" for _ in range(count)
        ]
        (path / f"ptb.{split}.txt").write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def results(directory, tmp_path_factory):
    """What the script writes, and the directory of its runs."""
    out = tmp_path_factory.mktemp("out")
    config = out / "tiny.yaml"
    phase = {"steps": 3, "lr": 1e-2}
    beta = {"kind": "target", "target": 2.0}
    phases = {"phase1": phase, "phase2": {**phase, "beta": beta}}
    evaluation = {"eval": {"shown": 1, "iw_samples": 0}}
    data = {"batch_size": 16, "max_tokens": 40, "cache_dir": str(out / "cache")}
    tree = {**TINY, **phases, **evaluation, "data": data, "precision": "fp32", "phase": "2"}
    config.write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptb, "train", lambda words: train(*words))
        words = [str(directory), "--config", str(config), "--runs", str(out / "runs")]
        ptb.main([*words, "--draws", str(DRAWS), "--output", str(out / "results.json"), "--seed=3"])
    return json.loads((out / "results.json").read_text()), out / "runs"


def log_likelihood(model, ids, latent):
    """log p(x|z) of one sentence under many z (S, Z), (S,)."""
    start = [model.config.decoder_start_token_id, *ids[:-1]]
    given = torch.tensor([start]).expand(len(latent), -1)
    logits = model(decoder_input_ids=given, latent=latent).logits.double().log_softmax(-1)
    return logits[:, range(len(ids)), ids].sum(1)


@torch.no_grad()
def test_nll_and_word_perplexity(results, directory):
    found, runs = results
    lines = [line.strip() for line in (directory / "ptb.test.txt").read_text().splitlines()]
    words = sum(len(line.split()) for line in lines)
    for name, row in found["rows"].items():
        assert (row["sentences"], row["words"]) == (len(lines), words)
        total = row["nll"] * len(lines)
        assert row["ppl_word"] == pytest.approx(math.exp(total / (words + len(lines))))
        model, tokenizer = pretrained.load(runs / name.replace(" ", "_") / "exports" / "best")
        texts = [tokenizer(line, split_special_tokens=True).input_ids for line in lines]
        assert [tokenizer.decode(ids[:-1]) for ids in texts] == lines
        if name == "language model":
            nothing = torch.zeros(1, 0)
            nats = [-log_likelihood(model, ids, nothing).item() for ids in texts]
            assert row["nll"] == pytest.approx(np.mean(nats), rel=1e-5)
            assert row["se"]["nll"] == pytest.approx(np.std(nats, ddof=1) / len(nats) ** 0.5)
            continue
        bounds = []
        for ids in texts:
            q = model.encode(torch.tensor([ids]))
            q = Normal(q.mean[0].double(), q.logvar[0].double().exp().sqrt())
            z = q.sample((DRAWS * REPEATS,))
            weights = (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(1)
            weights = weights + log_likelihood(model, ids, z.float())
            bounds.append(weights.view(REPEATS, DRAWS).logsumexp(1) - math.log(DRAWS))
        nats = -torch.stack(bounds).mean(0)  # (REPEATS,), means over the sentences
        assert abs(row["nll"] - nats.mean()) < 5 * nats.std()
        assert row["nll"] + 5 * nats.std() < row["rec"] + row["kl"]  # not the other bound


def test_both_models_are_the_best_on_validation_text(results):
    found, runs = results
    assert list(found["rows"]) == ["vae", "language model"]
    assert found["rows"]["language model"]["kl"] == 0
    for name in ("vae", "language_model"):
        config = yaml.safe_load((runs / name / "config.yaml").read_text())
        assert (config["seed"], config["model"]["injection"] == "none") == (3, name != "vae")


def test_what_does_not_fit_is_one_line(directory, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        ptb.main([str(tmp_path)])
    assert "ptb.train.txt: no such file" in capsys.readouterr().err
