"""Tags against seqeval in strict mode, classes against counts, errors against a bootstrap."""

import math

import numpy as np
import pytest
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from dsvae.metrics.tagging import entities, of_classes, of_entities

TAGS = ["O", "B-PROF", "I-PROF", "B-OBJ", "I-OBJ"]


def test_entities_by_hand():
    tags = ["B-X", "I-X", "O", "I-X", "B-X", "B-Y", "I-X", "I-Y", "I-Y", "B-Y"]
    assert entities(tags) == [("X", 0, 2), ("X", 4, 5), ("Y", 5, 6), ("Y", 9, 10)]
    assert entities(["I-X", "I-X"]) == entities([]) == []


def test_strict_means_type_and_both_ends():
    true = [["B-X", "I-X", "O"], ["B-Y", "O", "B-X"]]
    predicted = [["B-X", "O", "O"], ["B-X", "O", "B-X"]]
    found = of_entities(true, predicted)
    assert found["entity_precision"] == found["entity_recall"] == found["entity_f1"] == 1 / 3
    assert (found["entities"], found["entities_predicted"]) == (3, 3)
    assert found["entity_types"] == {
        "X": {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "true": 2, "predicted": 3},
        "Y": {"precision": 0, "recall": 0, "f1": 0, "true": 1, "predicted": 0},
    }


def random_tags(seed, count=60):
    """Tags of sentences of 1 to 12 words, and others that differ in some places, most of
    them impossible in IOB2 somewhere."""
    rng = np.random.default_rng(seed)
    true, predicted = [], []
    for _ in range(count):
        tags = rng.choice(TAGS, rng.integers(1, 13), p=[0.3, 0.2, 0.2, 0.15, 0.15])
        other = rng.choice(TAGS, len(tags))
        true.append(tags.tolist())
        predicted.append(np.where(rng.random(len(tags)) < 0.2, other, tags).tolist())
    return true, predicted


@pytest.mark.parametrize("seed", range(5))
def test_random_tags_score_as_in_seqeval(seed):
    true, predicted = random_tags(seed)
    expected = classification_report(
        true, predicted, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
    )
    found = of_entities(true, predicted)
    micro = expected["micro avg"]
    assert found["entity_precision"] == pytest.approx(micro["precision"])
    assert found["entity_recall"] == pytest.approx(micro["recall"])
    assert found["entity_f1"] == pytest.approx(micro["f1-score"])
    assert found["entities"] == micro["support"]
    for kind in ("PROF", "OBJ"):
        own = found["entity_types"][kind]
        assert own["precision"] == pytest.approx(expected[kind]["precision"])
        assert own["recall"] == pytest.approx(expected[kind]["recall"])
        assert own["f1"] == pytest.approx(expected[kind]["f1-score"])
        assert own["true"] == expected[kind]["support"]


def bootstrap(score, count, names):
    """Standard deviations of scores of sentences that are drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = [score(rng.integers(0, count, count)) for _ in range(400)]
    return {name: np.std([each[name] for each in drawn]) for name in names}


def test_the_errors_of_entities_are_those_of_a_bootstrap():
    true, predicted = random_tags(seed=9, count=150)
    names = ("entity_precision", "entity_recall", "entity_f1")
    expected = bootstrap(
        lambda rows: of_entities([true[i] for i in rows], [predicted[i] for i in rows]), 150, names
    )
    assert of_entities(true, predicted)["se"] == pytest.approx(expected, rel=0.15)


def test_nothing_to_find():
    empty = of_entities([["O", "O"]], [["O", "I-X"]])
    assert math.isnan(empty["entity_f1"])
    assert empty["entity_types"] == {}
    none = of_entities([["O", "B-X"]], [["O", "O"]])
    assert (none["entity_precision"], none["entity_recall"], none["entity_f1"]) == (0, 0, 0)
    assert math.isnan(none["se"]["entity_precision"])
    with pytest.raises(ValueError, match="number of predicted tags"):
        of_entities([["O", "O"]], [["O"]])


def test_classes_by_hand():
    true = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "a", "d"]
    found = of_classes(true, predicted, positive="a")
    assert found["class_accuracy"] == pytest.approx(3 / 6)
    assert found["class_majority"] == pytest.approx(3 / 6)
    assert found["class_f1"] == pytest.approx(4 / 6)
    assert found["class_macro_f1"] == pytest.approx((4 / 6 + 2 / 4 + 0 + 0) / 4)
    assert found["se"]["class_accuracy"] == pytest.approx(math.sqrt(0.25 / 5))
    assert "class_f1" not in of_classes(true, predicted)
    assert math.isnan(of_classes(true, predicted, positive="e")["class_f1"])


def test_the_errors_of_classes_are_those_of_a_bootstrap():
    rng = np.random.default_rng(1)
    true = rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    predicted = np.where(rng.random(300) < 0.3, rng.choice(["a", "b", "c"], 300), true)
    names = ("class_accuracy", "class_majority", "class_macro_f1", "class_f1")

    def score(rows):
        return of_classes(true[rows].tolist(), predicted[rows].tolist(), positive="b")

    found = score(np.arange(300))["se"]
    assert found == pytest.approx(bootstrap(score, 300, names), rel=0.15)
