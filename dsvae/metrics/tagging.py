"""How well predicted tags and classes agree with those of the data.

A standard error is over sentences and by linearization, since precision, recall and F1 are
ratios of sums over sentences: sentences are independent, not their entities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Entity = tuple[str, int, int]
"""Type, first word, and the word after the last."""


def of_entities(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Computes precision, recall and F1 of entities: one is right if its type, its
    first and its last word are.

    This is the `strict` mode of seqeval with IOB2: an `I-type` that does not continue an
    entity of its type is part of none. As there, a ratio is 0 if its denominator is;
    but all are NaN if there is no entity on either side.

    Args:
        true, predicted: of each of N sentences, a tag per word: `O`, `B-type`, `I-type`.

    Returns:
        entity_precision, entity_recall, entity_f1: over all entities, in [0, 1].
        entities, entities_predicted: how many there are.
        entity_types: of each type, `precision`, `recall`, `f1`, and the numbers `true`
            and `predicted`.
        se: the standard errors of the first three.

    Raises:
        ValueError: the number of sentences, or of the tags of one, differs.
    """
    if any(len(a) != len(b) for a, b in zip(true, predicted, strict=True)):
        raise ValueError("a sentence has another number of predicted tags than of true ones")
    wanted, found = [set(entities(tags)) for tags in true], [set(entities(t)) for t in predicted]
    kinds = sorted({kind for each in (*wanted, *found) for kind, _, _ in each})
    types = {kind: _scores(_counts(wanted, found, kind))[0] for kind in kinds}
    scores, errors = _scores(_counts(wanted, found, None))
    ratios = ("precision", "recall", "f1")
    return {
        **{f"entity_{name}": scores[name] for name in ratios},
        "entities": int(scores["true"]),
        "entities_predicted": int(scores["predicted"]),
        "entity_types": types,
        "se": {f"entity_{name}": errors[name] for name in ratios},
    }


def entities(tags: Sequence[str]) -> list[Entity]:
    """Finds the entities of one sentence in IOB2, from its first word to its last.

    An entity is a `B-type` and all `I-type` that follow it without a gap.
    """
    found: list[Entity] = []
    open_until = -1  # the word at which the last entity may still continue
    for i, tag in enumerate(tags):
        if tag.startswith("B-"):
            found.append((tag[2:], i, i + 1))
            open_until = i + 1
        elif tag.startswith("I-") and open_until == i and found[-1][0] == tag[2:]:
            found[-1] = (*found[-1][:2], i + 1)
            open_until = i + 1
    return found


def of_classes(
    true: Sequence[str], predicted: Sequence[str], positive: str | None = None
) -> dict[str, Any]:
    """Measures how often the class of a sentence is right.

    Args:
        true, predicted: of each of N sentences, its class.
        positive: the class whose F1 is asked for.

    Returns:
        class_accuracy: share of the sentences with the right class.
        class_majority: the same, if every sentence got the commonest class.
        class_macro_f1: mean over the classes of `true` and `predicted` of their F1; a
            class that is never right has F1 0.
        class_f1: F1 of `positive`, if given; NaN if no sentence has it on either side.
        se: standard errors of all.
    """
    # As in clustering.py: training does not wait for scikit-learn.
    from sklearn.metrics import f1_score

    labels, answers = np.asarray(true), np.asarray(predicted)
    commonest = Counter(true).most_common(1)[0][0]
    found = {
        "class_accuracy": float((labels == answers).mean()),
        "class_majority": float((labels == commonest).mean()),
        "class_macro_f1": float(f1_score(labels, answers, average="macro", zero_division=0)),
    }
    classes = np.unique(np.concatenate([labels, answers]))
    parts = [_f1_residuals(labels == name, answers == name) for name in classes]
    se = {
        "class_accuracy": _error((labels == answers) - found["class_accuracy"]),
        "class_majority": _error((labels == commonest) - found["class_majority"]),
        "class_macro_f1": _error(np.mean(parts, axis=0)),
    }
    if positive is not None:
        if positive in classes:
            (score,) = f1_score(labels, answers, labels=[positive], average=None, zero_division=0)
            found["class_f1"] = float(score)
            se["class_f1"] = _error(_f1_residuals(labels == positive, answers == positive))
        else:
            found["class_f1"] = se["class_f1"] = math.nan
    return {**found, "se": se}


def _counts(
    wanted: list[set[Entity]], found: list[set[Entity]], kind: str | None
) -> NDArray[np.float64]:
    """Counts right, predicted and true entities of a type (None: of all) per sentence,
    (3, N)."""

    def count(each: set[Entity]) -> int:
        return sum(kind is None or entity[0] == kind for entity in each)

    rows = [(count(a & b), count(b), count(a)) for a, b in zip(wanted, found, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, 3).T


def _scores(counts: NDArray[np.float64]) -> tuple[dict[str, float], dict[str, float]]:
    """Computes precision, recall, F1 and the numbers of entities, and the standard
    errors of the first three, from `_counts`."""
    right, predicted, true = counts
    scores, errors = {}, {}
    if not (predicted + true).any():
        scores = errors = dict.fromkeys(("precision", "recall", "f1"), math.nan)
    else:
        for name, values, units in (
            ("precision", right, predicted),
            ("recall", right, true),
            ("f1", 2 * right, predicted + true),
        ):
            scores[name] = float(values.sum() / units.sum()) if units.any() else 0.0
            errors[name] = _error(_residuals(values, units)) if units.any() else math.nan
    return {**scores, "true": float(true.sum()), "predicted": float(predicted.sum())}, errors


def _f1_residuals(true: NDArray[np.bool_], answers: NDArray[np.bool_]) -> NDArray[np.floating]:
    return _residuals(2.0 * (true & answers), true.astype(np.float64) + answers)


def _residuals(values: NDArray[np.floating], units: NDArray[np.floating]) -> NDArray[np.floating]:
    """Computes what each of N sentences adds to sum(values) / sum(units), to first
    order, times N: their mean is 0."""
    return (values - values.sum() / units.sum() * units) / units.mean()


def _error(residuals: NDArray[np.floating]) -> float:
    """Computes the standard error of a mean whose N terms have these residuals; NaN for
    N = 1."""
    count = len(residuals)
    if count < 2:
        return math.nan
    return math.sqrt(float(np.square(residuals).sum()) / (count - 1) / count)
