"""Does each unit of z stand for one factor of variation? Scores against the true
factors of a corpus that has them.

Codes are posterior means or draws (N, U * C): U units with C columns each. A unit is one
number (C = 1) or a categorical variable as a one-hot vector of its C values. Factors are
indices of values (N, K). All scores lie between 0 (nothing) and 1, up to noise. The
estimators are those of Locatello et al. 2019 (Challenging Common Assumptions) unless a
function says otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

BINS = 20
"""Equal-width bins of a number, for its mutual information."""
HELD_OUT = 0.25
TREES = 50
LEAF = 5
PAIRS = 64
"""Pairs of sentences whose mean is one point of the z-diff classifier."""
POINTS = 2_000
"""Points of the z-diff classifier, for training and held out together."""
REPEATS = 5
"""Repeats of the z-diff metric: a single one varies by 0.07 with its seed."""

Codes = NDArray[np.floating]
Factors = NDArray[np.integer]


def disentanglement(
    means: Codes, draws: Codes, factors: Factors, names: list[str], seed: int, columns: int = 1
) -> dict[str, Any]:
    """Scores posterior means, of one draw of q(z|x) per sentence, and chance.

    Means show what a posterior points at, however wide it is. Draws show how much of that
    is left in z. Chance is the score of the means beside the factors of other sentences.

    Args:
        means, draws: (N, U * C), U >= 1.
        factors: (N, K), each column with at least two values.
        names: of the K factors.
        seed: of the permutation, and as in `scores`; not negative.
        columns: C, the columns per unit.

    Returns: `scores` of the means, with those of the draws and of chance under `draws`
        and `chance`.
    """
    others = np.random.default_rng(seed).permutation(len(factors))
    return {
        **scores(means, factors, names, seed, columns),
        "draws": scores(draws, factors, names, seed, columns),
        "chance": scores(means, factors[others], names, seed, columns),
    }


def scores(
    codes: Codes, factors: Factors, names: list[str], seed: int, columns: int = 1
) -> dict[str, Any]:
    """Computes mig, dci_disentanglement, dci_completeness, dci_informativeness, z_diff
    and sap.

    Args:
        codes: (N, U * C), U >= 1.
        factors, names, columns: as in `disentanglement`.
        seed: of held-out splits, forests and pairs.

    Returns: the scores; `se`, the standard error of z_diff over its repeats;
        `per_factor`: for every factor its MIG gap, SAP gap, completeness,
        informativeness; `information` and `importance`, (U, K).
    """
    information = mutual_information_matrix(codes, factors, columns)
    mig = mig_gaps(information, factors)
    train, test = _split(len(codes), seed)
    importance, accuracy = _importance(codes, factors, train, test, seed, columns)
    completeness = dci_completeness_per_factor(importance)
    sap = gaps(sap_scores(codes, factors, train, test, columns))
    difference, error = z_diff(codes, factors, seed, columns)
    return {
        "mig": float(mig.mean()),
        "dci_disentanglement": dci_disentanglement(importance),
        "dci_completeness": float(completeness.mean()),
        "dci_informativeness": float(accuracy.mean()),
        "z_diff": difference,
        "sap": float(sap.mean()),
        "se": {"z_diff": error},
        "per_factor": {
            name: {
                "mig_gap": float(mig[k]),
                "sap_gap": float(sap[k]),
                "completeness": float(completeness[k]),
                "informativeness": float(accuracy[k]),
            }
            for k, name in enumerate(names)
        },
        "information": information.tolist(),
        "importance": importance.tolist(),
    }


def mutual_information_matrix(
    codes: Codes, factors: Factors, columns: int = 1
) -> NDArray[np.float64]:
    """Computes I(z_i; v_k) in nats, (U, K), by counting: of numbers in 20 equal-width
    bins, of categories as they are."""
    if columns > 1:
        binned = _blocks(codes, columns).argmax(-1).T
    else:
        binned = np.stack([np.digitize(c, np.histogram_bin_edges(c, BINS)[:-1]) for c in codes.T])
    return np.array([[mutual_info_score(v, c) for v in factors.T] for c in binned])


def mig_gaps(information: NDArray[np.float64], factors: Factors) -> NDArray[np.float64]:
    """Computes (I(z_1st; v_k) - I(z_2nd; v_k)) / H(v_k) of every factor, (K,); their
    mean is the mutual information gap (Chen et al. 2018).

    A single unit has no second one: its gap is its whole information.
    """
    entropy = np.array([mutual_info_score(v, v) for v in factors.T])
    return gaps(information) / entropy


def dci_disentanglement(importance: NDArray[np.float64]) -> float:
    """Computes sum_i rho_i (1 - H_K(P_i)) of the importance (U, K) of unit i for factor
    k (Eastwood & Williams 2018).

    P_i is the importance of unit i as a distribution over the K factors, H_K its
    entropy to the base K, rho_i its share of all.
    """
    if importance.sum() == 0:
        return 0.0
    return float((importance.sum(1) / importance.sum() * (1 - _entropy(importance))).sum())


def dci_completeness_per_factor(importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes 1 - H_U(P_k) of every factor, (K,): P_k is the importance of the U units
    for factor k (Eastwood & Williams 2018)."""
    return 1 - _entropy(importance.T)


def z_diff(codes: Codes, factors: Factors, seed: int, columns: int = 1) -> tuple[float, float]:
    """Computes the beta-VAE metric (Higgins et al. 2017): held-out accuracy of a linear
    classifier that tells which factor two sentences share, from the mean |z - z'| of 64
    pairs that share it and are random otherwise. Chance is 1/K. Of categories, |z - z'|
    is 1 if they differ and 0 if they are equal.

    Returns: the mean of five repeats with other pairs, and its standard error. The
        error is that of the choice of pairs; the sentences stay the same.
    """
    rng = np.random.default_rng(seed)
    train, test = _split(POINTS, seed)
    accuracy = []
    for _ in range(REPEATS):
        factor_of_point = rng.integers(factors.shape[1], size=POINTS)
        points = np.empty((POINTS, codes.shape[1] // columns))
        for k, values in enumerate(factors.T):
            rows = np.flatnonzero(factor_of_point == k)
            points[rows] = _differences(codes, values, len(rows), rng, columns)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(points[train], factor_of_point[train])
        accuracy.append(model.score(points[test], factor_of_point[test]))
    return float(np.mean(accuracy)), float(np.std(accuracy, ddof=1) / np.sqrt(REPEATS))


def _differences(
    codes: Codes, values: NDArray[np.integer], count: int, rng: np.random.Generator, columns: int
) -> NDArray[np.floating]:
    """Draws (count, U): the mean |z - z'| of 64 pairs of sentences that share a value.
    Each value comes as often as the corpus has it."""
    _, value, sizes = np.unique(values, return_inverse=True, return_counts=True)
    members = np.argsort(value, kind="stable")  # the sentences of each value in a row
    starts = np.cumsum(sizes) - sizes
    one = rng.integers(len(values), size=(count, PAIRS))
    group = value[one]
    other = members[starts[group] + rng.integers(sizes[group])]
    return _blocks(np.abs(codes[one] - codes[other]), columns).max(-1).mean(1)


def sap_scores(
    codes: Codes,
    factors: Factors,
    train: NDArray[np.intp],
    test: NDArray[np.intp],
    columns: int = 1,
) -> NDArray[np.float64]:
    """Measures how well one unit alone tells the value of one factor, (U, K): held-out
    balanced accuracy of a decision tree on that unit (Kumar et al. 2018, for
    categorical factors), rescaled so that chance is 0 and perfection 1."""
    units = _blocks(codes, columns)
    scores = np.zeros((units.shape[1], factors.shape[1]))
    for k, values in enumerate(factors.T):
        count = len(np.unique(values))
        tree = DecisionTreeClassifier(
            max_leaf_nodes=max(4 * count, columns),  # at least one per category
            min_samples_leaf=LEAF,
            class_weight="balanced",
            random_state=0,
        )
        for i in range(units.shape[1]):
            tree.fit(units[train, i], values[train])
            accuracy = balanced_accuracy_score(values[test], tree.predict(units[test, i]))
            scores[i, k] = max(0.0, (accuracy - 1 / count) / (1 - 1 / count))
    return scores


def gaps(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the best minus the second-best of the scores (U, K) of every factor,
    (K,); of `sap_scores` their mean is the separated attribute predictability."""
    ordered = np.sort(scores, axis=0)[::-1]
    return ordered[0] - ordered[1] if len(ordered) > 1 else ordered[0]


def _importance(
    codes: Codes,
    factors: Factors,
    train: NDArray[np.intp],
    test: NDArray[np.intp],
    seed: int,
    columns: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns importances (U, K) and held-out accuracies (K,) of random forests that
    predict each factor from all units (a choice of the DCI paper). The importance of a
    category is the sum over its columns."""
    importance, accuracy = [], []
    state = seed % 2**32  # scikit-learn takes no more
    for values in factors.T:
        forest = RandomForestClassifier(
            TREES, min_samples_leaf=LEAF, max_features=None, max_samples=0.5, random_state=state
        )
        forest.fit(codes[train], values[train])
        importance.append(_blocks(forest.feature_importances_, columns).sum(-1))
        accuracy.append(forest.score(codes[test], values[test]))
    return np.stack(importance, 1), np.array(accuracy)


def _blocks(codes: NDArray[Any], columns: int) -> NDArray[Any]:
    """Returns (..., U * C) as (..., U, C)."""
    return codes.reshape(*codes.shape[:-1], -1, columns)


def _split(count: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, int(count * HELD_OUT))
    return order[held_out:], order[:held_out]


def _entropy(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the entropy of every row as a distribution, to the base of its length,
    from 0 to 1. It is 1 for a row of zeros, which says nothing."""
    count = rows.shape[1]
    if count == 1:
        return np.zeros(len(rows))
    total = rows.sum(1, keepdims=True)
    p = np.divide(rows, total, out=np.full_like(rows, 1 / count), where=total > 0)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1) / np.log(count)
