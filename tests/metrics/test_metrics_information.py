"""Mutual information against numerical integration; KL and active units of posteriors
made by hand."""

import math
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from dsvae.metrics.information import (
    active_unit_curve,
    active_units,
    mutual_information,
    near_cap,
)
from dsvae.modeling.families import Gaussian, GaussianFamily
from dsvae.parallel.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def integrated(means, deviations):
    """I(x; z) = H(z) - H(z|x) of a mixture of N one-dimensional Gaussians, by
    quadrature."""

    def density(z):
        return float(np.mean(norm.pdf(z, means, deviations)))

    low, high = min(means) - 9 * max(deviations), max(means) + 9 * max(deviations)
    entropy = quad(
        lambda z: -density(z) * math.log(density(z)) if density(z) > 0 else 0.0,
        low,
        high,
        limit=400,
    )[0]
    return entropy - float(
        np.mean([0.5 * math.log(2 * math.pi * math.e * s**2) for s in deviations])
    )


def repeated(means, deviations, times):
    """The mixture as a set of sentences with each component `times` times, so that the
    aggregate posterior is the same."""
    mean = torch.tensor(means).repeat(times)[:, None]
    return Gaussian(mean, 2 * torch.log(torch.tensor(deviations)).repeat(times)[:, None])


@pytest.mark.parametrize(
    ("means", "deviations"),
    [([-0.5, 0.8], [1.0, 0.6]), ([-3.0, 0.0, 1.0], [0.5, 0.3, 1.0]), ([0.0, 0.0], [1.0, 1.0])],
)
def test_mutual_information_of_a_mixture(means, deviations):
    q = repeated(means, deviations, 2000)
    noise = torch.randn(len(q.mean), 1, generator=torch.Generator().manual_seed(0))
    for terms in astuple(mutual_information(q, q.sample(noise), ALONE)):
        error = float(terms.std()) / math.sqrt(len(terms))
        known = integrated(means, deviations)
        assert float(terms.mean()) == pytest.approx(known, abs=4 * error + 1e-3)


def test_sentences_that_never_overlap():
    """The lower bound reaches its cap, and the upper bound is far away."""
    q = Gaussian(torch.arange(50.0)[:, None] * 100, torch.zeros(50, 1))
    terms = mutual_information(q, q.sample(torch.randn(50, 1)), ALONE)
    torch.testing.assert_close(terms.lower, torch.full((50,), math.log(50), dtype=torch.float64))
    assert float(terms.upper.min()) > 1000
    assert near_cap(math.log(50), math.log(50))
    assert not near_cap(math.log(50) - 0.7, math.log(50))


KINDS = 400
"""Number of equally likely sentences of a language, whose posteriors never overlap:
I(x; z) = ln 400 = 5.99 nats."""


def drawn(count, seed):
    """The posteriors of `count` sentences of that language."""
    kind = torch.randint(KINDS, (count,), generator=torch.Generator().manual_seed(seed))
    return Gaussian(100.0 * kind[:, None], torch.zeros(count, 1))


def bounds(aggregate, count):
    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    terms = mutual_information(
        aggregate, Gaussian(aggregate.mean[:count], aggregate.logvar[:count]).sample(noise), ALONE
    )
    return float(terms.lower.mean()), float(terms.upper.mean())


def test_information_above_the_log_of_the_sentences_lies_between_the_bounds():
    few, more = drawn(100, seed=1), drawn(20_000, seed=2)
    lower, upper = bounds(few, 100)
    assert lower < math.log(100) + 1e-9 < math.log(KINDS) < upper
    assert near_cap(lower, math.log(100))
    both = GaussianFamily(few.mean.shape[1]).of(torch.cat([few.parameters, more.parameters]))
    lower, upper = bounds(both, 100)
    # The kinds of 100 sentences are somewhat commoner or rarer than 1/400 among 20,100.
    assert lower == pytest.approx(math.log(KINDS), abs=0.05)
    assert upper == pytest.approx(math.log(KINDS), abs=0.05)
    assert lower < upper
    assert not near_cap(lower, math.log(20_100))


@pytest.mark.parametrize(("dims", "s"), [(1, 0.5), (4, 0.4), (4, 0.05)])
def test_a_linear_gaussian_channel_lies_between_the_bounds(dims, s):
    """q(z|x) = N(x, s^2), x ~ N(0, 1 - s^2): the aggregate is the prior, so the
    information is the KL, -ln s per dimension; at s = 0.05 12 nats, and ln 2,000 is
    7.6."""
    known, count = -dims * math.log(s), 2_000
    lows, highs = [], []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        x = math.sqrt(1 - s**2) * torch.randn(count, dims, generator=rng)
        q = Gaussian(x, torch.full((count, dims), 2 * math.log(s)))
        terms = mutual_information(q, q.sample(torch.randn(count, dims, generator=rng)), ALONE)
        lows.append(float(terms.lower.mean()))
        highs.append(float(terms.upper.mean()))
    error = 4 * math.sqrt(dims / count / len(lows))
    assert np.mean(lows) < known + error
    assert np.mean(highs) > known - error
    if s == 0.05:
        assert near_cap(np.mean(lows), math.log(count))
        assert np.mean(highs) > known + 1
    else:
        assert np.mean(highs) - np.mean(lows) < 0.2
        assert not near_cap(np.mean(lows), math.log(count))


def test_every_block_beats():
    """Without a heartbeat the watchdog would mistake a long computation for a hang."""
    beats = []
    world = World(0, 0, 1, torch.device("cpu"), SimpleNamespace(heartbeat=beats.append))
    q = Gaussian(torch.randn(30, 2), torch.randn(30, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsvae.metrics.information.PAIRS", 90)
        mutual_information(q, q.sample(torch.randn(30, 2)), world)
    assert len(beats) == 10


def test_a_collapsed_posterior_says_nothing():
    q = Gaussian(torch.zeros(40, 3), torch.zeros(40, 3))
    for terms in astuple(mutual_information(q, q.sample(torch.randn(40, 3)), ALONE)):
        torch.testing.assert_close(terms, torch.zeros(40, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(q.kl(GaussianFamily(3).prior()).sum()) == 0
    assert active_units(q) == 0


def test_blocks_change_nothing(monkeypatch):
    q = Gaussian(torch.randn(37, 2), torch.randn(37, 2))
    z = q.sample(torch.randn(37, 2))
    whole = mutual_information(q, z, ALONE)
    monkeypatch.setattr("dsvae.metrics.information.PAIRS", 100)
    torch.testing.assert_close(astuple(mutual_information(q, z, ALONE)), astuple(whole))


def test_kl_and_marginal_kl_by_hand():
    """q(z|x) = N(x, s^2) with x ~ N(0, 1 - s^2): the aggregate is the prior, so all of
    the KL is mutual information."""
    s = 0.5
    x = math.sqrt(1 - s**2) * torch.from_numpy(norm.ppf((np.arange(4000) + 0.5) / 4000)).float()
    q = Gaussian(x[:, None], torch.full((4000, 1), 2 * math.log(s)))
    kl = float(q.kl(GaussianFamily(q.mean.shape[1]).prior()).sum(1).double().mean())
    assert kl == pytest.approx(-math.log(s), abs=1e-3)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    terms = mutual_information(q, q.sample(noise), ALONE)
    assert float(terms.lower.mean()) == pytest.approx(kl, abs=0.04)


def test_active_units_by_hand():
    column = torch.tensor([-1.0, 1.0]).repeat(50)
    q = Gaussian(
        torch.stack([column, 0.15 * column, 0.05 * column, 0 * column + 7], 1), torch.zeros(100, 4)
    )
    variance = torch.tensor([1.0, 0.0225, 0.0025, 0.0], dtype=torch.float64) * 100 / 99
    torch.testing.assert_close(q.activity(), variance, atol=1e-6, rtol=1e-5)
    assert active_units(q) == 2
    curve = active_unit_curve(q)
    units = dict(zip(curve["threshold"], curve["units"], strict=True))
    assert units[0.01] == 2
    assert units[0.001] == 3
    assert units[0.1] == 1
    assert units[10.0] == 0
    assert curve["units"] == sorted(curve["units"], reverse=True)


def test_no_latent_and_a_single_sentence():
    assert active_units(Gaussian(torch.zeros(5, 0), torch.zeros(5, 0))) == 0
    assert active_units(Gaussian(torch.ones(1, 3), torch.zeros(1, 3))) == 0
    nothing = Gaussian(torch.zeros(5, 0), torch.zeros(5, 0))
    assert mutual_information(nothing, torch.zeros(5, 0), ALONE).lower.tolist() == [0] * 5
    alone = mutual_information(
        Gaussian(torch.ones(1, 3), torch.zeros(1, 3)), torch.ones(1, 3), ALONE
    )
    assert (alone.lower.tolist(), alone.upper.tolist()) == ([0], [math.inf])
