"""How much of the sentence is in the latent: mutual information, the aggregate posterior, active units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsvae.engine.distributed import World
from dsvae.modeling.posterior import Gaussian

ACTIVE_UNIT_VARIANCE = 0.01
"""A unit is active if Var_x[E q(z|x)] exceeds this (Burda et al. 2016)."""

ROWS = 512
"""Rows of the pairwise matrix at a time: 512 x N float64 values in memory."""


def mutual_information(posterior: Gaussian, latent: Tensor, world: World) -> float:
    """I(x; z) in nats under the aggregate posterior q(z) = (1/N) sum_i q(z|x_i) (Hoffman & Johnson 2016). Collective.

    A Monte Carlo mean over one z_j ~ q(z|x_j) a sentence of log q(z_j|x_j) - log q(z_j), over the full set. Each term, and so the
    estimate, is at most ln N.

    Args:
        posterior: of all N sentences.
        latent: (N, Z), one sample of each.
    """
    count = len(latent)
    total = torch.zeros(1, dtype=torch.float64)
    for start in range(world.rank * ROWS, count, world.size * ROWS):
        rows = torch.arange(start, min(start + ROWS, count))
        pairwise = posterior.pairwise_log_prob(latent[rows])  # (J, N)
        own = pairwise[torch.arange(len(rows)), rows]
        total += (own - (torch.logsumexp(pairwise, dim=1) - math.log(count))).sum()
    return float(world.sum(total.to(world.device))) / count


def active_units(posterior: Gaussian, threshold: float = ACTIVE_UNIT_VARIANCE) -> int:
    """Dimensions whose posterior mean varies over the sentences by more than `threshold` (sample variance)."""
    if posterior.mean.shape[0] < 2 or posterior.mean.shape[1] == 0:
        return 0
    return int((posterior.mean.double().var(dim=0) > threshold).sum())
