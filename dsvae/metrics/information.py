"""How much the latent knows about the sentence: mutual information and active units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsvae.console import progress
from dsvae.modeling.families import ACTIVE, Distribution
from dsvae.parallel.world import World

CURVE_THRESHOLDS = tuple(float(f"{10 ** (step / 4 - 4):.4g}") for step in range(21))
"""Thresholds of the active-unit curve: four per decade from 1e-4 to 10."""

NEAR_CAP = math.log(2)
"""A lower bound of the mutual information that is closer to its cap than this, in nats,
says little: a sentence's own posterior is then more than half of the aggregate at its
z."""

SENTENCES = 2**11
"""The largest number of sentences whose terms are computed."""

POSTERIORS = 2**16
"""The largest number of posteriors in the aggregate."""

NUMBERS = 2**23
"""The largest number of numbers of z in the aggregate. A larger z has fewer posteriors
there: 2,048 of 4,096 numbers."""

PAIRS = 2**22
"""Entries of the pairwise float64 matrix that are computed at a time."""


@dataclass(frozen=True)
class Terms:
    """Terms of two estimates of I(x; z), each the mean of J numbers: (J,) float64, in
    nats."""

    lower: Tensor
    """log q(z_j|x_j) - log of the mean density of all P posteriors at z_j."""
    upper: Tensor
    """The same without the sentence's own posterior in the mean; infinite if there is
    no other."""


def mutual_information(aggregate: Distribution, latent: Tensor, world: World) -> Terms:
    """Bounds I(x; z) from below and above by pairs of sentences and posteriors.
    Collective.

    Both hold in expectation over sentences that are drawn independently (Poole et al.
    2019, On Variational Bounds of Mutual Information). With a sentence's own posterior in
    the aggregate q(z), the terms are at most ln P and their mean is too low; without it,
    the mean is too high. The two meet if P is far above exp(I).

    Args:
        aggregate: the posteriors of P sentences.
        latent: (J, Z), one sample from each of the first J posteriors.
    """
    count, all_posteriors = len(latent), len(aggregate.parameters)
    terms = torch.zeros(2, count, dtype=torch.float64, device=world.device)
    if latent.shape[1] == 0:
        return Terms(*terms.cpu())
    aggregate = aggregate.to(world.device)
    latent = latent.to(world.device)
    rows_at_a_time = max(1, PAIRS // all_posteriors)
    starts = range(world.rank * rows_at_a_time, count, world.size * rows_at_a_time)
    for start in progress(
        starts, name="mutual information", unit="batch", delay=10, shown=world.is_main
    ):
        rows = torch.arange(start, min(start + rows_at_a_time, count), device=world.device)
        pairwise = aggregate.pairwise_log_prob(latent[rows])  # (rows, P)
        own = pairwise.gather(1, rows[:, None])[:, 0]
        # Subtracting it from the sum of all would lose the others if it is nearly the
        # whole sum.
        others = pairwise.scatter(1, rows[:, None], -math.inf).logsumexp(1)
        terms[0, rows] = own - torch.logaddexp(own, others) + math.log(all_posteriors)
        terms[1, rows] = own - others + math.log(max(1, all_posteriors - 1))
        world.heartbeat("mutual information")
    return Terms(*world.sum(terms).cpu())


def most_posteriors(numbers: int) -> int:
    """Returns the largest number of posteriors in the aggregate, for z of so many
    numbers."""
    return min(POSTERIORS, NUMBERS // max(1, numbers))


def near_cap(mi: float, cap: float) -> bool:
    """Tells whether a lower bound of the mutual information says little more than how
    many posteriors the aggregate has."""
    return mi > cap - NEAR_CAP


def active_units(posterior: Distribution, threshold: float = ACTIVE) -> int:
    """Counts units whose activity over the sentences exceeds `threshold` (Burda et al.
    2016)."""
    return int((posterior.activity() > threshold).sum())


def centred(z: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Subtracts from each number of z its mean over the texts that have its vector.

    Args:
        z: (N, Z), of N texts with up to K vectors each.
        valid: (N, K) boolean, the vectors that there are.

    Returns: (N, Z) float64, 0 in vectors that there are not; and the standard deviation
        of each number over those that there are, (Z,) float64.
    """
    z, has = z.double(), valid.repeat_interleave(z.shape[1] // valid.shape[1], dim=1)
    count = has.sum(0).clamp(min=1)
    z = torch.where(has, z - torch.where(has, z, 0.0).sum(0) / count, 0.0)
    return z, (z.square().sum(0) / count).sqrt()


def participation_ratio(z: Tensor, texts: Tensor | None = None) -> tuple[float, float]:
    """Computes how many directions z varies in, and its standard error by linearization.

    tr(C)^2 / tr(C^2) with the covariance C of z: D if D directions have the same
    variance and the others none. NaN if nothing varies. N rows have at most N - 1
    directions, so it is too low if N is not far above the width of z.

    Args:
        z: (N, Z).
        texts: (N,), which text each row is of. None: each of its own.
    """
    z = z.double()
    z = z - z.mean(0)
    # tr(C) and tr(C^2) are the means of these.
    one, two = z.square().sum(1), (z * (z @ (z.T @ z / len(z)))).sum(1)
    trace, squared = float(one.mean()), float(two.mean())
    texts = torch.arange(len(z)) if texts is None else texts.unique(return_inverse=True)[1]
    count = int(texts.max()) + 1
    if not squared or count < 2:
        return math.nan, math.nan
    ratio = trace**2 / squared
    # tr(C^2) is quadratic in C, so a row changes it twice as much.
    influence = ratio * (2 * (one / trace - 1) - 2 * (two / squared - 1)) / len(z)
    of_texts = torch.zeros(count, dtype=z.dtype).index_add(0, texts, influence)
    return ratio, math.sqrt(float(of_texts.square().sum()) * count / (count - 1))


def active_unit_curve(posterior: Distribution) -> dict[str, list]:
    """Counts active units at each of `CURVE_THRESHOLDS`: a count that depends on its
    threshold is not a property of the model."""
    activity = posterior.activity()
    return {
        "threshold": list(CURVE_THRESHOLDS),
        "units": [int((activity > threshold).sum()) for threshold in CURVE_THRESHOLDS],
    }
