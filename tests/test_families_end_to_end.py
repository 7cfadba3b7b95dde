"""Models of every family through the commands' Python side: saved, loaded, measured, and
used; what makes no sense for a family is refused in one line."""

import json

import pytest
import torch
from launch import CONFIGS, train
from safetensors.torch import load_file

from dsvae import T5VAE
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE

SYSTEMS = {
    "spike_slab": ("--model.family", "spike_slab", "--phase2.draws", "2"),
    "categorical": (
        *("--model.family", "categorical", "--model.categories", "4"),
        *("--phase2.total_correlation", "1", "--phase2.free_bits", "0"),
        *("--phase2.beta.kind", "target", "--phase2.beta.target", "3"),
    ),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def run(request, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    config = ("--config", tiny, "--ds_config", CONFIGS / "zero2.json", "--output_dir", out)
    train(*config, *SYSTEMS[request.param], "--log_every", "1")
    return request.param, out


def test_a_run_leaves_a_model_of_its_family(run):
    family, out = run
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
    family, out = run
    if family != "categorical":
        return
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["split"] == "train" and r["phase"] == 2]
    beta = 0.0
    for row in steps:
        assert row["beta"] == pytest.approx(beta, abs=1e-9)
        beta = min(max(beta + 1e-3 * (row["kl"] - 3), 0.0), 1.0)


def test_every_use_of_the_latent_works_or_is_refused(run, tmp_path):
    family, out = run
    vae = SentenceVAE.from_pretrained(str(out / "model"))
    text = "the artist admires the knife"
    few = {"max_new_tokens": 4}
    assert len(vae.sample(3, seed=0, **few)) == 3
    assert len(vae.sample(2, texts=[text], seed=0, **few)) == 2
    assert len(vae.reconstruct([text], **few)) == 1
    uses = (
        lambda: vae.interpolate(text, text, steps=2, **few),
        lambda: vae.analogy(text, text, text, **few),
        lambda: vae.traverse(text, 1, steps=2, **few),
        lambda: vae.attribute_vector([text, text], ["a", "b"], "a"),
    )
    for use in uses:
        if family == "categorical":
            with pytest.raises(UserError, match="continuous latent, and this model's is categ"):
                use()
        else:
            use()


def test_latents_are_written_by_their_names(run, tmp_path):
    from dsvae.generation.latents_file import LatentsFile

    family, out = run
    vae = SentenceVAE.from_pretrained(str(out / "model"))
    with LatentsFile(tmp_path / "z.safetensors", {"model": "m"}) as file:
        file.add([1], vae.encode(["the artist admires the knife"]))
    names = set(load_file(tmp_path / "z.safetensors")) - {"line"}
    expected = {"spike_slab": {"mean", "logvar", "spike"}, "categorical": {"probabilities"}}
    assert names == expected[family]
