"""What a model says with z from the prior: how different its sentences are, and whether
they say what their condition says.

Decoding is greedy, so that only z varies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import PreTrainedTokenizerBase

from dsvae.data import grammar
from dsvae.data.grammar_variants import parse_condition
from dsvae.data.noise import PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.inference.passes import Passes, by_rows, texts_of
from dsvae.metrics import likelihood
from dsvae.metrics.diversity import of_conditions, of_outputs
from dsvae.metrics.reconstruction import generate
from dsvae.modeling.families import Distribution

OUTPUTS = 500
"""Sentences of a model that reads no condition."""
CONDITIONS = 200
"""The largest number of conditions that a model generates sentences for."""
DRAWS = 10
"""Draws of z per condition."""
REFERENCES = 100
"""The largest number of texts of a condition that outputs are compared with."""
CLASSES = 20
"""The largest number of different conditions that a classifier tells apart."""


def decode_prior(
    passes: Passes, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int
) -> list[str]:
    """Generates `OUTPUTS` greedy sentences with z from the fixed prior. Collective."""
    noise = passes.noise(seed, PRIOR, ((0, number) for number in range(OUTPUTS)))
    latent = passes.family.prior().sample(noise)
    return texts_of(generate(passes, latent, max_tokens), tokenizer)


def of_prior(outputs: Sequence[str], seed: int) -> dict[str, Any]:
    """Computes the metrics of `decode_prior`'s sentences."""
    return {"outputs": len(outputs), **of_outputs(outputs, seed)}


@dataclass(frozen=True)
class Conditions:
    """The different conditions of N records, in an order that does not depend on that
    of the records."""

    rows: list[NDArray[np.int64]]
    """Of each condition, its records, in the order of their content keys."""

    @staticmethod
    def of(split: TokenizedSplit) -> Conditions:
        """Finds the conditions of a split that has conditions. The hash of their tokens
        orders them, so the first ones are a random choice."""
        hashes = split.condition_hashes
        assert hashes is not None
        order = np.lexsort((split.content_keys, hashes))
        return Conditions(np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1))

    @property
    def chosen(self) -> list[NDArray[np.int64]]:
        """Those that sentences are generated for."""
        return self.rows[:CONDITIONS]


def decode_conditions(
    passes: Passes,
    split: TokenizedSplit,
    prior: Distribution,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int,
) -> list[list[str]]:
    """Generates `DRAWS` greedy sentences for each of the chosen `Conditions` of a
    split, with z from the condition's prior. Collective.

    A model without a latent has one sentence per condition, which stands for all draws.

    Args:
        prior: of each sentence of the split, or one for all.
    """
    hashes = split.condition_hashes
    assert hashes is not None
    first = np.array([rows[0] for rows in Conditions.of(split).chosen])
    draws = DRAWS if passes.model.config.has_latent else 1
    each = np.repeat(first, draws)
    keys = [(i % draws, key) for i, key in enumerate(hashes[each].tolist())]
    latent = by_rows(passes.family, prior)(each).sample(passes.noise(seed, PRIOR, keys))
    decoded = texts_of(generate(passes, latent, max_tokens, split.select(each)), tokenizer)
    outputs = [decoded[i : i + draws] for i in range(0, len(decoded), draws)]
    return [texts * (DRAWS // draws) for texts in outputs]


def of_conditional(
    outputs: Sequence[Sequence[str]],
    split: TokenizedSplit,
    records: Sequence[str],
    conditions: Sequence[str],
) -> dict[str, Any]:
    """Computes the metrics of `decode_conditions`' sentences.

    Args:
        records, conditions: the N texts of the split and their conditions as text.

    Returns: those of `of_conditions` against at most `REFERENCES` texts of each
        condition, those of `adherence`, and the numbers `conditions` and `outputs`.
    """
    every = Conditions.of(split)
    references = [[records[i] for i in rows[:REFERENCES]] for rows in every.chosen]
    names = [conditions[rows[0]] for rows in every.rows]
    found = {
        "conditions": len(outputs),
        "outputs": sum(map(len, outputs)),
        **of_conditions(outputs, references),
    }
    wanted = [parse_condition(name) for name in names]
    if all(each is not None for each in wanted):
        pairs = [each for each in wanted if each is not None]
        more = of_pairs(outputs, pairs[: len(outputs)])
    elif 2 <= len(names) <= CLASSES:
        number = np.empty(len(split), dtype=np.int64)
        for i, rows in enumerate(every.rows):
            number[rows] = i
        # Equal texts have equal keys, so none is on both sides.
        more = of_classifier(outputs, records, number, split.text_keys % np.uint64(2) == 0)
    else:
        reason = f"neither pairs of the built-in corpus nor 2 to {CLASSES} different conditions"
        more = {"adherence": math.nan, "se": {}, "undefined": {"adherence": reason}}
    return {**found, **more, "se": found["se"] | more["se"]}


def of_pairs(outputs: Sequence[Sequence[str]], wanted: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Measures how well sentences follow the conditions of `grammar_variants.paired`.

    Args:
        outputs: of each condition, its sentences.
        wanted: subject, verb and object of each condition.

    Returns:
        adherence: share of the outputs that are sentences of the grammar with the
            subject, the verb and the object of their condition.
        triples: different choices of tense, polarity and sentence type among the outputs
            of a condition that are sentences of the grammar, mean over the conditions.
        se: standard errors over conditions.
    """
    shares, triples = [], []
    for sentences, factors in zip(outputs, wanted, strict=True):
        parsed = [grammar.parse(sentence) for sentence in sentences]
        good = [each for each in parsed if each is not None]
        shares.append(sum(factors.items() <= each.items() for each in good) / len(sentences))
        seen = {(each["tense"], each["polarity"], each["sentence_type"]) for each in good}
        triples.append(len(seen))
    found = {"adherence": torch.tensor(shares), "triples": torch.tensor(triples)}
    values, se = likelihood.means(found)
    return {**values, "se": se}


def of_classifier(
    outputs: Sequence[Sequence[str]],
    records: Sequence[str],
    conditions: NDArray[np.int64],
    training: NDArray[np.bool_],
) -> dict[str, Any]:
    """Measures how often a classifier that knows only the data finds the condition of
    an output.

    It is a logistic regression (L2, C = 1) on the TF-IDF of words and pairs of words.

    Args:
        outputs: of condition i = 0 ... C - 1, its sentences.
        records: N texts.
        conditions: (N,), the number of the condition of each text.
        training: (N,), which of them the classifier learns from.

    Returns:
        adherence: share of the outputs that it assigns to their condition. NaN if a
            condition is missing on one of the two sides of the data.
        adherence_classifier: its accuracy on the other texts.
        se: standard errors over outputs and over texts.
    """
    sides = (conditions[training], conditions[~training])
    if any(len(np.unique(side)) < len(outputs) for side in sides):
        names = ("adherence", "adherence_classifier")
        reason = "too few texts of a condition to fit a classifier and to test it"
        return {
            **dict.fromkeys(names, math.nan),
            "se": {},
            "undefined": dict.fromkeys(names, reason),
        }
    classifier = make_pipeline(
        # words and marks, words of one letter too
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]"),
        LogisticRegression(max_iter=1000),
    )
    # The order of the rows must not be that of the file.
    order = sorted(np.flatnonzero(training).tolist(), key=lambda i: (records[i], conditions[i]))
    classifier.fit([records[i] for i in order], conditions[order])
    other = np.flatnonzero(~training)
    right = classifier.predict([records[i] for i in other.tolist()]) == conditions[other]
    own = np.repeat(np.arange(len(outputs)), [len(each) for each in outputs])
    followed = classifier.predict([text for each in outputs for text in each]) == own
    found = {"adherence": followed, "adherence_classifier": right}
    values, se = likelihood.means({name: torch.from_numpy(row) for name, row in found.items()})
    return {**values, "se": se}
