"""Models of every family through the commands' Python side: saved, loaded, measured, and
used; what makes no sense for a family is refused in one line."""

import json
import shutil

import pytest
import torch
from launch import CONFIGS, numbers, train

from dsvae import T5VAE
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE
from dsvae.reports import sentences
from dsvae.reports.evaluation import evaluate_directory

SYSTEMS = {
    "spike_slab": ("--model.family", "spike_slab", "--phase2.draws", "2"),
    "categorical": (
        *("--model.family", "categorical", "--model.categories", "4"),
        *("--phase2.total_correlation", "1"),
    ),
}
TARGETS = {"spike_slab": 3.0, "categorical": 0.05}
"""Nats per sentence, below what the KL is: beta must move."""
GAIN = 0.05
COMMON = (
    *("--phase2.free_bits", "0", "--checkpoint_every", "2", "--keep_checkpoints", "9"),
    *("--phase2.beta.kind", "target", "--phase2.beta.gain", GAIN),
)


@pytest.fixture(scope="module", params=SYSTEMS)
def run(request, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    config = ("--config", tiny, "--ds_config", CONFIGS / "zero2.json", "--log_every", "1")
    target = ("--phase2.beta.target", TARGETS[request.param])
    arguments = (*config, *SYSTEMS[request.param], *COMMON, *target, "--output_dir", out)
    train(*arguments)
    return request.param, out, arguments


def test_a_run_leaves_a_model_of_its_family(run):
    family, out, _ = run
    metrics = json.loads((out / "metrics.json").read_text())["test"]
    assert len(metrics["kl_per_dim"]) == 6
    # The KL of spike and slab counts the selectors, too.
    assert (metrics["marginal_kl"] is None) == (family == "spike_slab")
    assert metrics["nll_iw"] < -metrics["elbo"] + 3 * metrics["se"]["elbo"]
    model = T5VAE.from_pretrained(out / "model")
    assert model.config.family == family
    q = model.encode(torch.tensor([[3, 4, 5, 1]]))
    assert q.point.shape == (1, model.family.latent_width)
    if family == "categorical":
        assert q.point.view(6, 4).sum(-1).tolist() == [1] * 6


def test_the_target_moves_beta_as_its_formula_says(run):
    family, out, _ = run
    beta = 0.0
    steps = [row for row in numbers(out) if row["phase"] == 2]
    for row in steps:
        assert row["beta"] == pytest.approx(beta, abs=1e-9)
        error = min(row["kl"] - TARGETS[family], 8.0)
        beta = min(max(beta + GAIN * error, 0.0), 1.0)
    # It differs at the step from which the next test goes on, too.
    assert steps[2]["beta"] > steps[1]["beta"] > steps[0]["beta"]


def test_a_controlled_run_that_goes_on_repeats_the_uncut_one(run):
    """From the checkpoint in the middle of phase 2, with the beta that it holds."""
    _, out, arguments = run
    uncut = numbers(out)
    cut = out.with_name("cut")
    shutil.copytree(out, cut)
    (cut / "metrics.json").unlink()
    for name in ("model", "checkpoints/phase2-step00000004"):
        shutil.rmtree(cut / name)
    train(*arguments[:-1], cut)
    assert numbers(cut) == uncut
    assert json.loads((cut / "metrics.json").read_text()) == json.loads(
        (out / "metrics.json").read_text()
    )


def test_every_use_of_the_latent_works_or_is_refused(run):
    family, out, _ = run
    vae = SentenceVAE.from_pretrained(str(out / "model"))
    text = "the artist admires the knife"
    few = {"max_new_tokens": 4}
    assert len(vae.sample(3, seed=0, **few)) == 3
    assert len(vae.sample(2, texts=[text], seed=0, **few)) == 2
    assert len(vae.reconstruct([text], **few)) == 1
    uses = (
        lambda: vae.interpolate(text, text, steps=2, **few),
        lambda: vae.analogy(text, text, text, **few),
        lambda: vae.attribute_vector([text, text], ["a", "b"], "a"),
    )
    for use in uses:
        if family == "categorical":
            with pytest.raises(UserError, match="continuous latent, and this model's is categ"):
                use()
        else:
            use()
    places = 4 if family == "categorical" else 7
    assert len(vae.traverse(text, 1, **few)) == places


def test_units_are_scored_against_the_factors(run, monkeypatch):
    monkeypatch.setattr(sentences, "BUILTIN_SENTENCES", 1_000)
    family, out, _ = run
    found = evaluate_directory(str(out / "model"), output=str(out / "evaluation"), iw_samples=2)
    assert (found["disentanglement"] is None) == (found["au"] == 0)
    if scores := found["disentanglement"]:
        assert len(scores["dimensions"]) == len(scores["information"]) == found["au"]
