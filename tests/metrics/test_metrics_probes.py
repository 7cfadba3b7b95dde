"""Probes on labels that can be read, and on labels that cannot."""

import numpy as np
import pytest

from dsvae.errors import UserError
from dsvae.metrics import probes

N = 600


def probe(features, labels, groups, seed):
    """The probe of posteriors without a width, whose draw is the mean."""
    return probes.probe(features, features, labels, groups, seed)


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(N, 4))


GROUPS = np.arange(N, dtype=np.uint64)


def test_a_linear_label_is_read(features):
    labels = np.where(features[:, 1] > 0, "good", "bad")
    found = probe(features * [1, 100, 1, 1], labels, GROUPS, seed=0)
    assert found["linear"] > 0.97
    assert found["knn"] > 0.8
    assert found["majority"] == pytest.approx(
        max((labels == "good").mean(), (labels == "bad").mean()), abs=0.01
    )
    assert found["se"]["majority"] == pytest.approx(np.sqrt(0.25 / N), rel=0.05)
    assert (found["classes"], found["sentences"], found["left_out"]) == (2, N, 0)


def test_a_label_that_is_not_there_is_not_read(features):
    labels = np.random.default_rng(1).choice(["a", "b", "b"], size=N)
    found = probe(features, labels, GROUPS, seed=0)
    assert found["linear"] < found["majority"] + 3 * found["se"]["linear"]


def test_a_draw_does_not_hold_what_is_lost_in_the_width_of_the_posterior(features):
    """Means times 0.01 with unit variance have 0.0002 nats of KL."""
    labels = np.where(features[:, 1] > 0, "good", "bad")
    draws = 0.01 * features + np.random.default_rng(5).normal(size=features.shape)
    found = probes.probe(0.01 * features, draws, labels, GROUPS, seed=0)
    assert found["linear"] > 0.97
    for name in ("linear_draws", "knn_draws", "linear_chance", "knn_chance"):
        assert found[name] == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / N)), name
        assert found["se"][name] == pytest.approx(np.sqrt(0.25 / N), rel=0.05)


def test_a_ring_is_for_the_neighbours(features):
    ring = features[:, :2]
    found = probe(ring, np.where(np.linalg.norm(ring, axis=1) > 1.2, "out", "in"), GROUPS, seed=0)
    assert found["knn"] > 0.9 > found["linear"]


def test_equal_sentences_are_never_asked_and_trained_on(features):
    """Every sentence comes three times with a random label. A neighbour that is the
    sentence itself would know it."""
    labels = np.random.default_rng(1).choice(["a", "b"], size=N // 3)
    found = probe(
        np.repeat(features[: N // 3], 3, 0),
        np.repeat(labels, 3),
        np.repeat(GROUPS[: N // 3], 3),
        seed=0,
    )
    assert abs(found["knn"] - 0.5) < 0.15


def test_any_order_gives_the_same(features):
    labels = np.where(features[:, 1] + features[:, 0] ** 2 > 0.5, "good", "bad")
    order = np.random.default_rng(2).permutation(N)
    assert probe(features, labels, GROUPS, 0) == probe(
        features[order], labels[order], GROUPS[order], 0
    )


def test_rare_labels_are_left_out_and_counted(features):
    labels = np.array(["a", "b"] * (N // 2 - 2) + ["rare"] * 4)
    assert probe(features, labels, GROUPS, 0)["left_out"] == 4


@pytest.mark.parametrize("labels", [["a"] * N, [str(i) for i in range(N)], ["a"] * (N - 1) + ["b"]])
def test_labels_that_cannot_be_probed(features, labels):
    with pytest.raises(UserError, match="two"):
        probe(features, np.array(labels), GROUPS, 0)
