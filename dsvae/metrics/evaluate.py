"""The evaluation of a model on a split: every number with its unit and its denominator.

rec and kl are means per sentence in nats; `elbo` = -(rec + kl) with one or more samples
of z. Perplexities and bits come from the ELBO, so they are upper bounds: `ppl_token`
per predicted token (EOS in numerator and denominator), `ppl_word` per whitespace word
with one more for the end of the sentence, `bits_per_byte` per UTF-8 byte with one more
for the line's end. `se` holds the standard error over sentences of every one of them,
under the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvae.data.noise import LATENT, PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.engine.distributed import World
from dsvae.metrics import likelihood, passes
from dsvae.metrics.information import active_units, mutual_information
from dsvae.metrics.kept import Kept
from dsvae.modeling.posterior import Gaussian
from dsvae.modeling.t5_vae import T5VAE


@dataclass(frozen=True)
class Measured:
    """What the passes over N sentences found, a row a sentence, in nats; the same on
    every rank."""

    posterior: Gaussian
    """q(z|x), (N, Z), on CPU."""
    log_px_z: Tensor
    """(S, N) float64: log p(x|z_s) for S samples z_s ~ q(z|x)."""
    kl: Tensor
    """(N, Z) float64."""
    mi_terms: Tensor
    """(N,) float64, whose mean is the mutual information."""
    rec_shuffled: Tensor
    """(N,) float64: -log p(x|z) under the z of a sentence of another text; NaN where
    there is none."""
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
    iw_samples: int = 0,
    seed: int = passes.EVALUATION_SEED,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """The metrics of `model` on `split` that take a few passes; the same on every rank.
    Collective.

    Args:
        samples: z drawn a sentence for `rec`.
        token_budget: most padded tokens of one forward pass on one rank; changes the
            speed only.
        iw_samples: z drawn a sentence for the importance-weighted bound; 0: not
            measured.
        seed: of the draws of z.
        kept: makes the evaluation one that can be cut and goes on.

    Raises:
        RunStopped: on every rank: told to stop; only with `kept`.
    """
    options: dict[str, Any] = {"token_budget": token_budget, "seed": seed, "kept": kept}
    measured = measure(model, split, world, samples=samples, **options)
    metrics = summarize(measured, split)
    if iw_samples and model.config.latent_dim:
        options["count"] = iw_samples
        add(metrics, importance_weighted(model, split, measured.posterior, world, **options))
    return metrics


def measure(
    model: T5VAE,
    split: TokenizedSplit,
    world: World,
    *,
    samples: int,
    token_budget: int,
    seed: int,
    kept: Kept | None = None,
) -> Measured:
    """The passes of `evaluate`; its arguments. Collective."""
    training = model.training
    model.eval()
    keys = split.content_keys
    dim = model.config.latent_dim
    posterior = passes.encode(model, split, world, token_budget, kept)

    other = another_sentence(split.text_keys, keys)

    def rec_of(latent: Tensor) -> Tensor:
        return passes.decode(model, split, latent, world, token_budget, kept).double()

    draws = (posterior.sample(passes.noise_of(keys, LATENT, s, dim, seed)) for s in range(samples))
    first = next(draws)
    log_px_z = torch.stack([-rec_of(first), *(-rec_of(latent) for latent in draws)])
    found = Measured(
        posterior=posterior,
        log_px_z=log_px_z,
        kl=posterior.kl().double(),
        mi_terms=mutual_information(posterior, first, world),
        rec_shuffled=torch.full((len(split),), math.nan).double()
        if other is None
        else rec_of(first[other]),
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


def importance_weighted(
    model: T5VAE,
    split: TokenizedSplit,
    posterior: Gaussian,
    world: World,
    *,
    count: int,
    token_budget: int,
    seed: int,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """The metrics of the importance-weighted bound with `count` samples, for `add`.
    Collective."""
    training = model.training
    model.eval()
    weights = likelihood.draw_log_weights(
        model,
        split,
        posterior,
        world,
        count=count,
        token_budget=token_budget,
        seed=seed,
        kept=kept,
    )
    model.train(training)
    nll = -likelihood.importance_weighted_bound(weights)
    size = likelihood.effective_sample_size(weights)
    value, error = likelihood.mean(nll)
    units, units_se = likelihood.per_unit(nll, split, "_iw")
    ess, ess_se = likelihood.mean(size)
    return {
        "nll_iw": value,
        "iw_samples": count,
        "iw_ess": ess,
        "iw_ess_min": float(size.min()),
        **units,
        "se": {"nll_iw": error, "iw_ess": ess_se, **units_se},
    }


def against_entropy(metrics: dict[str, Any], entropy: float | None, unk: int) -> dict[str, float]:
    """The entropy of the corpus beside what the model needs, both in nats per sentence;
    empty where nobody knows it.

    Args:
        metrics: of `summarize`.
        entropy: of whole sentences. Those that were cut, or that hold one of the `unk`
            unknown pieces, say less.
    """
    if entropy is None or metrics["truncated"] or unk:
        return {}
    return {"entropy": entropy, "above_entropy": -metrics["elbo"] - entropy}


def add(metrics: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds metrics with their standard errors, which stand under `se`."""
    metrics["se"] |= more.pop("se")
    metrics |= more


def another_sentence(
    text_keys: NDArray[np.uint64], content_keys: NDArray[np.uint64]
) -> Tensor | None:
    """For each of N sentences the index of one with another text, (N,), whatever their
    order; None where all texts are equal.

    A permutation, so that every sentence's z is used once, unless one text has more
    than half of the sentences: then the others' z serve several of them.

    Args:
        text_keys: (N,), equal for equal texts. content_keys: (N,), all different.
    """
    order = np.lexsort((content_keys, text_keys))
    texts = text_keys[order]
    starts = np.flatnonzero(np.concatenate([[True], texts[1:] != texts[:-1]]))
    if len(starts) < 2:
        return None
    # Equal texts stand side by side: a shift by as many as the commonest has leaves no
    # sentence within its own text.
    shifted = np.roll(order, -int(np.diff(np.append(starts, len(order))).max()))
    same = np.flatnonzero(text_keys[shifted] == texts)
    # of the one text that has more than half, the shift went around to its own
    # beginning
    if len(same):
        shifted[same] = np.resize(order[texts != texts[same[0]]], len(same))
    other = np.empty(len(order), dtype=np.int64)
    other[order] = shifted
    return torch.from_numpy(other)
