"""Diversity against counts by hand, and BLEU from its formula with fractions."""

import math
from collections import Counter

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from dsvae.data.grammar import generate
from dsvae.metrics import diversity
from dsvae.metrics.diversity import bleu, distinct, of_conditions, of_outputs, self_bleu

WORDS = ["a", "b", "c", "d", "e"]


def by_formula(text, references):
    """BLEU (Papineni et al. 2002) with method 3 of Chen & Cherry 2014, as NLTK has it, but
    for the orders that the text is too short for."""
    words = text.split()
    others = [reference.split() for reference in references]
    logs, k = [], 0
    for n in range(1, min(4, len(words)) + 1):
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        most = Counter()
        for other in others:
            most |= Counter(zip(*(other[i:] for i in range(n)), strict=False))
        matches = sum((grams & most).values())
        if n == 1 and matches == 0:
            return 0.0
        if matches == 0:
            k += 1
            matches = 2.0**-k
        logs.append(math.log(matches / (len(words) - n + 1)))
    if not logs:
        return 0.0
    closest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    brevity = min(1.0, math.exp(1 - closest / len(words)))
    return 100 * brevity * math.exp(sum(logs) / len(logs))


def random_texts(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def test_distinct_by_hand():
    assert distinct(["a b a", "b a"], 1) == 2 / 5
    assert distinct(["a b a", "b a"], 2) == 2 / 3  # a b, b a, b a: none across texts
    assert math.isnan(distinct(["a", ""], 2))


def test_bleu_is_its_formula_with_the_smoothing_that_is_described():
    texts = random_texts(40, seed=0)
    for i in range(0, 40, 4):
        text, *references = texts[i : i + 4]
        assert bleu(text, references) == pytest.approx(by_formula(text, references), abs=1e-9)
    assert bleu("a b c d", ["e f g h"]) == 0
    assert bleu("", ["a b"]) == 0
    # 1-grams 4/4, 2-grams 1/3; 3-grams 1/2 of a match of 2, 4-grams 1/4 of one of 1.
    expected = 100 * (1 * (1 / 3) * (1 / 4) * (1 / 4)) ** 0.25
    assert bleu("b a d c", ["a d b c"]) == pytest.approx(expected)


def test_self_bleu_is_the_corpus_bleu_of_each_text_alone():
    """Without smoothing and with long common texts, sentence and corpus BLEU agree."""
    texts = [drawn.text for drawn in generate(30, seed=1)]
    texts = [f"{text} {texts[0]}" for text in texts]
    corpus = BLEU(tokenize="none", smooth_method="none", force=True)
    for i, score in enumerate(self_bleu(texts)):
        others = texts[:i] + texts[i + 1 :]
        expected = corpus.corpus_score([texts[i]], [[other] for other in others]).score
        assert score == pytest.approx(expected)


def test_self_bleu_at_its_ends():
    same = of_outputs(["a b c d e"] * 4, seed=0)
    assert (same["self_bleu"], same["self_bleu_max"], same["self_bleu_min"]) == (
        pytest.approx(100),
    ) * 3
    assert same["se"]["self_bleu"] == pytest.approx(0, abs=1e-6)
    assert same["distinct_1"] == 5 / 20
    different = of_outputs(["a b", "c d", "e f"], seed=0)
    assert (different["self_bleu"], different["distinct_1"], different["distinct_2"]) == (0, 1, 1)
    alone = of_outputs(["a b"], seed=0)
    assert math.isnan(alone["self_bleu"])
    assert math.isnan(alone["se"]["self_bleu"])


def test_self_bleu_takes_a_fixed_number_of_outputs_chosen_by_the_seed(monkeypatch):
    monkeypatch.setattr(diversity, "SELF_BLEU_OUTPUTS", 6)
    texts = random_texts(40, seed=2)
    first = of_outputs(texts, seed=3)
    assert first["self_bleu_outputs"] == 6
    assert first == of_outputs(texts, seed=3)
    assert first["self_bleu"] != of_outputs(texts, seed=4)["self_bleu"]
    assert first["distinct_2"] == distinct(texts, 2)  # of all
    few = random_texts(6, seed=5)
    scores = np.array([by_formula(few[i], few[:i] + few[i + 1 :]) for i in range(6)])
    found = of_outputs(few, seed=0)
    assert found["self_bleu"] == pytest.approx(scores.mean(), rel=1e-5)
    assert found["self_bleu_max"] == pytest.approx(scores.max())
    assert found["self_bleu_min"] == pytest.approx(scores.min())
    assert found["se"]["self_bleu"] == pytest.approx(scores.std(ddof=1) / math.sqrt(6), rel=1e-5)


def test_outputs_per_condition_by_hand():
    outputs = [["a b c d", "a b c d", "w x y z"], ["p q r s", "t u v w", "t u v w"]]
    references = [["a b c d", "k l m n"], ["p q r s", "t u v w"]]
    found = of_conditions(outputs, references)
    expected = {
        "distinct_1": 15 / 24,
        "distinct_2": 12 / 18,
        "distinct_1_within": 8 / 12,
        "distinct_2_within": 6 / 9,
        "self_bleu_within": 200 / 3,
        "self_bleu_within_max": 100,
        "self_bleu_within_min": 0,
        "bleu_max": 100,
        "bleu_mean": (200 / 3 + 100) / 2,
        "bleu_min": 50,  # 0 and 100
        "bleu_precision": (200 / 3 + 100) / 2,
        "bleu_recall": (50 + 100) / 2,
    }
    errors = found.pop("se")
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(errors) == set(expected) - {"distinct_1", "distinct_2"}
    assert errors["bleu_recall"] == pytest.approx(25)  # half the distance of two numbers
    assert errors["bleu_max"] == pytest.approx(0, abs=1e-5)


def test_one_reference_makes_recall_the_best_and_precision_the_mean():
    outputs = [random_texts(5, seed=i) for i in range(6)]
    references = [random_texts(1, seed=10 + i) for i in range(6)]
    found = of_conditions(outputs, references)
    assert found["bleu_recall"] == pytest.approx(found["bleu_max"])
    assert found["bleu_precision"] == pytest.approx(found["bleu_mean"])


def test_a_condition_with_one_output_has_no_self_bleu():
    found = of_conditions([["a b c d"], ["a b c d", "a b c d"]])
    assert found["self_bleu_within"] == pytest.approx(100)
    assert "bleu_max" not in found
    assert math.isnan(of_conditions([["a b"]])["self_bleu_within"])
