"""How sparse continuous codes are, and what the KL of discrete ones consists of."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from dsvae.modeling.families import Distribution
from dsvae.objective import elbo

ENUMERABLE = 65_536
"""The largest number of codes that a total correlation is summed over one by one."""


def of_codes(posterior: Distribution, draws: Tensor) -> dict[str, float]:
    """Computes the metrics of this module that the family has, by name.

    Args:
        posterior: q(z|x) of N sentences.
        draws: z of them, (N, Z).
    """
    if (probabilities := posterior.probabilities) is not None:
        return {
            "tc": total_correlation(probabilities),
            "tc_pairwise": pairwise_total_correlation(probabilities),
            "marginal_kl_units": marginal_kl_of_variables(probabilities),
        }
    sparsity = {"hoyer": average_hoyer(posterior.point), "hoyer_draws": average_hoyer(draws)}
    if posterior.spike is not None:
        sparsity["units_used"] = float((1 - posterior.spike.double()).sum(1).mean())
    return sparsity


def hoyer(z: Tensor) -> Tensor:
    """Computes Hoyer's sparsity of every row of z (N, Z), (N,) float64 in [0, 1].

    (sqrt(Z) - |z|_1 / |z|_2) / (sqrt(Z) - 1): 1 for a row with one non-zero entry, 0 for
    one whose entries are equal (Hurley & Rickard 2009). NaN for rows of zeros, which have
    no direction, and for Z = 1.
    """
    z = z.double()
    root = math.sqrt(z.shape[1])
    ratio = z.abs().sum(1) / z.square().sum(1).sqrt()
    return (root - ratio) / (root - 1) if root > 1 else torch.full_like(ratio, math.nan)


def average_hoyer(z: Tensor) -> float:
    """Computes the mean sparsity of sentences, z (N, Z), each dimension first divided
    by its standard deviation over the sentences (Prokhorov et al. 2021).

    Without that, a dimension that is always small would count as sparsity. Rows of zeros
    and dimensions that never vary are left out. NaN if nothing remains.
    """
    z = z.double()
    deviation = z.std(0) if len(z) > 1 else torch.zeros(z.shape[1], dtype=torch.float64)
    varying = deviation > 0
    if int(varying.sum()) < 2:
        return math.nan
    return float(hoyer(z[:, varying] / deviation[varying]).nanmean())


def marginal_kl_of_variables(probabilities: Tensor) -> float:
    """Computes sum_d KL(q(z_d) || p_d) in nats, for a uniform prior p.

    Args:
        probabilities: q(z_d = k|x_n), (N, D, K).
    """
    mean = probabilities.double().mean(0)
    return float(math.log(mean.shape[1]) * len(mean) + torch.special.xlogy(mean, mean).sum())


def pairwise_total_correlation(probabilities: Tensor) -> float:
    """Sums I(z_d; z_e) over pairs of variables under q(z) = mean_n q(z|x_n), in nats.

    Exact for q(z) of these N sentences. It is the total correlation itself for two
    variables, and 0 exactly if the variables are pairwise independent. N sentences
    add about (K - 1)^2 / (2N) nats per pair by chance, at most.

    Args:
        probabilities: (N, D, K).
    """
    p = probabilities.double()
    n, variables, values = p.shape
    flat = p.reshape(n, variables * values)
    joint = (flat.T @ flat / n).view(variables, values, variables, values)
    first, second = torch.triu_indices(variables, variables, offset=1)
    return float(elbo.information_of_pairs(p.mean(0), joint[first, :, second]))


def total_correlation(probabilities: Tensor) -> float:
    """Computes KL(q(z) || prod_d q(z_d)) in nats under q(z) = mean_n q(z|x_n), by
    enumeration; NaN if there are more than `ENUMERABLE` codes.

    With I(x; z) of the same N sentences it is exact that mean_n KL(q(z|x_n) || p) =
    I(x; z) + total correlation + sum_d KL(q(z_d) || p_d) (Chen et al. 2018).

    Args:
        probabilities: (N, D, K).
    """
    p = probabilities.double()
    n, variables, values = p.shape
    if values**variables > ENUMERABLE:
        return math.nan
    joint = torch.zeros(values**variables, dtype=torch.float64)
    for each in p:
        joint += _product(each) / n
    independent = _product(p.mean(0))
    seen = joint > 0
    return float((joint[seen] * (joint[seen].log() - independent[seen].log())).sum())


def _product(rows: Tensor) -> Tensor:
    """Returns the probabilities of all codes (K**D,) of independent variables, rows (D,
    K)."""
    return reduce(lambda codes, row: torch.outer(codes, row).flatten(), rows)
