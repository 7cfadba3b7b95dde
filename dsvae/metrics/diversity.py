"""How different generated texts are, and how much of what was said in answer they
cover.

N-grams are those of whitespace words. BLEU is the sentence BLEU of sacrebleu (Post 2018)
on them, from 0 to 100, up to 4-grams, without further tokenization. Its smoothing is
`exp`, NIST's: the k-th order in which nothing matches counts 2^-k matches. This is method
3 of NLTK, with one difference. A text of fewer than four words is scored by the orders
that it has (`effective_order`), where NLTK gives the missing orders 2^-k. Without a common
word BLEU is 0.

Diversity depends on how tokens are chosen: sampling tokens adds to what z varies. Whoever
reports these numbers says it. All of them also depend on the number of outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

from dsvae.metrics import likelihood

SELF_BLEU_OUTPUTS = 500
"""Outputs that self-BLEU is measured on: it grows with their number."""

ORDER = 4
"""The largest number of words of an n-gram of BLEU."""

_BLEU = BLEU(tokenize="none", smooth_method="exp", effective_order=True, force=True)


def of_outputs(outputs: Sequence[str], seed: int) -> dict[str, Any]:
    """Measures the diversity of outputs that belong to no condition.

    Args:
        outputs: generated texts.
        seed: of the choice of `SELF_BLEU_OUTPUTS` among them, if there are more.

    Returns:
        distinct_1, distinct_2: `distinct` of all outputs.
        self_bleu, self_bleu_max, self_bleu_min: of the chosen ones, each against all
            others as references: mean, largest and smallest. NaN for one output.
        self_bleu_outputs: how many were chosen.
        se: the standard error of self_bleu over the outputs. They are references of
            each other, so it is an approximation.
    """
    chosen = list(outputs)
    if len(chosen) > SELF_BLEU_OUTPUTS:
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(chosen), SELF_BLEU_OUTPUTS, replace=False))
        chosen = [chosen[row] for row in rows]
    scores = self_bleu(chosen)
    average, error = _mean(scores)
    return {
        "distinct_1": distinct(outputs, 1),
        "distinct_2": distinct(outputs, 2),
        "self_bleu": average,
        "self_bleu_max": max(scores, default=math.nan),
        "self_bleu_min": min(scores, default=math.nan),
        "self_bleu_outputs": len(chosen),
        "se": {"self_bleu": error},
    }


def of_conditions(
    outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]] | None = None
) -> dict[str, Any]:
    """Measures the diversity of several outputs per condition, and how well they match
    what the data have for it.

    Args:
        outputs: of each of C conditions, its generated texts.
        references: of each condition, its texts in the data, one or more.

    Returns: all but the first two are means over conditions, with standard errors over
        conditions under `se`. A condition for which a number is undefined is left out of
        its mean.
        distinct_1, distinct_2: `distinct` of the outputs of all conditions together.
        distinct_1_within, distinct_2_within: of the outputs of one condition.
        self_bleu_within, self_bleu_within_max, self_bleu_within_min: of the outputs of
            one condition, each against its others: mean, largest and smallest.
        bleu_max, bleu_mean, bleu_min: with `references`, the largest, mean and smallest
            BLEU of the outputs, each against all references of the condition at once.
        bleu_precision, bleu_recall: with `references`, the BLEU of an output and its
            closest single reference, mean over the outputs; and of a reference and its
            closest output, mean over the references (Zhao et al. 2017).
    """
    pooled = [text for texts in outputs for text in texts]
    found: dict[str, list[float]] = {
        "distinct_1_within": [distinct(texts, 1) for texts in outputs],
        "distinct_2_within": [distinct(texts, 2) for texts in outputs],
    }
    own = [self_bleu(texts) or [math.nan] for texts in outputs]
    found["self_bleu_within"] = [float(np.mean(scores)) for scores in own]
    found["self_bleu_within_max"] = [max(scores) for scores in own]
    found["self_bleu_within_min"] = [min(scores) for scores in own]
    if references is not None:
        pairs = list(zip(outputs, references, strict=True))
        joint = [[bleu(text, data) for text in texts] for texts, data in pairs]
        found["bleu_max"] = [max(scores) for scores in joint]
        found["bleu_mean"] = [float(np.mean(scores)) for scores in joint]
        found["bleu_min"] = [min(scores) for scores in joint]
        single = [_table(texts, data) for texts, data in pairs]
        found["bleu_precision"] = [float(table.max(1).mean()) for table in single]
        found["bleu_recall"] = [float(table.max(0).mean()) for table in single]
    means = {name: _mean(values) for name, values in found.items()}
    return {
        "distinct_1": distinct(pooled, 1),
        "distinct_2": distinct(pooled, 2),
        **{name: average for name, (average, _) in means.items()},
        "se": {name: error for name, (_, error) in means.items()},
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Computes different n-grams / n-grams of all texts together (Li et al. 2016); NaN
    if no text has n words.

    It is not a mean over texts, and falls with their number.
    """
    grams = [gram for text in texts for gram in words_in_a_row(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def words_in_a_row(text: str, n: int) -> list[tuple[str, ...]]:
    """Returns the n-grams of a text; none if it has fewer words."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def self_bleu(texts: Sequence[str]) -> list[float]:
    """Computes the BLEU of each text with all others as references (Zhu et al. 2018),
    from 0 to 100: lower is more diverse. No scores for fewer than two texts."""
    if len(texts) < 2:
        return []
    # BLEU of `bleu`, from the counts of all texts at once: what matches of an n-gram is at
    # most its largest count in another text.
    counts = [_ngrams(text.split()) for text in texts]
    lengths = sorted(len(text.split()) for text in texts)
    largest: dict[tuple[str, ...], list[int]] = {}
    for each in counts:
        for gram, count in each.items():
            largest[gram] = sorted((*largest.get(gram, (0, 0)), count))[-2:]
    return [
        _self_bleu(text.split(), each, largest, lengths)
        for text, each in zip(texts, counts, strict=True)
    ]


def _self_bleu(
    words: list[str],
    counts: Counter[tuple[str, ...]],
    largest: dict[tuple[str, ...], list[int]],
    lengths: list[int],
) -> float:
    """Computes the BLEU of one of several texts against the others.

    Args:
        counts: of its n-grams.
        largest: of each n-gram, the second largest and the largest count in a text.
        lengths: of all texts, in words.
    """
    correct = [0] * ORDER
    for gram, count in counts.items():
        second, first = largest[gram]
        correct[len(gram) - 1] += min(count, second if count == first else first)
    total = [max(0, len(words) - n) for n in range(ORDER)]
    others = list(lengths)
    others.remove(len(words))
    closest = min(others, key=lambda length: (abs(length - len(words)), length))
    return BLEU.compute_bleu(
        correct, total, len(words), closest, smooth_method="exp", effective_order=True
    ).score


def _ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    """Counts how often each n-gram of up to `ORDER` words occurs."""
    return Counter(
        tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1)
    )


def bleu(text: str, references: Sequence[str]) -> float:
    """Computes the sentence BLEU of a text against its references, as above, from 0 to
    100."""
    return _BLEU.sentence_score(text, references).score


def _table(texts: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Computes the BLEU of each text against each single reference, (texts,
    references)."""
    return np.array([[bleu(text, [reference]) for reference in references] for text in texts])


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Computes the mean of the values that are defined and its standard error; NaN for
    none."""
    defined = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    return likelihood.mean(defined) if len(defined) else (math.nan, math.nan)
