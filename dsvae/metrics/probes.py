"""Probes: how well a label of the sentence can be predicted from its latent."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dsvae.errors import UserError

FOLDS = 5
NEIGHBORS = 10
ITERATIONS = 1000


def probe(
    means: NDArray[np.floating],
    draws: NDArray[np.floating],
    labels: NDArray[np.str_],
    groups: NDArray[np.uint64],
    seed: int,
) -> dict[str, Any]:
    """Measures the accuracy of a linear and of a nearest-neighbour probe on held-out
    sentences, beside the majority baseline and chance.

    Every sentence is held out once, in five stratified folds. Equal sentences are in the
    same fold, so that no probe is tested on what it was trained on. Features are
    standardized by the training folds. The linear probe is a logistic regression (L2,
    C = 1). The other probe takes the 10 nearest training sentences by Euclidean distance.
    The baseline answers the commonest label of the training folds.

    Args:
        means, draws: (N, Z), the mean and one draw of q(z|x) per sentence. A mean can be
            read however wide its posterior is; a draw shows what is left of it in z.
        labels: (N,), any strings. A label of fewer than five different sentences is left
            out with its sentences.
        groups: (N,), equal for equal sentences.
        seed: of the folds and of the permutation, not negative.

    Returns: `linear`, `knn` and `majority`, accuracies in [0, 1]; `linear_draws` and
        `knn_draws`, those of the draws; `linear_chance` and `knn_chance`, those of the
        means of other sentences; `se`, the standard errors sqrt(p (1 - p) / n) of all;
        `classes`, `sentences` and `left_out`, what they were measured on.

    Raises:
        UserError: fewer than two labels that five different sentences have.
    """
    # The folds follow the order of the rows, which must not be that of the file.
    order = np.lexsort((labels, groups))
    means, draws = means[order].astype(np.float64), draws[order].astype(np.float64)
    labels, groups = labels[order], groups[order]
    common = usable_labels(zip(labels.tolist(), groups.tolist(), strict=True), "the labels")
    keep = np.isin(labels, common)
    means, draws, labels, groups = means[keep], draws[keep], labels[keep], groups[keep]
    # scikit-learn takes no larger seed
    folds = StratifiedGroupKFold(n_splits=FOLDS, shuffle=True, random_state=seed % 2**32)
    splits = list(folds.split(means, labels, groups))
    neighbors = min(NEIGHBORS, min(len(train) for train, _ in splits))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))
    knn = make_pipeline(StandardScaler(), KNeighborsClassifier(n_neighbors=neighbors))
    count = len(labels)
    permuted = means[np.random.default_rng(seed).permutation(count)]
    accuracies: dict[str, float] = {}
    se = {}
    for name, model, features in (
        ("linear", linear, means),
        ("linear_draws", linear, draws),
        ("linear_chance", linear, permuted),
        ("knn", knn, means),
        ("knn_draws", knn, draws),
        ("knn_chance", knn, permuted),
        ("majority", DummyClassifier(strategy="most_frequent"), means),
    ):
        with warnings.catch_warnings():
            # A longer fit would not change the accuracy.
            warnings.simplefilter("ignore", ConvergenceWarning)
            accuracy = float(
                (cross_val_predict(model, features, labels, cv=splits) == labels).mean()
            )
        accuracies[name], se[name] = accuracy, math.sqrt(accuracy * (1 - accuracy) / count)
    return {
        **accuracies,
        "classes": len(common),
        "sentences": count,
        "left_out": len(keep) - count,
        "se": se,
    }


def usable_labels(pairs: Iterable[tuple[str, Hashable]], where: str) -> list[str]:
    """Finds the labels of `pairs` (label, sentence) that at least five different
    sentences have, so that every fold can hold out one.

    Raises:
        UserError: fewer than two such labels; `where` names them.
    """
    counts = Counter(label for label, _ in set(pairs))
    common = [label for label, count in counts.items() if count >= FOLDS]
    if len(common) < 2:
        raise UserError(
            f"{where}: {len(common)} of {len(counts)} different labels have {FOLDS} different "
            "sentences or more; a probe needs two such labels"
        )
    return common
