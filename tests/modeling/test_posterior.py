"""The Gaussian family against torch.distributions, and pooling against loops."""

import torch
from torch.distributions import Independent, Normal, kl_divergence

from dsvae.modeling.posterior import Gaussian, Pooling


def gaussian(batch=7, dim=4):
    rng = torch.Generator().manual_seed(0)
    return Gaussian(
        torch.randn(batch, dim, generator=rng) * 2, torch.randn(batch, dim, generator=rng)
    )


def as_torch(q):
    return Normal(q.mean, torch.exp(0.5 * q.logvar))


def test_kl_is_that_of_torch():
    q = gaussian()
    expected = kl_divergence(as_torch(q), Normal(0.0, 1.0))
    torch.testing.assert_close(q.kl(), expected, atol=1e-5, rtol=1e-5)


def test_kl_near_the_prior_is_positive_and_that_of_float64():
    small = torch.logspace(-9, -1, 20_000)
    q = Gaussian(torch.zeros(1, 40_000), torch.cat([small, -small])[None])
    exact = q.logvar.double()
    expected = 0.5 * (torch.special.expm1(exact) - exact)
    assert float(q.kl().min()) >= 0
    torch.testing.assert_close(q.kl().double(), expected, atol=1e-9, rtol=1e-4)
    # By its series, where even float64 cancels.
    expected = exact.square() / 4 + exact**3 / 12 + exact**4 / 48
    tiny = exact.abs() < 1e-3
    torch.testing.assert_close(q.kl().double()[tiny], expected[tiny], atol=1e-10, rtol=1e-4)


def test_log_probabilities_are_those_of_torch():
    q, z = gaussian(), torch.randn(7, 4)
    torch.testing.assert_close(q.log_prob(z), Independent(as_torch(q), 1).log_prob(z))
    torch.testing.assert_close(q.log_prior(z), Normal(0.0, 1.0).log_prob(z).sum(-1))
    pairwise = torch.stack([Independent(as_torch(q), 1).log_prob(row) for row in z]).double()
    torch.testing.assert_close(q.pairwise_log_prob(z), pairwise, atol=1e-4, rtol=1e-5)


def test_a_sample_has_the_mean_and_the_deviation():
    q = gaussian(1, 3)
    z = Gaussian(q.mean.expand(200_000, 3), q.logvar.expand(200_000, 3)).sample(
        torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1))
    )
    torch.testing.assert_close(z.mean(0), q.mean[0], atol=0.03, rtol=0.0)
    torch.testing.assert_close(z.std(0), torch.exp(0.5 * q.logvar[0]), atol=0.03, rtol=0.01)


def test_pooling_by_hand():
    states, mask = (
        torch.randn(3, 5, 8),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]),
    )
    for b in range(3):
        own = states[b][mask[b].bool()]
        torch.testing.assert_close(Pooling("mean", 8)(states, mask)[b], own.mean(0))
        torch.testing.assert_close(Pooling("max", 8)(states, mask)[b], own.max(0).values)
        torch.testing.assert_close(Pooling("first", 8)(states, mask)[b], own[0])
        attention = Pooling("attention", 8)
        weights = (own @ attention.score.weight[0]).softmax(0)
        torch.testing.assert_close(attention(states, mask)[b], weights @ own)
