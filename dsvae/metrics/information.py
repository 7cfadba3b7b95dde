"""How much of the sentence is in the latent: mutual information, the aggregate
posterior, active units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsvae.engine.distributed import World
from dsvae.modeling.posterior import Gaussian

ACTIVE_UNIT_VARIANCE = 0.01
"""A unit is active if Var_x[E q(z|x)] exceeds this (Burda et al. 2016)."""

CURVE_THRESHOLDS = tuple(float(f"{10 ** (step / 4 - 4):.4g}") for step in range(21))
"""Thresholds of the active-unit curve: four a decade from 1e-4 to 10."""

NEAR_CAP = 0.95
"""Share of its cap from which on an estimate of the mutual information is not to be
trusted."""

PAIRS = 2**22
"""Entries of the pairwise matrix at a time, float64."""


def mutual_information(posterior: Gaussian, latent: Tensor, world: World) -> Tensor:
    """The terms of I(x; z) in nats, (N,) float64, whose mean is the estimate (Hoffman &
    Johnson 2016). Collective.

    The aggregate posterior is q(z) = (1/N) sum_i q(z|x_i) over the full set, and a term
    is log q(z_j|x_j) - log q(z_j) for one z_j ~ q(z|x_j). Each term, and so the
    estimate, is at most ln N.

    Args:
        posterior: of all N sentences.
        latent: (N, Z), one sample of each.
    """
    count = len(latent)
    terms = torch.zeros(count, dtype=torch.float64)
    if latent.shape[1] == 0:
        return terms
    rows_at_a_time = max(1, PAIRS // count)
    for start in range(world.rank * rows_at_a_time, count, world.size * rows_at_a_time):
        rows = torch.arange(start, min(start + rows_at_a_time, count))
        pairwise = posterior.pairwise_log_prob(latent[rows])  # (J, N)
        own = pairwise[torch.arange(len(rows)), rows]
        terms[rows] = own - (torch.logsumexp(pairwise, dim=1) - math.log(count))
    return world.sum(terms.to(world.device)).cpu()


def near_cap(mi: float, sentences: int) -> str | None:
    """A warning where an estimate of the mutual information of so many sentences is
    near its cap, ln N."""
    cap = math.log(sentences)
    if not mi > NEAR_CAP * cap:  # or not a number
        return None
    return (
        f"mi {mi:.2f} is near its cap, ln({sentences:,}) = {cap:.2f}: the true value may be "
        f"higher, and marginal_kl lower; "
        "evaluate on more sentences"
    )


def mean_variance(posterior: Gaussian) -> Tensor:
    """Var_x[E q(z|x)] of every dimension over the sentences (sample variance), (Z,)
    float64; zeros for a single sentence."""
    mean = posterior.mean.double()
    if len(mean) < 2 or mean.shape[1] == 0:
        return torch.zeros(mean.shape[1], dtype=torch.float64)
    return mean.var(dim=0)


def active_units(posterior: Gaussian, threshold: float = ACTIVE_UNIT_VARIANCE) -> int:
    """Dimensions whose posterior mean varies over the sentences by more than
    `threshold` (Burda et al. 2016)."""
    return int((mean_variance(posterior) > threshold).sum())


def active_unit_curve(posterior: Gaussian) -> dict[str, list]:
    """Active units at every one of `CURVE_THRESHOLDS`: a count that hangs on its
    threshold is no property of the model."""
    variance = mean_variance(posterior)
    return {
        "threshold": list(CURVE_THRESHOLDS),
        "units": [int((variance > threshold).sum()) for threshold in CURVE_THRESHOLDS],
    }
