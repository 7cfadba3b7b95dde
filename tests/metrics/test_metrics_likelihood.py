"""The bounds, compared with a linear-Gaussian decoder, whose log p(x) and posterior are
known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from dsvae.metrics.likelihood import (
    effective_sample_size,
    elbo,
    importance_weighted_bound,
    log_importance_weights,
    mean,
    per_unit,
    ratio,
)
from dsvae.modeling.families import Gaussian, GaussianFamily

N, Z, X, NOISE = 200, 3, 5, 0.7
prior = GaussianFamily(Z).prior()


class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I); so p(x) = N(b, W W^T + s^2 I), and
    p(z|x) is Gaussian.

    The columns of W are orthogonal, so that the exact posterior is diagonal, as the
    model's family is.
    """

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(X, Z, generator=rng, dtype=torch.float64)).Q
        self.w = directions * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        self.b = torch.randn(X, generator=rng, dtype=torch.float64)
        z = torch.randn(N, Z, generator=rng, dtype=torch.float64)
        self.x = (
            z @ self.w.T + self.b + NOISE * torch.randn(N, X, generator=rng, dtype=torch.float64)
        )

    @property
    def log_px(self):
        covariance = self.w @ self.w.T + NOISE**2 * torch.eye(X, dtype=torch.float64)
        return MultivariateNormal(self.b, covariance).log_prob(self.x)

    def log_px_z(self, z):
        return Normal(z @ self.w.T + self.b, NOISE).log_prob(self.x).sum(-1)

    def posterior(self, shift=0.0, widen=0.0):
        """The exact posterior, or one moved by `shift` and with `widen` added to the
        log-variance."""
        variance = 1 / (1 + self.w.square().sum(0) / NOISE**2)
        centre = (self.x - self.b) @ self.w / NOISE**2 * variance
        return Gaussian(centre + shift, torch.log(variance).expand(N, Z) + widen)


@pytest.fixture(scope="module")
def truth():
    return LinearGaussian()


def draw(truth, q, k, seed=1):
    """(log p(x|z), log p(z), log q(z|x)), (k, N) each, of k samples."""
    rng = torch.Generator().manual_seed(seed)
    # Not `q.sample`: the noise must be float64 for an exact test.
    z = [
        q.mean + torch.exp(0.5 * q.logvar) * torch.randn(N, Z, generator=rng, dtype=torch.float64)
        for _ in range(k)
    ]
    return tuple(
        torch.stack([f(s) for s in z]) for f in (truth.log_px_z, prior.log_prob, q.log_prob)
    )


def test_with_the_exact_posterior_every_weight_is_log_p(truth):
    weights = log_importance_weights(*draw(truth, truth.posterior(), 4))
    torch.testing.assert_close(weights, truth.log_px.expand(4, N), atol=1e-9, rtol=0)
    torch.testing.assert_close(importance_weighted_bound(weights), truth.log_px, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        effective_sample_size(weights), torch.full((N,), 4.0, dtype=torch.float64)
    )


def test_with_the_exact_posterior_the_elbo_is_log_p(truth):
    q = truth.posterior()
    log_px_z, _, _ = draw(truth, q, 400)
    bound = elbo(log_px_z, q.kl(prior).sum(-1))
    value, error = mean(bound - truth.log_px)
    assert abs(value) < 0.02
    assert error < 0.02


def test_an_inexact_posterior_costs_its_divergence_from_the_exact_one(truth):
    exact, q = truth.posterior(), truth.posterior(shift=0.4, widen=0.6)
    gap = torch.distributions.kl_divergence(
        Normal(q.mean, torch.exp(0.5 * q.logvar)), Normal(exact.mean, torch.exp(0.5 * exact.logvar))
    ).sum(-1)
    log_px_z, _, _ = draw(truth, q, 400)
    bound = elbo(log_px_z, q.kl(prior).sum(-1))
    assert gap.mean() > 0.5
    assert float((truth.log_px - bound - gap).mean()) == pytest.approx(0, abs=0.05)


def test_the_bound_of_k_samples_rises_to_log_p(truth):
    q = truth.posterior(shift=0.4, widen=0.6)
    weights = log_importance_weights(*draw(truth, q, 2000))
    gaps = []
    for k in (1, 5, 50, 2000):
        # The mean over all disjoint sets of k samples.
        bounds = torch.stack([importance_weighted_bound(part) for part in weights.split(k)]).mean(0)
        gaps.append(float((truth.log_px - bounds).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.5
    assert abs(gaps[-1]) < 0.01


def test_wrong_formulas_are_far_off(truth):
    """A mistake in other implementations, which the test would detect."""
    q = truth.posterior()
    log_px_z, log_pz, log_qz = draw(truth, q, 50)
    log_px = truth.log_px

    def miss(log_weights):
        return abs(float((importance_weighted_bound(log_weights) - log_px).mean()))

    assert miss(log_importance_weights(log_px_z, log_pz, log_qz)) < 1e-6
    assert miss(log_px_z - log_pz + log_qz) > 1  # wrong sign of the weight
    assert miss(log_px_z + log_pz) > 1  # no proposal
    std = Gaussian(q.mean, torch.exp(0.5 * q.logvar))  # deviation where the log-variance belongs
    assert miss(log_importance_weights(*draw(truth, std, 50)[:2], log_qz)) > 1
    assert miss(log_importance_weights(log_px_z, log_pz, std.log_prob(q.mean).expand(50, N))) > 1
    correct = elbo(log_px_z, q.kl(prior).sum(-1))
    assert abs(float((correct - log_px).mean())) < 0.1
    assert abs(float((elbo(log_px_z, std.kl(prior).sum(-1)) - log_px).mean())) > 0.5
    assert abs(float((elbo(log_px_z, -q.kl(prior).sum(-1)) - log_px).mean())) > 1


def test_the_bound_of_large_weights_does_not_overflow():
    weights = torch.tensor([[-5000.0, 900.0], [-5001.0, 899.0]])
    expected = torch.tensor([-5000.0, 900.0], dtype=torch.float64) + math.log(
        (1 + math.exp(-1)) / 2
    )
    torch.testing.assert_close(importance_weighted_bound(weights), expected)


def test_effective_sample_size_by_hand():
    weights = torch.log(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    torch.testing.assert_close(
        effective_sample_size(weights), torch.tensor([2.0, 16 / 10], dtype=torch.float64)
    )


class Split:
    """Two sentences: "a b" as two tokens and EOS, "c" as one and EOS."""

    lengths = np.array([3, 2], dtype=np.int32)
    words = np.array([2, 1], dtype=np.int32)
    bytes = np.array([3, 1], dtype=np.int32)


def test_denominators_by_hand():
    values, errors = per_unit(torch.tensor([6.0, 5.0]), Split(), "_x")
    assert values == pytest.approx(
        {
            "ppl_token_x": math.exp(11 / 5),  # a, b, EOS, c, EOS
            "ppl_word_x": math.exp(11 / 5),  # a, b, end, c, end
            "bits_per_byte_x": 11 / 6 / math.log(2),  # "a b\n", "c\n"
        }
    )
    # The residuals of 11/5 a token are -0.6 and 0.6.
    assert errors["ppl_token_x"] == pytest.approx(
        math.exp(11 / 5) * math.sqrt(2 * (0.36 + 0.36)) / 5
    )


def test_standard_errors():
    assert mean(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert math.isnan(mean(torch.tensor([1.0]))[1])
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(400):
        units = rng.integers(2, 30, size=200)
        values = torch.from_numpy(3.0 * units + rng.normal(0, 5, size=200))
        rate, error = ratio(values, units)
        estimates.append(rate)
        errors.append(error)
    assert np.mean(estimates) == pytest.approx(3.0, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)
