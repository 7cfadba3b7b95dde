"""The evaluation of a model on a split: every number with its unit and its denominator.

rec and kl are means per sentence in nats; `elbo` = -(rec + kl) with one or more samples of z. Perplexities and bits come from
the ELBO, so they are upper bounds: `ppl_token` per predicted token (EOS in numerator and denominator), `ppl_word` per
whitespace word with one more for the end of the sentence, `bits_per_byte` per UTF-8 byte with one more for the line's end.
`se` holds the standard error over sentences of every one of them, under the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsvae.data.noise import LATENT, PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.engine.distributed import World
from dsvae.metrics import likelihood, passes
from dsvae.metrics.information import active_units, mutual_information
from dsvae.modeling.posterior import Gaussian
from dsvae.modeling.t5_vae import T5VAE


@dataclass(frozen=True)
class Measured:
    """What the passes over N sentences found, a row a sentence, in nats; the same on every rank."""

    posterior: Gaussian
    """q(z|x), (N, Z), on CPU."""
    log_px_z: Tensor
    """(S, N) float64: log p(x|z_s) for S samples z_s ~ q(z|x)."""
    kl: Tensor
    """(N, Z) float64."""
    mi_terms: Tensor
    """(N,) float64, whose mean is the mutual information."""
    rec_shuffled: Tensor
    """(N,) float64: -log p(x|z) under another sentence's z."""
    rec_prior: Tensor
    """(N,) float64: -log p(x|z) under a z from the prior."""

    @property
    def rec(self) -> Tensor:
        """(N,) float64: -log p(x|z), the mean of the S samples."""
        return -self.log_px_z.mean(0)


def evaluate(
    model: T5VAE,
    split: TokenizedSplit,
    world: World,
    *,
    samples: int,
    token_budget: int,
    seed: int = passes.EVALUATION_SEED,
) -> dict[str, Any]:
    """The metrics of `model` on `split` that take a few passes; the same on every rank. Collective.

    Args:
        samples: z drawn a sentence for `rec`.
        token_budget: most padded tokens of one forward pass on one rank; changes the speed only.
        seed: of the draws of z.
    """
    return summarize(measure(model, split, world, samples=samples, token_budget=token_budget, seed=seed), split)


def measure(model: T5VAE, split: TokenizedSplit, world: World, *, samples: int, token_budget: int, seed: int) -> Measured:
    """The passes of `evaluate`; its arguments. Collective."""
    training = model.training
    model.eval()
    keys = split.content_keys
    dim = model.config.latent_dim
    posterior = passes.encode(model, split, world, token_budget)

    def rec_of(latent: Tensor) -> Tensor:
        return passes.decode(model, split, latent, world, token_budget).double()

    draws = (posterior.sample(passes.noise_of(keys, LATENT, s, dim, seed)) for s in range(samples))
    first = next(draws)
    log_px_z = torch.stack([-rec_of(first), *(-rec_of(latent) for latent in draws)])
    found = Measured(
        posterior=posterior,
        log_px_z=log_px_z,
        kl=posterior.kl().double(),
        mi_terms=mutual_information(posterior, first, world),
        rec_shuffled=rec_of(first[another_sentence(keys)]),
        rec_prior=rec_of(Gaussian.from_prior(passes.noise_of(keys, PRIOR, 0, dim, seed))),
    )
    model.train(training)
    return found


def summarize(found: Measured, split: TokenizedSplit) -> dict[str, Any]:
    """The metrics of what `measure` found on `split`."""
    kl = found.kl.sum(1)
    bound = likelihood.elbo(found.log_px_z, kl)
    means = {
        "rec": found.rec,
        "kl": kl,
        "elbo": bound,
        "mi": found.mi_terms,
        "marginal_kl": kl - found.mi_terms,
        "rec_shuffled": found.rec_shuffled,
        "rec_prior": found.rec_prior,
    }
    value, se = {}, {}
    for name, per_sentence in means.items():
        value[name], se[name] = likelihood.mean(per_sentence)
    units, units_se = likelihood.per_unit(-bound, split)
    sentences = len(split)
    return {
        "rec": value["rec"],
        "kl": value["kl"],
        "elbo": value["elbo"],
        "samples": len(found.log_px_z),
        **units,
        "mi": value["mi"],
        "mi_cap": math.log(sentences),
        "marginal_kl": value["marginal_kl"],
        "au": active_units(found.posterior),
        "kl_per_dim": found.kl.mean(0).tolist(),
        "rec_shuffled": value["rec_shuffled"],
        "rec_prior": value["rec_prior"],
        "sentences": sentences,
        "tokens": int(split.lengths.sum()),
        "words": int(split.words.sum()),
        "bytes": int(split.bytes.sum()),
        "truncated": int(split.truncated.sum()),
        "se": se | units_se,
    }


def another_sentence(keys: np.ndarray) -> Tensor:
    """For each of N sentences the index of another one, (N,): the next by content key, whatever the order of the file."""
    order = np.argsort(keys)
    other = np.empty(len(keys), dtype=np.int64)
    other[order] = np.roll(order, -1)
    return torch.from_numpy(other)
