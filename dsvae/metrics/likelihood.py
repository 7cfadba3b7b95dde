"""Likelihood of sentences under the model: bounds of log p(x) from samples of z, and
the cost per token, word and byte.

Two estimators, both lower bounds of log p(x):

- ELBO (Kingma & Welling 2014): E_q[log p(x|z)] - KL(q(z|x) || p(z)), the KL in closed
  form;
- importance-weighted bound with k samples (Burda et al. 2016): E[log (1/k) sum_s
  p(x|z_s) p(z_s) / q(z_s|x)], z_s ~ q(z|x). It rises with k towards log p(x).

The formulas are functions of plain arrays, so that tests can compare them with models
whose log p(x) is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvae.data.tokenization import TokenizedSplit


def elbo(log_px_z: Tensor, kl: Tensor) -> Tensor:
    """Computes the evidence lower bound per sentence in nats, (N,) float64.

    Args:
        log_px_z: (S, N), log p(x|z_s) in nats for S samples z_s ~ q(z|x).
        kl: (N,), KL(q(z|x) || p(z)) in nats.
    """
    return log_px_z.double().mean(0) - kl.double()


def log_importance_weights(log_px_z: Tensor, log_pz: Tensor, log_qz: Tensor) -> Tensor:
    """Computes log w = log p(x|z) + log p(z) - log q(z|x) in nats, float64, for z ~
    q(z|x); all of one shape."""
    return log_px_z.double() + log_pz.double() - log_qz.double()


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Computes log (1/k) sum_s w_s per sentence in nats, (N,) float64, for log-weights
    (k, N) (Burda et al. 2016)."""
    return torch.logsumexp(log_weights.double(), dim=0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Computes (sum_s w_s)^2 / sum_s w_s^2 per sentence, (N,) float64, from 1 to k, for
    log-weights (k, N) (Kong 1992).

    Near 1 a single sample decides the bound, which is then loose.
    """
    log_weights = log_weights.double()
    return torch.exp(
        2 * torch.logsumexp(log_weights, dim=0) - torch.logsumexp(2 * log_weights, dim=0)
    )


def per_unit(
    nats: Tensor, split: TokenizedSplit, suffix: str = ""
) -> tuple[dict[str, float], dict[str, float]]:
    """Computes perplexities and bits of a bound of -log p(x), and their standard
    errors, under the same names.

    ppl_token = exp(nats / tokens), where EOS is a token. ppl_word = exp(nats / (words +
    sentences)): the end of a sentence counts as a word. bits_per_byte = nats / ln 2 /
    (bytes + sentences): the end of a sentence counts as a byte.

    Args:
        nats: (N,), per sentence, EOS included.
        suffix: appended to the names.
    """
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, units in (("ppl_token", split.lengths), ("ppl_word", split.words + 1)):
        rate, error = ratio(nats, units)
        values[name + suffix] = perplexity = _exp(rate)
        errors[name + suffix] = perplexity * error
    rate, error = ratio(nats, split.bytes + 1)
    values["bits_per_byte" + suffix], errors["bits_per_byte" + suffix] = (
        rate / math.log(2),
        error / math.log(2),
    )
    return values, errors


def mean(values: Tensor) -> tuple[float, float]:
    """Computes the mean over N sentences and its standard error: sample deviation /
    sqrt N, NaN for one sentence."""
    values = values.double()
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(values.mean()), error


def means(named: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Computes the means of several values over sentences and their standard errors, by
    name."""
    found = {name: mean(values) for name, values in named.items()}
    return {n: value for n, (value, _) in found.items()}, {n: se for n, (_, se) in found.items()}


def ratio(values: Tensor, units: NDArray[np.integer]) -> tuple[float, float]:
    """Computes sum(values) / sum(units) over N sentences, and its standard error by
    linearization (the delta method).

    Sentences are independent, not their tokens.
    """
    values, weight = values.double(), torch.from_numpy(units.astype(np.float64))
    total, count = float(weight.sum()), len(values)
    rate = float(values.sum()) / total
    if count < 2:
        return rate, math.nan
    residual = values - rate * weight
    return rate, math.sqrt(float(residual.square().sum()) / (count - 1) * count) / total


def _exp(value: float) -> float:
    """Computes exp(value), infinite if it overflows."""
    return math.exp(value) if value < 700 else math.inf
