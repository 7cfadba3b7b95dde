"""How well clusters of sentences agree with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Names = Sequence[str] | NDArray[Any]
"""One label or cluster per sentence, (N,): strings or numbers."""


def of_clusters(labels: Names, clusters: Names, seed: int) -> dict[str, Any]:
    """Measures the agreement of clusters with labels, beside two clusterings that read
    nothing.

    Args:
        labels: of N sentences, the class of each.
        clusters: the cluster of each.
        seed: of the random clusters, not negative.

    Returns: what `agreement` gives, and the same under `one_cluster`, where all sentences
        are in one cluster, and under `random`, where the clusters have the sizes of
        these and their sentences are drawn at random; `classes`, `clusters` and
        `sentences`, how many there are.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    shuffled = np.random.default_rng(seed).permutation(clusters)
    return {
        **agreement(labels, clusters),
        "one_cluster": agreement(labels, np.zeros(len(labels), dtype=np.int64)),
        "random": agreement(labels, shuffled),
        "classes": len(np.unique(labels)),
        "clusters": len(np.unique(clusters)),
        "sentences": len(labels),
    }


def agreement(labels: Names, clusters: Names) -> dict[str, Any]:
    """Measures the agreement of a clustering with the labels.

    Returns:
        b3_precision, b3_recall, b3_f1: `b_cubed`, in [0, 1].
        homogeneity, completeness, v_measure: 1 - H(label | cluster) / H(label), the same
            with label and cluster exchanged, and their harmonic mean (Rosenberg &
            Hirschberg 2007), in [0, 1].
        ari: the adjusted Rand index (Hubert & Arabie 1985), at most 1; 0 in expectation
            for random clusters of the same sizes.
        se: standard errors over sentences of the first three.
    """
    # It takes two of the nine seconds of CPU that a training needs to start.
    from sklearn.metrics import adjusted_rand_score, homogeneity_completeness_v_measure

    scores = b_cubed(labels, clusters)
    homogeneity, completeness, v_measure = homogeneity_completeness_v_measure(labels, clusters)
    return {
        **scores,
        "homogeneity": float(homogeneity),
        "completeness": float(completeness),
        "v_measure": float(v_measure),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def b_cubed(labels: Names, clusters: Names) -> dict[str, Any]:
    """Computes B-cubed precision, recall and F1 (Bagga & Baldwin 1998), with standard
    errors under `se`.

    The precision of a sentence is the share of the sentences of its cluster, itself
    included, that have its label. Its recall is the share of the sentences of its label
    that are in its cluster. Both are averaged over the N sentences, and F1 is the harmonic
    mean of the two averages. With n_kc sentences of label c in cluster k,

        P = (1/N) sum_kc n_kc^2 / n_k.,    R = (1/N) sum_kc n_kc^2 / n_.c

    so nothing larger than the table of labels and clusters is ever in memory. The errors
    take the clusters as given; that of F1 is by linearization.
    """
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, clusters, sparse=True).tocoo()
    count = table.data.astype(np.float64)
    of_label = np.bincount(table.row, count)[table.row]
    of_cluster = np.bincount(table.col, count)[table.col]
    precisions, recalls = count / of_cluster, count / of_label  # of each sentence of a cell
    sentences = count.sum()
    precision = float(count @ precisions / sentences)
    recall = float(count @ recalls / sentences)
    f1 = 2 * precision * recall / (precision + recall)

    def error(values: NDArray[np.float64]) -> float:
        if sentences < 2:
            return float("nan")
        mean = count @ values / sentences
        return float(np.sqrt(count @ (values - mean) ** 2 / (sentences - 1) / sentences))

    slope = 2 / (precision + recall) ** 2
    return {
        "b3_precision": precision,
        "b3_recall": recall,
        "b3_f1": f1,
        "se": {
            "b3_precision": error(precisions),
            "b3_recall": error(recalls),
            "b3_f1": error(slope * (recall**2 * precisions + precision**2 * recalls)),
        },
    }
