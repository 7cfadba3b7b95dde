"""Clusters against known values and a brute force over all pairs of sentences."""

import math

import numpy as np
import pytest

from dsvae.metrics.clustering import agreement, b_cubed, of_clusters

LABELS = [0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 4, 1, 1, 1]
CLUSTERS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]


def test_the_known_example():
    found = agreement(LABELS, CLUSTERS)
    expected = {
        "b3_precision": 0.5986,
        "b3_recall": 0.6952,
        "b3_f1": 0.6433,
        "homogeneity": 0.4498,
        "completeness": 0.5636,
        "v_measure": 0.5003,
        "ari": 0.2471,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=5e-5)


def by_pairs(labels, clusters):
    """Precision and recall of each sentence, from N x N comparisons."""
    same_label = np.equal.outer(labels, labels)
    same_cluster = np.equal.outer(clusters, clusters)
    both = (same_label & same_cluster).sum(1)
    return both / same_cluster.sum(1), both / same_label.sum(1)


@pytest.mark.parametrize("seed", range(4))
def test_random_clusters_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    labels = np.array(list("abcdefg"))[rng.integers(0, 7, 200)]
    clusters = np.where(rng.random(200) < 0.5, np.unique(labels, return_inverse=True)[1], 9)
    clusters = np.where(rng.random(200) < 0.3, rng.integers(0, 30, 200), clusters)
    precision, recall = by_pairs(labels, clusters)
    p, r = precision.mean(), recall.mean()
    found = b_cubed(labels, clusters)
    assert found["b3_precision"] == pytest.approx(p)
    assert found["b3_recall"] == pytest.approx(r)
    assert found["b3_f1"] == pytest.approx(2 / (1 / p + 1 / r))
    errors = found["se"]
    assert errors["b3_precision"] == pytest.approx(precision.std(ddof=1) / math.sqrt(200))
    assert errors["b3_recall"] == pytest.approx(recall.std(ddof=1) / math.sqrt(200))
    # The slopes of F1 by differences.
    step = 1e-6
    slopes = [
        (2 / (1 / (p + step) + 1 / r) - 2 / (1 / (p - step) + 1 / r)) / (2 * step),
        (2 / (1 / p + 1 / (r + step)) - 2 / (1 / p + 1 / (r - step))) / (2 * step),
    ]
    linear = slopes[0] * precision + slopes[1] * recall
    assert errors["b3_f1"] == pytest.approx(linear.std(ddof=1) / math.sqrt(200), rel=1e-5)


def test_the_rows_that_read_nothing():
    labels = np.repeat(np.arange(8), 50)
    found = of_clusters(labels, labels, seed=0)
    assert (found["b3_f1"], found["v_measure"], found["ari"]) == (1, 1, 1)
    one = found["one_cluster"]
    assert (one["b3_precision"], one["b3_recall"]) == (pytest.approx(0.125), pytest.approx(1))
    assert one["b3_f1"] == pytest.approx(0.2222, abs=5e-5)
    assert (one["v_measure"], one["ari"]) == (pytest.approx(0), pytest.approx(0))
    # A sentence, and 49 of the 399 others at random.
    share = (1 + 49 * 49 / 399) / 50
    assert found["random"]["b3_precision"] == pytest.approx(share, abs=0.02)
    assert found["random"]["ari"] == pytest.approx(0, abs=0.02)
    assert (found["classes"], found["clusters"], found["sentences"]) == (8, 8, 400)


def test_random_clusters_keep_their_sizes_and_follow_the_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dsvae.metrics.clustering.agreement", lambda labels, clusters: seen.append(clusters) or {}
    )
    for seed in (0, 0, 1):
        of_clusters(LABELS, CLUSTERS, seed)
    random = seen[2::3]
    assert [sorted(each.tolist()) for each in random] == [sorted(CLUSTERS)] * 3
    assert (random[0] == random[1]).all()
    assert (random[0] != random[2]).any()


def test_one_sentence_has_no_error():
    assert math.isnan(b_cubed(["a"], [3])["se"]["b3_f1"])
