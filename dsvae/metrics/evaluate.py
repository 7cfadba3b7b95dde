"""The evaluation of a model on a split: every number with its unit and its denominator.

rec and kl are means per sentence in nats; `elbo` = -(rec + kl) with one or more samples of z. Perplexities and bits come from
the ELBO, so they are upper bounds: `ppl_token` per predicted token (EOS in numerator and denominator), `ppl_word` per
whitespace word with one more for the end of the sentence, `bits_per_byte` per UTF-8 byte with one more for the line's end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsvae.data.noise import LATENT, PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.engine.distributed import World
from dsvae.metrics import passes
from dsvae.metrics.information import active_units, mutual_information
from dsvae.modeling.posterior import Gaussian
from dsvae.modeling.t5_vae import T5VAE


def evaluate(
    model: T5VAE, split: TokenizedSplit, world: World, *, samples: int, token_budget: int
) -> dict[str, Any]:
    """All metrics of `model` on `split`; the same on every rank. Collective.

    Args:
        samples: z drawn a sentence for `rec`.
        token_budget: most padded tokens of one forward pass on one rank; changes the speed only.
    """
    training = model.training
    model.eval()
    keys = split.content_keys
    dim = model.config.latent_dim
    posterior = passes.encode(model, split, world, token_budget)
    kl = posterior.kl().double()  # (N, Z)

    def rec_of(latent: Tensor) -> float:
        return float(passes.decode(model, split, latent, world, token_budget).double().mean())

    draws = [posterior.sample(passes.noise_of(keys, LATENT, s, dim)) for s in range(samples)]
    rec = float(np.mean([rec_of(latent) for latent in draws]))
    kl_mean = float(kl.sum(1).mean())
    mi = mutual_information(posterior, draws[0], world)
    rec_shuffled = rec_of(draws[0][another_sentence(keys)])
    rec_prior = rec_of(Gaussian.from_prior(passes.noise_of(keys, PRIOR, 0, dim)))
    model.train(training)

    sentences, tokens = len(split), int(split.lengths.sum())
    words, size = int(split.words.sum()), int(split.bytes.sum())
    nats = (rec + kl_mean) * sentences  # -ELBO of the whole split
    return {
        "rec": rec,
        "kl": kl_mean,
        "elbo": -(rec + kl_mean),
        "samples": samples,
        "ppl_token": _exp(nats / tokens),
        "ppl_word": _exp(nats / (words + sentences)),
        "bits_per_byte": nats / math.log(2) / (size + sentences),
        "mi": mi,
        "mi_cap": math.log(sentences),
        "marginal_kl": kl_mean - mi,
        "au": active_units(posterior),
        "kl_per_dim": kl.mean(0).tolist(),
        "rec_shuffled": rec_shuffled,
        "rec_prior": rec_prior,
        "sentences": sentences,
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "truncated": int(split.truncated.sum()),
    }


def another_sentence(keys: np.ndarray) -> Tensor:
    """For each of N sentences the index of another one, (N,): the next by content key, whatever the order of the file."""
    order = np.argsort(keys)
    other = np.empty(len(keys), dtype=np.int64)
    other[order] = np.roll(order, -1)
    return torch.from_numpy(other)


def _exp(value: float) -> float:
    """exp, infinite where it overflows."""
    return math.exp(value) if value < 700 else math.inf
