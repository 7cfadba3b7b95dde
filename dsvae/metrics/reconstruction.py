"""Greedy decoding of z, how alike sentences and their reconstructions are, and how much
noise on z the decoder bears."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae.data.batches import row_lengths
from dsvae.data.noise import PRIOR, ROOM
from dsvae.data.tokenization import TokenizedSplit
from dsvae.inference.passes import Encoded, Passes, Rows, by_rows, texts_of
from dsvae.metrics import likelihood
from dsvae.metrics.evaluate import EVALUATION_SEED, Measured
from dsvae.metrics.information import centred
from dsvae.metrics.labelled import add
from dsvae.modeling.families import masked

NOISE = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Lengths of the noise on z, in standard deviations of z, from 0 to 1."""
SHORTEST = 8
"""Tokens of the shortest group of lengths. The next ones end at twice as many each."""

_BLEU = BLEU(effective_order=True, force=True)
"""For its counts of n-grams alone. `force` silences a warning about text that is already
tokenized, `effective_order` one about single sentences."""


def generate(
    passes: Passes, latent: Tensor, max_tokens: int, split: TokenizedSplit | None = None
) -> list[Rows]:
    """Decodes z (N, Z) greedily: token ids (T_i,), which end with EOS if it came
    within `max_tokens`. Collective.

    Args:
        split: the N sentences that z stands for, which have the conditions of a
            conditional model.
    """
    conditions, lengths = None, np.ones(len(latent), dtype=np.int32)
    if split is not None:
        lengths = split.lengths
        if passes.model.config.conditional:
            conditions = split.conditions(range(len(split)))
            lengths = row_lengths(split, "condition")
    return passes.generate(
        latent,
        conditions,
        # Few rows wait for the longest. A text may become as long as `max_tokens`.
        np.maximum(lengths, max_tokens // 4),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
    )


def samples(
    passes: Passes,
    split: TokenizedSplit,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_tokens: int,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Decodes greedily: (sentence, reconstruction from the posterior mean) of the
    sentences `rows` of a split, and as many sentences with z from the prior.
    Collective.

    A language model has no z and so a single greedy sentence: it gets that sentence and
    no pairs. With conditions, each sentence is decoded for its own, which stands before
    those of the prior.

    Args:
        encoded: of all sentences of the split.
    """
    config = passes.model.config
    if not config.has_latent and not config.conditional:
        rows = rows[:1]
    if not len(rows):
        return [], []
    keys = [(0, key) for key in split.content_keys[rows].tolist()]
    noise = passes.noise(EVALUATION_SEED, PRIOR, keys)
    drawn = by_rows(passes.family, encoded.prior)(rows).sample(noise)
    own = rows if config.has_latent else rows[:0]
    latent = torch.cat([encoded.posterior.point[own], drawn])
    conditions = split.select([*own, *rows]) if config.conditional else None
    decoded = texts_of(generate(passes, latent, max_tokens, conditions), tokenizer)
    from_prior = decoded[len(own) :]
    if conditions is not None:
        names = texts_of(split.conditions(rows) or [], tokenizer)
        from_prior = [f"{name} -> {text}" for name, text in zip(names, from_prior, strict=True)]
    originals = texts_of(split.rows(own), tokenizer)
    return list(zip(originals, decoded[: len(own)], strict=True)), from_prior


@dataclass(frozen=True)
class Recovered:
    """What came back of N sentences, one row per sentence."""

    exact: Tensor
    """(N,) bool: whether the text is the same, where a run of white space counts as one
    space."""
    right: Tensor
    """(N,), tokens that are at their place in the reconstruction, EOS included."""
    places: NDArray[np.int64]
    """(N,), tokens of the longer of the two texts."""
    right_forced: Tensor
    """(N,), tokens that are the likeliest ones, given z and the sentence's own tokens
    before them."""
    lengths: NDArray[np.int32]
    """(N,), tokens of the sentences."""
    ngrams: NDArray[np.int64]
    """(N, 10), what corpus BLEU sums over sentences: n-grams that match (n = 1 ... 4),
    n-grams of the reconstruction, and the words of reconstruction and sentence."""

    @staticmethod
    def of(
        split: TokenizedSplit,
        references: Sequence[str],
        decoded: Sequence[Rows],
        texts: Sequence[str],
        right_forced: Tensor,
    ) -> Recovered:
        """Compares N sentences, as tokens and as the user wrote them, with their
        reconstructions, as tokens (T_i,) and as texts."""
        pairs = list(zip(split.rows(np.arange(len(split))), decoded, strict=True))
        counts = [
            _BLEU.sentence_score(text, [reference])
            for text, reference in zip(texts, references, strict=True)
        ]
        return Recovered(
            torch.tensor([a.split() == b.split() for a, b in zip(references, texts, strict=True)]),
            torch.tensor([sum(map(eq, a.tolist(), b.tolist())) for a, b in pairs]),
            np.array([max(len(a), len(b)) for a, b in pairs]),
            right_forced,
            split.lengths,
            np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in counts]),
        )

    def scores(self, rows: Any = slice(None)) -> tuple[dict[str, float], dict[str, float]]:
        """Computes the scores of some of the sentences and their standard errors, by
        name."""
        bleu, influence = corpus_bleu(self.ngrams[rows])
        found = {
            "exact_match": likelihood.mean(self.exact[rows]),
            "token_accuracy_forced": likelihood.ratio(self.right_forced[rows], self.lengths[rows]),
            "token_accuracy_free": likelihood.ratio(self.right[rows], self.places[rows]),
            "bleu": (bleu, _error(influence)),
        }
        return {n: value for n, (value, _) in found.items()}, {n: e for n, (_, e) in found.items()}


def corpus_bleu(ngrams: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
    """Computes corpus BLEU (Papineni et al. 2002) from 0 to 100, as sacrebleu does, and
    what each sentence adds to it.

    Args:
        ngrams: (N, 10), as in `Recovered`.

    Returns: BLEU, and its linearization (N,), whose sum is 0: the derivative by the
        weight of each sentence.
    """
    matches, totals, (words, wanted) = np.split(ngrams.sum(0), [4, 8])
    counts = matches.tolist(), totals.tolist(), int(words), int(wanted)
    bleu = BLEU.compute_bleu(*counts, smooth_method="exp").score
    # log BLEU = mean_n log(matches_n / totals_n) + min(0, 1 - wanted / words)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(ngrams / ngrams.sum(0))
        influence = (share[:, :4] - share[:, 4:8]).mean(1)
        if words < wanted:
            influence += np.nan_to_num(wanted / words) * (share[:, 8] - share[:, 9])
    return bleu, bleu * influence


def _error(influence: NDArray[np.float64]) -> float:
    """Computes a standard error by linearization, from what each of N sentences adds;
    NaN for one sentence."""
    count = len(influence)
    if count < 2:
        return math.nan
    return math.sqrt(float(np.square(influence).sum()) * count / (count - 1))


def fidelity(
    passes: Passes,
    split: TokenizedSplit,
    measured: Measured,
    rows: Rows,
    references: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    noise_sentences: int = 0,
    seed: int = EVALUATION_SEED,
) -> dict[str, Any]:
    """Decodes the posterior means of sentences greedily and compares; returns the
    metrics of `compare`, and those of `noise_curve` if it has sentences. Collective.

    Args:
        measured: of all sentences of the split.
        rows: (n,), which sentences.
        references: their texts as the user wrote them. Decoding their tokens instead
            would count an unknown piece as recovered.
        noise_sentences: how many of them `noise_curve` uses; 0: none.
        seed: of the noise.
    """
    part = split if len(rows) == len(split) else split.select(rows)
    point, right = measured.posterior.point[rows], measured.right[rows]
    decoded = generate(passes, point, max_tokens, part)
    found = passes.world.run_on_rank0(lambda: compare(part, references, decoded, tokenizer, right))
    if noise_sentences:
        chosen = np.sort(np.argsort(split.content_keys[rows])[:noise_sentences])
        keys = split.content_keys[rows[chosen]].tolist()
        width = passes.family.latent_width
        noise = passes.noise(seed, ROOM, ((0, key) for key in keys), width)
        noise *= centred(measured.draws, measured.valid)[1].float()
        add(
            found,
            noise_curve(
                passes,
                part.select(chosen),
                point[chosen],
                masked(noise, measured.valid[rows[chosen]]),
                [references[i] for i in chosen],
                tokenizer,
                max_tokens,
                f"noise of seed {seed}",
            ),
        )
    return found


def compare(
    split: TokenizedSplit,
    references: Sequence[str],
    decoded: Sequence[Rows],
    tokenizer: PreTrainedTokenizerBase,
    right_forced: Tensor,
) -> dict[str, Any]:
    """Measures how alike sentences and their reconstructions are.

    Args:
        references: the N sentences as the user wrote them.
        decoded: N reconstructions as token ids, (T_i,).
        right_forced: (N,), as in `Recovered`.

    Returns:
        exact_match: share of the sentences whose reconstruction has the same text.
        token_accuracy_free: share of the positions of the longer of the two texts (EOS
            included) that have the same token in both. There is no alignment: one
            inserted word makes all tokens after it wrong.
        bleu, chrf: corpus scores from 0 to 100 of the texts (sacrebleu, Post 2018),
            with their signatures.
        by_length: the scores of `Recovered`, and `sentences`, of each group of lengths:
            name -> "9-16" -> value.
        se: their standard errors over sentences; chrf has none.
    """
    texts = texts_of(decoded, tokenizer)
    found = Recovered.of(split, references, decoded, texts, right_forced)
    values, se = found.scores()
    # That of all sentences is known, of which these may be a part.
    for each in (values, se):
        del each["token_accuracy_forced"]
    bleu, chrf = BLEU(force=True), CHRF()
    bleu.corpus_score(texts[:1], [references[:1]])  # the signature has the references
    groups = _by_length(split.lengths)
    by_length, errors = _columns({name: found.scores(rows) for name, rows in groups.items()})
    by_length["sentences"] = {name: len(rows) for name, rows in groups.items()}
    return {
        **values,
        "chrf": chrf.corpus_score(texts, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "by_length": by_length,
        "se": {**se, "by_length": errors},
    }


def noise_curve(
    passes: Passes,
    split: TokenizedSplit,
    point: Tensor,
    noise: Tensor,
    references: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    name: str,
) -> dict[str, Any]:
    """Measures what comes back from z + s * noise, for each s of `NOISE`. Collective.

    Args:
        point: (N, Z), the z of the sentences without noise.
        noise: (N, Z), of s = 1.
        name: of this noise.

    Returns:
        noise: the scores of `Recovered`: name -> "0.3" -> value.
        bleu_area: the mean of BLEU over s from 0 to 1, the area under its curve by the
            trapezoid rule.
        noise_sentences: N.
        se: their standard errors over sentences.
    """
    world, found = passes.world, {}
    influences: list[NDArray[np.float64]] = []
    for s in NOISE:
        z = point + s * noise

        def given(rows: Rows, z: Tensor = z) -> tuple[Tensor, Tensor]:
            return z[rows], torch.zeros(len(rows), 0)

        right = passes.decode(split, given, f"{name}, length {s}", count_right=True).right
        decoded = generate(passes, z, max_tokens, split)

        def scored(decoded: list[Rows] = decoded, right: Tensor = right) -> Any:
            texts = texts_of(decoded, tokenizer)
            each = Recovered.of(split, references, decoded, texts, right)
            return each.scores(), corpus_bleu(each.ngrams)[1]

        found[f"{s:g}"], influence = world.run_on_rank0(scored)
        influences.append(influence)
    curves, errors = _columns(found)
    steps = np.diff(NOISE)
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2
    return {
        "noise": curves,
        "bleu_area": float(weights @ np.array(list(curves["bleu"].values()))),
        "noise_sentences": len(split),
        "se": {"noise": errors, "bleu_area": _error(weights @ np.array(influences))},
    }


def _by_length(lengths: NDArray[np.int32]) -> dict[str, Rows]:
    """Groups sentences by their tokens: up to `SHORTEST`, up to twice as many, and so
    on. Returns the name of each group that has some, such as 9-16, and their places."""
    group = np.ceil(np.log2(np.maximum(lengths, SHORTEST) / SHORTEST)).astype(np.int64)
    found = {}
    for number in np.unique(group).tolist():
        most = SHORTEST << number
        found[f"{most // 2 + 1 if number else 1}-{most}"] = np.flatnonzero(group == number)
    return found


def _columns(
    scores: dict[str, tuple[dict[str, float], dict[str, float]]],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Turns (values, errors) by row into values and errors by name, and then by row."""

    def column(side: int) -> dict[str, dict[str, float]]:
        names: Iterable[str] = next(iter(scores.values()))[side]
        return {name: {row: both[side][name] for row, both in scores.items()} for name in names}

    return column(0), column(1)
