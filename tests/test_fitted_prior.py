"""Priors that are fitted to draws of the posteriors: against closed forms, and through the
command."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import make_vae, small_tokenizer
from torch.distributions import MultivariateNormal, Normal

from dsvae.cli import main
from dsvae.data.noise import LATENT, PRIOR, generator
from dsvae.data.tokenization import hash_of
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE, fitted_prior
from dsvae.generation.fitted_prior import Draws, draw, fit, load_prior
from dsvae.generation.options import PriorKind

WORDS = ["a", "ace", "bad", "bed", "bee", "beach", "cab", "dad", "each", "had", "he", "tea", "the"]
FEW = {"max_new_tokens": 5}
FLAGS = ("--max_new_tokens", "5", "--device", "cpu")


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(sentences(100), 60)


@pytest.fixture(scope="module")
def vae(tokenizer):
    return SentenceVAE(make_vae(latent_dim=3), tokenizer)


@pytest.fixture
def short(monkeypatch):
    """A flow that trains for a second."""
    for name, value in {"STEPS": 100, "BATCH": 128, "RATE": 5e-3, "CHECK_EVERY": 20}.items():
        monkeypatch.setattr(fitted_prior, name, value)


def modes(count, seed):
    """Draws of two narrow Gaussians and the log-density of them, in 2 dimensions."""
    rng = torch.Generator().manual_seed(seed)
    side = (torch.rand(count, 1, generator=rng) < 0.3).float() * 4 - 2
    z = torch.randn(count, 2, generator=rng) * torch.tensor([0.3, 0.5])
    z = torch.cat([z[:, :1] + side, z[:, 1:] + side / 2], dim=1)
    scale = torch.tensor([0.3, 0.5])
    parts = [
        Normal(torch.tensor([m, m / 2]), scale).log_prob(z).sum(1) + torch.tensor(w).log()
        for m, w in ((2.0, 0.3), (-2.0, 0.7))
    ]
    return z, torch.stack(parts).logsumexp(0)


def test_the_gaussian_is_the_mean_and_the_covariance():
    mixing = torch.eye(4) + 0.5 * torch.diag(torch.ones(3), 1)  # far from singular
    z = torch.randn(500, 4) @ mixing + torch.arange(4.0)
    density = fit(Draws(z, z, z), "gaussian")
    exact = z.double()
    expected = MultivariateNormal(exact.mean(0), (exact.T).cov(correction=0))
    torch.testing.assert_close(density.log_prob(z), expected.log_prob(exact), atol=1e-3, rtol=1e-4)


def test_a_fit_finds_a_mixture_that_the_standard_normal_does_not(short):
    (train, _), (valid, _), (held_out, true) = (modes(n, n) for n in (3000, 500, 1000))
    draws = Draws(train, valid, held_out)
    nats = {
        kind: float(fit(draws, kind).log_prob(held_out).double().mean())
        for kind in get_args(PriorKind)
    }
    best = float(true.double().mean())
    standard = float(Normal(0.0, 1.0).log_prob(held_out).sum(1).mean())
    assert standard < nats["gaussian"] < nats["flow"] < best + 0.05
    assert nats["gmm"] == pytest.approx(best, abs=0.02)
    assert len(fit(draws, "gmm", components=7).weights) == 7
    assert nats["flow"] - nats["gaussian"] > 0.5 * (best - nats["gaussian"])


def test_a_flow_of_few_draws_is_no_worse_than_the_gaussian_it_begins_as(short):
    rng = torch.Generator().manual_seed(0)
    train, valid = (torch.randn(n, 6, generator=rng) for n in (30, 200))
    draws = Draws(train, valid, valid)
    first, again, gaussian = (
        float(fit(draws, kind).log_prob(valid).mean()) for kind in ("flow", "flow", "gaussian")
    )
    assert first >= gaussian - 1e-4
    assert first == again  # whatever torch drew between


def test_draws_are_keyed_by_content_and_copies_stay_together(vae):
    texts = sentences(120) * 2
    found = draw(vae, texts, seed=4)
    other = draw(vae, [*reversed(texts), " "], seed=4)
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    expected = {0: [], 1: [], 2: []}
    posterior = vae.encode(texts)
    for i, text in enumerate(texts):
        key = hash_of(vae.tokenizer(text).input_ids)
        noise = generator(4, LATENT, texts[:i].count(text), key).standard_normal(3, np.float32)
        z = posterior.mean[i] + posterior.logvar[i].mul(0.5).exp() * torch.from_numpy(noise)
        expected[{0: 0, 1: 1}.get(key % 10, 2)].append(z)
    for part, wanted in ((found.held_out, 0), (found.valid, 1), (found.train, 2)):
        rows = torch.stack(expected[wanted])
        assert len(part) == len(rows)
        apart = (part[:, None] - rows).abs().amax(2)
        assert float(torch.cat([apart.amin(0), apart.amin(1)]).max()) < 1e-4


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n".join(sentences(200)) + "\n")
    return path


def save(directory, tokenizer, **latent):
    make_vae(**latent).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def run(capsys):
    def call(*words, code=0):
        assert main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return call


@pytest.mark.parametrize("kind", get_args(PriorKind))
def test_the_command_fits_and_samples(run, vae, tokenizer, file, tmp_path, kind, short):
    model_dir = save(tmp_path / "model", tokenizer, latent_dim=3)
    before = run("sample", model_dir, "-n", 6, "--seed", 1, *FLAGS)
    assert "has no fitted prior: make one with dsvae fit_prior" in run(
        "sample", model_dir, "--source", "fitted", code=2
    )
    row = json.loads(
        run("fit_prior", model_dir, "--train_file", file, "--kind", kind, "--json", *FLAGS[2:])
    )
    draws = draw(vae, sentences(200))
    own = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(draws.held_out)
    density = load_prior(model_dir)
    fitted = density.log_prob(draws.held_out).double()
    assert row["kind"] == kind
    assert (row["sentences"], row["held_out"]) == (200, len(own))
    assert row["log_p_prior"] == pytest.approx(float(own.mean()), rel=1e-4)
    assert row["log_p_fitted"] == pytest.approx(float(fitted.mean()), rel=1e-4)
    assert row["gain"] == pytest.approx(float((fitted - own).mean()), rel=1e-3, abs=1e-4)
    # The model itself is as before, and the samples are those of the density.
    assert run("sample", model_dir, "-n", 6, "--seed", 1, *FLAGS) == before
    printed = run("sample", model_dir, "--source", "fitted", "-n", 6, "--seed", 1, "--json", *FLAGS)
    width = density.noise_width
    noise = [generator(1, PRIOR, 0, i).standard_normal(width, dtype=np.float32) for i in range(6)]
    z = density.sample(torch.from_numpy(np.stack(noise)))
    loaded = SentenceVAE.from_pretrained(model_dir, device="cpu", batch_size=4)
    texts = loaded.decode(z, **FEW)
    assert [json.loads(line)["sentence"] for line in printed.splitlines()] == texts
    assert loaded.sample(6, prior=density, seed=1, **FEW) == texts
    assert "gain" in run("fit_prior", model_dir, "--train_file", file, *FLAGS[2:])


def test_a_fixed_prior_of_a_conditional_model_is_fitted_for_all_conditions(
    run, tokenizer, tmp_path
):
    model_dir = save(tmp_path / "model", tokenizer, latent_dim=3, conditional=True)
    pairs = zip(sentences(200), sentences(200, 1), strict=True)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": x, "condition": c}) + "\n" for x, c in pairs))
    words = ("--train_file", path, "--condition_column", "condition", "--kind", "gaussian")
    run("fit_prior", model_dir, *words, *FLAGS[2:])
    condition = ("--condition", "a bad bed", "--source", "fitted", "-n", 3, "--seed", 0)
    found = run("sample", model_dir, *condition, "--json", *FLAGS)
    vae = SentenceVAE.from_pretrained(model_dir, device="cpu")
    prior = load_prior(model_dir)
    texts = vae.sample(3, condition="a bad bed", prior=prior, seed=0, **FEW)
    assert [json.loads(line)["sentence"] for line in found.splitlines()] == texts


def test_any_continuous_family_is_compared_with_its_own_prior(tokenizer):
    vae = SentenceVAE(make_vae(family="spike_slab", latent_dim=3), tokenizer)
    draws = draw(vae, sentences(200))
    found = fitted_prior.compare(vae, fit(draws, "gaussian"), draws.held_out)
    g, spike, slab = 4 / 5, Normal(0.0, 0.05), Normal(0.0, 1.0)
    z = draws.held_out.double()
    density = g * spike.log_prob(z).exp() + (1 - g) * slab.log_prob(z).exp()
    assert found["log_p_prior"] == pytest.approx(float(density.log().sum(1).mean()), rel=1e-4)


def test_what_has_no_such_prior_is_told_in_one_line(run, tokenizer, file, tmp_path):
    def refused(*words, **latent):
        model_dir = save(tmp_path / "m", tokenizer, **{"latent_dim": 3, **latent})
        message = run("fit_prior", model_dir, *words, *FLAGS[2:], code=2)
        assert message.count("\n") == 1
        assert not (tmp_path / "m" / fitted_prior.NAME).exists()
        return message

    words = ("--train_file", file)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"text": "a bed", "condition": "tea"}\n' * 9)
    both = ("--train_file", pairs, "--condition_column", "condition")
    assert "is learned" in refused(*both, conditional=True, prior="learned")
    assert "no latent" in refused(*both, conditional=True, injection="none")
    assert "continuous" in refused(*words, family="categorical", categories=4)
    few = tmp_path / "few.txt"
    few.write_text("a bed\nthe bee\n")
    assert "2 sentences are too few" in refused("--train_file", few)
    assert "0 components" in refused(*words, "--components", 0)
    assert "at least 2 dimensions" in refused(*words, "--kind", "flow", latent_dim=1)
    assert "--components is for --kind gmm" in refused(*words, "--kind", "flow", "--components", 3)
    missing = run("fit_prior", tmp_path / "none", *words, code=2)
    assert "no such directory" in missing


def test_a_prior_of_another_model_or_a_damaged_one_is_told(run, tokenizer, vae, file, tmp_path):
    model_dir = save(tmp_path / "model", tokenizer, latent_dim=3)
    run("fit_prior", model_dir, "--train_file", file, "--kind", "gaussian", *FLAGS[2:])
    wide = SentenceVAE(make_vae(latent_dim=4), tokenizer)
    with pytest.raises(UserError, match="a z of 3 numbers, and the model's has 4"):
        wide.sample(1, prior=load_prior(model_dir))
    learned = SentenceVAE(make_vae(latent_dim=3, conditional=True, prior="learned"), tokenizer)
    with pytest.raises(UserError, match="is learned"):
        learned.sample(1, condition="tea", prior=load_prior(model_dir))
    with pytest.raises(UserError, match="texts or from a prior"):
        vae.sample(1, texts=["a bed"], prior=load_prior(model_dir))
    path = tmp_path / "model" / fitted_prior.NAME
    assert set(load_file(path)) == {"weights", "means", "factors"}
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in run("sample", model_dir, "--source", "fitted", code=2)
