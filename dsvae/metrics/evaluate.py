"""The evaluation of a model on a split: every number with its unit and its denominator.

`rec` and `kl` are means per sentence in nats, and `elbo` = -(rec + kl) with one or more
samples of z. Perplexities and bits come from the ELBO, so they are upper bounds:
`ppl_token` per predicted token (EOS in numerator and denominator), `ppl_word` per
whitespace word plus one for the end of the sentence, `bits_per_byte` per UTF-8 byte plus
one for the end of the line. `se` holds their standard errors over sentences by name.
`warnings` says which numbers need care.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvae.data.noise import LATENT, PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.inference.passes import Encoded, Passes, Rows, by_rows
from dsvae.metrics import information, likelihood
from dsvae.metrics.codes import of_codes
from dsvae.metrics.information import (
    active_units,
    centred,
    mutual_information,
    near_cap,
    participation_ratio,
)
from dsvae.metrics.labelled import add, of_heads
from dsvae.modeling.families import Distribution

EVALUATION_SEED = 0
"""Evaluation does not use the run's seed, so that two models are compared on the same
noise."""

NO_USE = 0.01
"""The decoder does not use z if another text's z costs less than this share of rec,
with three standard errors added."""

OF_ONE_PRIOR = ("mi", "mi_upper", "mi_cap", "marginal_kl")
"""Metrics that compare all posteriors with one prior."""

LOW_ESS = 0.25
"""The effective sample size of the importance-weighted bound is small below this share
of its samples."""


@dataclass(frozen=True)
class Measured:
    """Results of the passes over N sentences, one row per sentence, in nats; the same
    on every rank."""

    encoded: Encoded
    """Of all sentences."""
    draws: Tensor
    """(N, Z): the first sample of z ~ q(z|x)."""
    log_px_z: Tensor
    """(S, N) float64: log p(x|z_s) for S samples z_s ~ q(z|x)."""
    log_weights: Tensor
    """(k, N) float64: the importance weights of k samples, the first S of them the
    same."""
    kl: Tensor
    """(N, U) float64, of each unit."""
    mi_rows: Tensor
    """(J,), the sentences whose terms of the mutual information were computed."""
    mi_terms: information.Terms
    """Of these J sentences."""
    mi_posteriors: int
    """P, the posteriors in the aggregate; 0 if there is none, since priors differ by
    sentence."""
    right: Tensor
    """(N,) float64: the tokens that are the likeliest ones, given the first sample of z
    and the tokens before."""
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
    def valid(self) -> Tensor:
        """(N, K) boolean: which of its K vectors each sentence has. One, if z is one
        vector."""
        one = torch.ones(len(self.draws), 1, dtype=torch.bool)
        return self.posterior.tensors().get("valid", one)

    @property
    def rec(self) -> Tensor:
        """(N,) float64: -log p(x|z), the mean of the S samples."""
        return -self.log_px_z.mean(0)


def evaluate(
    passes: Passes,
    split: TokenizedSplit,
    *,
    samples: int,
    iw_samples: int | None = None,
    seed: int = EVALUATION_SEED,
    more: TokenizedSplit | None = None,
    entropy: float | None = None,
    unk: int = 0,
) -> tuple[dict[str, Any], Measured]:
    """Measures a model on a split; returns its metrics and what they were computed
    from, the same on every rank. Collective.

    Args:
        samples: z drawn per sentence for `rec`.
        iw_samples: z drawn per sentence for the importance-weighted bound; 0 or None for
            none.
        seed: of the draws of z.
        more: other sentences of the same kind, such as training ones. Their posteriors
            join the aggregate, and mi is bounded more closely.
        entropy: of the corpus, in nats per sentence, if it is known.
        unk: the number of unknown pieces in the split.

    Raises:
        RunStopped: on every rank, if the run was asked to stop.
    """
    config = passes.model.config
    measured = measure(
        passes, split, samples=samples, iw_samples=iw_samples or 0, seed=seed, more=more
    )
    metrics = summarize(measured, split)
    if config.has_latent and passes.family.continuous:
        add(metrics, room_of(measured, split))
    add(metrics, of_heads(measured.encoded, split, config.classes, config.tags, seed))
    if len(measured.log_weights):
        add(metrics, importance_weighted(measured.log_weights, split))
    metrics |= against_entropy(metrics, entropy, unk)
    metrics["warnings"] = warnings_of(metrics, measured, unk)
    return metrics, measured


def measure(
    passes: Passes,
    split: TokenizedSplit,
    *,
    samples: int,
    seed: int,
    iw_samples: int = 0,
    more: TokenizedSplit | None = None,
) -> Measured:
    """Runs the passes of `evaluate`, with its arguments. Collective.

    The random numbers of a sentence are keyed by its content, not by its place: results
    do not depend on the order of the file.
    """
    config, family, keys = passes.model.config, passes.family, split.content_keys
    encoded = passes.encode(split)
    posterior, prior = encoded.posterior, encoded.prior
    posterior_of, prior_of = by_rows(family, posterior), by_rows(family, prior)

    def noise(rows: Rows, purpose: int, sample: int) -> Tensor:
        pairs = [(sample, key) for key in keys[rows].tolist()]
        return passes.noise(seed, purpose, pairs)

    def sampled(rows: Rows, sample: int) -> tuple[Tensor, Tensor]:
        own = posterior_of(rows)
        z = own.sample(noise(rows, LATENT, sample))
        # float64, because the weight is the exponential of a sum of large terms with
        # opposite signs.
        exact = z.double()
        more = [exact[:, : 0 if sample else None]]
        if sample < iw_samples:
            more += [each.log_prob(exact)[:, None] for each in (prior_of(rows), own)]
        return z, torch.cat(more, dim=1)

    log_px_z: list[Tensor] = []
    log_weights: list[Tensor] = []
    draws = right = torch.zeros(0)
    for sample in range(max(samples, iw_samples)):
        if sample == 0 or config.has_latent:  # without a latent, all samples are one
            width = (0 if sample else family.latent_width) + 2 * (sample < iw_samples)
            name = f"sample {sample} of seed {seed}, {width}"
            draw = functools.partial(sampled, sample=sample)
            scored = passes.decode(split, draw, name, width, count_right=sample == 0)
        if sample == 0:
            draws, right = scored.more[:, : family.latent_width].float(), scored.right
        if sample < samples:
            log_px_z.append(scored.log_px_z)
        if sample < iw_samples:
            log_pz, log_qz = scored.more[:, -2:].T
            log_weights.append(likelihood.log_importance_weights(scored.log_px_z, log_pz, log_qz))

    def rec_of(latent: Callable[[Rows], Tensor], name: str) -> Tensor:
        if not config.has_latent:
            return -log_px_z[0]

        def draw(rows: Rows) -> tuple[Tensor, Tensor]:
            return latent(rows), torch.zeros(len(rows), 0)

        return -passes.decode(split, draw, f"{name} of seed {seed}").log_px_z

    other = another_sentence(split.text_keys, keys)
    # Content keys look random, so the sentences with the smallest keys are a random
    # subset, which is the same in every order of the file.
    most = information.most_posteriors(family.latent_width)
    chosen = torch.from_numpy(np.argsort(keys)[:most])
    # Against priors that differ by sentence, I(x; z) and the marginal KL say nothing.
    one_prior = config.prior == "fixed"
    parameters = posterior.parameters[chosen]
    room = most - len(chosen)
    if more is not None and config.has_latent and room and one_prior:
        others = passes.encode(_sample(more, room)).posterior
        parameters = torch.cat([parameters, others.parameters])
    rows = chosen[: information.SENTENCES if one_prior else 0]
    return Measured(
        encoded=encoded,
        draws=draws,
        log_px_z=torch.stack(log_px_z),
        log_weights=torch.stack(log_weights) if log_weights else torch.zeros(0, len(split)),
        kl=posterior.kl(prior).double(),
        mi_rows=rows,
        mi_terms=mutual_information(family.of(parameters), draws[rows], passes.world),
        mi_posteriors=len(parameters) if one_prior else 0,
        right=right,
        rec_shuffled=torch.full((len(split),), math.nan).double()
        if other is None
        else rec_of(lambda rows: draws[other[rows]], "another's sample"),
        rec_prior=rec_of(lambda rows: prior_of(rows).sample(noise(rows, PRIOR, 0)), "prior"),
        codes=of_codes(posterior, draws) if config.has_latent else {},
    )


def summarize(measured: Measured, split: TokenizedSplit) -> dict[str, Any]:
    """Computes the metrics of the results of `measure` on `split`.

    `undefined` says why a metric is null that a model of this kind cannot have.
    """
    kl = measured.kl.sum(1)
    bound = likelihood.elbo(measured.log_px_z, kl)
    terms = measured.mi_terms
    per_sentence = {
        "rec": measured.rec,
        "kl": kl,
        "elbo": bound,
        "mi": terms.lower,
        "mi_upper": terms.upper,
        "marginal_kl": kl[measured.mi_rows] - terms.lower,
        "rec_shuffled": measured.rec_shuffled,
        "rec_prior": measured.rec_prior,
    }
    value, se = likelihood.means(per_sentence)
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
    forced, forced_se = likelihood.ratio(measured.right, split.lengths)
    return {
        **value,
        "samples": len(measured.log_px_z),
        **units,
        "mi_cap": cap,
        "mi_sentences": len(measured.mi_rows),
        "mi_posteriors": measured.mi_posteriors,
        "au": active_units(measured.posterior),
        "token_accuracy_forced": forced,
        **measured.codes,
        "kl_per_dim": measured.kl.mean(0).tolist(),
        "sentences": len(split),
        "tokens": int(split.lengths.sum()),
        "words": int(split.words.sum()),
        "bytes": int(split.bytes.sum()),
        "truncated": int(split.truncated.sum()),
        "se": se | units_se | {"token_accuracy_forced": forced_se},
        **undefined,
    }


def room_of(measured: Measured, split: TokenizedSplit) -> dict[str, Any]:
    """Computes how large z is beside the texts, and how much of it varies, for `add`.

    Returns:
        tokens_per_vector, numbers_per_token, nats_per_token: tokens of a sentence (EOS
            included) per vector of z, numbers of z per token, and KL in nats per token.
        participation_ratio: that of the posterior means.
        participation_ratio_vector: that of all vectors together, if z has several.
        se: their standard errors over sentences.
    """
    point, valid = measured.posterior.point, measured.valid
    width, vectors = point.shape[1] // valid.shape[1], valid.sum(1)
    found = {
        "tokens_per_vector": likelihood.ratio(torch.from_numpy(split.lengths), vectors.numpy()),
        "numbers_per_token": likelihood.ratio(vectors * width, split.lengths),
        "nats_per_token": likelihood.ratio(measured.kl.sum(1), split.lengths),
        "participation_ratio": participation_ratio(centred(point, valid)[0]),
    }
    if valid.shape[1] > 1:
        rows = point.unflatten(1, (-1, width))[valid]
        ratio = participation_ratio(rows, valid.nonzero()[:, 0])
        found["participation_ratio_vector"] = ratio
    values = {name: value for name, (value, _) in found.items()}
    return {**values, "se": {name: error for name, (_, error) in found.items()}}


def importance_weighted(log_weights: Tensor, split: TokenizedSplit) -> dict[str, Any]:
    """Computes the metrics of the importance-weighted bound, for `add`.

    Args:
        log_weights: (k, N), of the sentences of the split.
    """
    nll = -likelihood.importance_weighted_bound(log_weights)
    size = likelihood.effective_sample_size(log_weights)
    values, se = likelihood.means({"nll_iw": nll, "iw_ess": size})
    units, units_se = likelihood.per_unit(nll, split, "_iw")
    counts = {"iw_samples": len(log_weights), "iw_ess_min": float(size.min())}
    return {**values, **counts, **units, "se": se | units_se}


def against_entropy(metrics: dict[str, Any], entropy: float | None, unk: int) -> dict[str, float]:
    """Compares a model with the entropy of the corpus; empty if it is not known.

    Args:
        metrics: of `summarize`.
        entropy: of whole sentences, in nats. It does not hold for truncated sentences or
            with unknown pieces.
        unk: the number of unknown pieces.
    """
    if entropy is None or metrics["truncated"] or unk:
        return {}
    return {"entropy": entropy, "above_entropy": -metrics["elbo"] - entropy}


def warnings_of(metrics: dict[str, Any], measured: Measured, unk: int = 0) -> list[str]:
    """Writes down what a reader of the numbers must know, one sentence each.

    Args:
        metrics: of `summarize`, with those of `importance_weighted` if they are known.
        unk: the number of unknown pieces.
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
    if gain <= 3 * error:  # false for NaN, if there is no other text
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
    if unk > 0.01 * metrics["tokens"]:
        warnings.append(
            f"{unk / metrics['tokens']:.1%} of the tokens are unknown pieces: "
            f"likelihoods are too good"
        )
    if metrics["truncated"] > 0.01 * metrics["sentences"]:
        share = metrics["truncated"] / metrics["sentences"]
        warnings.append(f"{share:.1%} of the sentences are truncated: give a larger max_tokens")
    return warnings


def _sample(split: TokenizedSplit, count: int) -> TokenizedSplit:
    """Draws `count` random sentences of a split, the same at every call; all if it has
    no more."""
    if len(split) <= count:
        return split
    rng = np.random.default_rng(EVALUATION_SEED)
    return split.select(np.sort(rng.choice(len(split), count, replace=False)))


def another_sentence(
    text_keys: NDArray[np.uint64], content_keys: NDArray[np.uint64]
) -> Tensor | None:
    """Finds for each of N sentences one with another text, (N,); None if all texts are
    equal. The order of the sentences does not matter.

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
