"""The evaluation of a model on a split: every number with its unit and its denominator.

`rec` and `kl` are means per sentence in nats, and `elbo` = -(rec + kl) with one or more
samples of z. Perplexities and bits come from the ELBO, so they are upper bounds:
`ppl_token` per predicted token (EOS in numerator and denominator), `ppl_word` per
whitespace word plus one for the end of the sentence, `bits_per_byte` per UTF-8 byte plus
one for the end of the line. `se` holds their standard errors over sentences by name.
`warnings` says which numbers need care.
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
from dsvae.metrics import information, likelihood, passes
from dsvae.metrics.codes import of_codes
from dsvae.metrics.information import active_units, mutual_information, near_cap
from dsvae.metrics.kept import Kept
from dsvae.metrics.labelled import of_heads
from dsvae.modeling.families import Distribution
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World

NO_USE = 0.01
"""The decoder does not use z if another text's z costs less than this share of rec, with
three standard errors added."""

OF_ONE_PRIOR = ("mi", "mi_upper", "mi_cap", "marginal_kl")
"""Metrics that compare all posteriors with one prior."""

LOW_ESS = 0.25
"""The effective sample size of the importance-weighted bound is small below this share
of its samples."""


@dataclass(frozen=True)
class Measured:
    """Results of the passes over N sentences, one row per sentence, in nats; the same on
    every rank."""

    encoded: passes.Encoded
    """Of all sentences."""
    log_px_z: Tensor
    """(S, N) float64: log p(x|z_s) for S samples z_s ~ q(z|x)."""
    kl: Tensor
    """(N, Z) float64."""
    mi_rows: Tensor
    """(J,), the sentences whose terms of the mutual information were computed."""
    mi_terms: information.Terms
    """Of these J sentences."""
    mi_posteriors: int
    """P, the posteriors in the aggregate; 0 where there is none, since priors differ by
    sentence."""
    rec_shuffled: Tensor
    """(N,) float64: -log p(x|z) under the z of another text; NaN if there is none."""
    rec_prior: Tensor
    """(N,) float64: -log p(x|z) under z from the prior."""
    codes: dict[str, float]
    """Of `of_codes`; empty without a latent."""

    @property
    def posterior(self) -> Distribution:
        """q(z|x) of all sentences, on CPU."""
        return self.encoded.posterior

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
    more: TokenizedSplit | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """The metrics of `model` on `split` that need only a few passes; the same on every
    rank. Collective.

    Args:
        samples: z drawn per sentence for `rec`.
        token_budget: most padded tokens of one forward pass on one rank; changes the
            speed only.
        iw_samples: z drawn per sentence for the importance-weighted bound; 0 for none.
        seed: of the draws of z.
        more: other sentences of the same kind, such as training ones. Their posteriors
            join the aggregate, and mi is bounded more closely.
        kept: lets an interrupted evaluation continue.

    Raises:
        RunStopped: on every rank, if the run was asked to stop; only with `kept`.
    """
    options: dict[str, Any] = {"token_budget": token_budget, "seed": seed, "kept": kept}
    measured = measure(model, split, world, samples=samples, more=more, **options)
    config = model.config
    metrics = summarize(measured, split)
    add(metrics, of_heads(measured.encoded, split, config.classes, config.tags, seed))
    if iw_samples and model.config.latent_dim:
        options["count"] = iw_samples
        add(metrics, importance_weighted(model, split, measured.encoded, world, **options))
    metrics["warnings"] = warnings_of(metrics, measured)
    return metrics


def measure(
    model: T5VAE,
    split: TokenizedSplit,
    world: World,
    *,
    samples: int,
    token_budget: int,
    seed: int,
    more: TokenizedSplit | None = None,
    kept: Kept | None = None,
) -> Measured:
    """The passes of `evaluate`, with its arguments. Collective."""
    training = model.training
    model.eval()
    keys = split.content_keys
    family = model.family
    encoded = passes.encode(model, split, world, token_budget, kept)
    posterior, prior = encoded.posterior, encoded.prior

    other = another_sentence(split.text_keys, keys)

    def rec_of(latent: Tensor) -> Tensor:
        return passes.decode(model, split, latent, world, token_budget, kept).double()

    def noise(purpose: int, sample: int) -> Tensor:
        return passes.noise_of(keys, purpose, sample, family.noise_width, seed)

    draws = (posterior.sample(noise(LATENT, s)) for s in range(samples))
    first = next(draws)
    log_px_z = torch.stack([-rec_of(first), *(-rec_of(latent) for latent in draws)])
    # Content keys look random, so the sentences with the smallest keys are a random
    # subset, which is the same in every order of the file.
    chosen = torch.from_numpy(np.argsort(keys)[: information.POSTERIORS])
    # Against priors that differ by sentence, I(x; z) and the marginal KL say nothing.
    one_prior = model.config.prior == "fixed"
    parameters = posterior.parameters[chosen]
    room = information.POSTERIORS - len(chosen)
    if more is not None and family.units and room and one_prior:
        others = passes.encode(model, _sample(more, room), world, token_budget, kept).posterior
        parameters = torch.cat([parameters, others.parameters])
    rows = chosen[: information.SENTENCES if one_prior else 0]
    measured = Measured(
        encoded=encoded,
        log_px_z=log_px_z,
        kl=posterior.kl(prior).double(),
        mi_rows=rows,
        mi_terms=mutual_information(family.of(parameters), first[rows], world),
        mi_posteriors=len(parameters) if one_prior else 0,
        rec_shuffled=torch.full((len(split),), math.nan).double()
        if other is None
        else rec_of(first[other]),
        rec_prior=rec_of(prior.sample(noise(PRIOR, 0))),
        codes=of_codes(posterior, first, family.continuous) if family.units else {},
    )
    model.train(training)
    return measured


def summarize(measured: Measured, split: TokenizedSplit) -> dict[str, Any]:
    """The metrics of the results of `measure` on `split`.

    `undefined` says why a metric is null that a model of this kind cannot have.
    """
    kl = measured.kl.sum(1)
    bound = likelihood.elbo(measured.log_px_z, kl)
    means = {
        "rec": measured.rec,
        "kl": kl,
        "elbo": bound,
        "mi": measured.mi_terms.lower,
        "mi_upper": measured.mi_terms.upper,
        "marginal_kl": kl[measured.mi_rows] - measured.mi_terms.lower,
        "rec_shuffled": measured.rec_shuffled,
        "rec_prior": measured.rec_prior,
    }
    value: dict[str, float] = {}
    se: dict[str, float] = {}
    for name, per_sentence in means.items():
        value[name], se[name] = likelihood.mean(per_sentence)
    # kl = I(x; z) + KL(q(z) || p(z)) is an upper bound too
    if len(measured.mi_rows) and not value["mi_upper"] < value["kl"]:
        value["mi_upper"], se["mi_upper"] = value["kl"], se["kl"]
    cap = math.log(measured.mi_posteriors) if measured.mi_posteriors else math.nan
    if near_cap(value["mi"], cap) or not measured.posterior.kl_of_z:
        value["marginal_kl"] = se["marginal_kl"] = math.nan
    undefined = {}
    if not measured.mi_posteriors:
        reason = "undefined against a prior that differs by sentence"
        undefined["undefined"] = dict.fromkeys(OF_ONE_PRIOR, reason)
    units, units_se = likelihood.per_unit(-bound, split)
    return {
        **value,
        "samples": len(measured.log_px_z),
        **units,
        "mi_cap": cap,
        "mi_sentences": len(measured.mi_rows),
        "mi_posteriors": measured.mi_posteriors,
        "au": active_units(measured.posterior),
        **measured.codes,
        "kl_per_dim": measured.kl.mean(0).tolist(),
        "sentences": len(split),
        "tokens": int(split.lengths.sum()),
        "words": int(split.words.sum()),
        "bytes": int(split.bytes.sum()),
        "truncated": int(split.truncated.sum()),
        "se": se | units_se,
        **undefined,
    }


def importance_weighted(
    model: T5VAE,
    split: TokenizedSplit,
    encoded: passes.Encoded,
    world: World,
    *,
    count: int,
    token_budget: int,
    seed: int,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """The metrics of the importance-weighted bound with `count` samples, to be passed to
    `add`. Collective."""
    training = model.training
    model.eval()
    weights = likelihood.draw_log_weights(
        model,
        split,
        encoded,
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
    """The entropy of the corpus and the nats per sentence that the model needs above it;
    empty if the entropy is not known.

    Args:
        metrics: of `summarize`.
        entropy: of whole sentences, in nats. It does not hold for truncated sentences or
            with unknown pieces.
        unk: the number of unknown pieces.
    """
    if entropy is None or metrics["truncated"] or unk:
        return {}
    return {"entropy": entropy, "above_entropy": -metrics["elbo"] - entropy}


def warnings_of(metrics: dict[str, Any], measured: Measured) -> list[str]:
    """What a reader of the numbers must know, one sentence each.

    Args:
        metrics: of `summarize`, with those of `importance_weighted` and with `unk` if
            they are known.
    """
    if not metrics["kl_per_dim"]:
        return []
    warnings = []
    mi, cap = metrics["mi"], metrics["mi_cap"]
    if near_cap(mi, cap):
        warnings.append(
            f"mi {mi:.2f} is near its cap, ln({metrics['mi_posteriors']:,}) = {cap:.2f}: "
            f"the information lies between it and mi_upper {metrics['mi_upper']:.2f}, and "
            "marginal_kl is unknown; evaluate on more sentences"
        )
    gain, error = likelihood.mean(measured.rec_shuffled - measured.rec)
    if gain <= 3 * error:  # false for NaN, where there is no other text
        measurement = f"rec_shuffled - rec = {gain:.3f} ± {error:.3f} nats: "
        if gain + 3 * error < NO_USE * metrics["rec"]:
            warnings.append(
                f"{measurement}another text's z does as well; the decoder does not use z"
            )
        else:
            warnings.append(
                f"{measurement}not distinguishable from 0 on {metrics['sentences']:,} sentences; "
                f"evaluate on more"
            )
    size, count = metrics.get("iw_ess", math.nan), metrics.get("iw_samples", 0)
    if size < LOW_ESS * count:
        warnings.append(
            f"iw_ess {size:.1f} of {count} samples: few of them carry the importance-weighted "
            f"bound, and nll_iw is too high; take more samples"
        )
    if metrics.get("unk", 0) > 0.01 * metrics["tokens"]:
        warnings.append(
            f"{metrics['unk'] / metrics['tokens']:.1%} of the tokens are unknown pieces: "
            f"likelihoods are too good"
        )
    if metrics["truncated"] > 0.01 * metrics["sentences"]:
        share = metrics["truncated"] / metrics["sentences"]
        warnings.append(f"{share:.1%} of the sentences are truncated: give a larger max_tokens")
    return warnings


def add(metrics: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds metrics, with their standard errors under `se`."""
    metrics["se"] |= more.pop("se")
    if reasons := more.pop("undefined", None):
        metrics["undefined"] = metrics.get("undefined", {}) | reasons
    metrics |= more


def _sample(split: TokenizedSplit, count: int) -> TokenizedSplit:
    """`count` random sentences of a split, the same at every call; all if it has no
    more."""
    if len(split) <= count:
        return split
    rng = np.random.default_rng(passes.EVALUATION_SEED)
    return split.select(np.sort(rng.choice(len(split), count, replace=False)))


def another_sentence(
    text_keys: NDArray[np.uint64], content_keys: NDArray[np.uint64]
) -> Tensor | None:
    """For each of N sentences the index of one with another text, (N,); None if all
    texts are equal. The order of the sentences does not matter.

    The result is a permutation, so that every z is used once. Only if more than half of
    the sentences have the same text, the z of the others are used several times.

    Args:
        text_keys: (N,), equal for equal texts.
        content_keys: (N,), all different.
    """
    order = np.lexsort((content_keys, text_keys))
    texts = text_keys[order]
    starts = np.flatnonzero(np.concatenate([[True], texts[1:] != texts[:-1]]))
    if len(starts) < 2:
        return None
    # Equal texts are neighbours: a shift by the size of the largest group moves every
    # sentence out of its own group.
    shifted = np.roll(order, -int(np.diff(np.append(starts, len(order))).max()))
    same = np.flatnonzero(text_keys[shifted] == texts)
    # A group of more than half of the sentences overlaps itself after the shift.
    if len(same):
        shifted[same] = np.resize(order[texts != texts[same[0]]], len(same))
    other = np.empty(len(order), dtype=np.int64)
    other[order] = shifted
    return torch.from_numpy(other)
