"""The built-in corpus: right English, independent factors, one sentence a
combination."""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter

import pytest

from dsvae.data import grammar
from dsvae.data.grammar import FACTORS, generate, sentence
from dsvae.data.grammar_variants import write_variant
from dsvae.errors import UserError

NAMES = tuple(FACTORS)


def build(**changes: str | int) -> str:
    base = {
        "sentence_type": "statement",
        "tense": "past",
        "polarity": "affirmative",
        "subject_number": "singular",
        "subject": "child",
        "verb": "buy",
        "object_number": "singular",
        "adjective": "old",
        "object": "knife",
    }
    return sentence(base | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "The child bought an old knife."),
        ({"subject_number": "plural"}, "The children bought an old knife."),
        ({"tense": "present"}, "The child buys an old knife."),
        ({"tense": "present", "subject_number": "plural"}, "The children buy an old knife."),
        ({"tense": "future"}, "The child will buy an old knife."),
        ({"polarity": "negative"}, "The child did not buy an old knife."),
        ({"polarity": "negative", "tense": "present"}, "The child does not buy an old knife."),
        (
            {"polarity": "negative", "tense": "present", "subject_number": "plural"},
            "The children do not buy an old knife.",
        ),
        ({"polarity": "negative", "tense": "future"}, "The child will not buy an old knife."),
        ({"sentence_type": "question"}, "Did the child buy an old knife?"),
        ({"sentence_type": "question", "tense": "present"}, "Does the child buy an old knife?"),
        (
            {"sentence_type": "question", "tense": "present", "subject_number": "plural"},
            "Do the children buy an old knife?",
        ),
        ({"sentence_type": "question", "tense": "future"}, "Will the child buy an old knife?"),
        (
            {"sentence_type": "question", "polarity": "negative"},
            "Did the child not buy an old knife?",
        ),
        (
            {"sentence_type": "question", "polarity": "negative", "tense": "future"},
            "Will the child not buy an old knife?",
        ),
        (
            {"sentence_type": "exclamation", "polarity": "negative"},
            "The child did not buy an old knife!",
        ),
        ({"sentence_type": "exclamation", "tense": "present"}, "The child buys an old knife!"),
        ({"object_number": "plural"}, "The child bought old knives."),
        ({"adjective": "useful"}, "The child bought a useful knife."),
        ({"adjective": "ugly", "object": "umbrella"}, "The child bought an ugly umbrella."),
        ({"adjective": "red", "object": "egg"}, "The child bought a red egg."),
        ({"verb": "carry", "tense": "present"}, "The child carries an old knife."),
        ({"verb": "carry"}, "The child carried an old knife."),
        (
            {"verb": "catch", "tense": "present", "object": "leaf", "object_number": "plural"},
            "The child catches old leaves.",
        ),
        (
            {"subject": "thief", "subject_number": "plural", "verb": "hide"},
            "The thieves hid an old knife.",
        ),
        (
            {"subject": "woman", "subject_number": "plural", "verb": "choose"},
            "The women chose an old knife.",
        ),
        ({"verb": 0, "tense": 1}, "The child admires an old knife."),
    ],
)
def test_english(changes, expected):
    assert build(**changes) == expected


def test_irregular_past_tenses():
    admire_to_find = [
        "admired",
        "broke",
        "brought",
        "bought",
        "carried",
        "caught",
        "chose",
        "drew",
        "found",
    ]
    hide_to_wash = ["hid", "kept", "lost", "sold", "stole", "threw", "washed"]
    assert [
        build(verb=verb).split()[2] for verb in FACTORS["verb"]
    ] == admire_to_find + hide_to_wash


def test_injective():
    # All 3.5 million would take too long: every combination of the small factors with
    # each word of the large ones once, and a large sample of everything. The large
    # factors share no word: none can stand in for another.
    large = ("subject", "verb", "adjective", "object")
    words = [word for name in large for word in FACTORS[name]]
    assert len(set(words)) == len(words)
    small = [name for name in NAMES if name not in large]
    varied = {(("subject", 0),)} | {
        ((name, index),) for name in large for index in range(1, len(FACTORS[name]))
    }
    choices = [
        dict.fromkeys(large, 0) | dict(zip(small, indices, strict=True)) | dict(one)
        for indices in itertools.product(*(range(len(FACTORS[name])) for name in small))
        for one in varied
    ]
    assert len({sentence(choice) for choice in choices}) == len(choices) > 1000
    drawn = generate(30_000, seed=3)
    assert len({item.text for item in drawn}) == len({item.factors for item in drawn}) > 29_000


def test_entropy():
    """The factors are independent and uniform, and no two choices give one sentence: the
    entropies of the factors add up."""
    found = sum(math.log(len(values)) for values in FACTORS.values())
    assert found == pytest.approx(grammar.ENTROPY)
    assert found == pytest.approx(15.079, abs=5e-4)


def test_generate_is_deterministic_and_a_prefix():
    assert generate(50, seed=7) == generate(200, seed=7)[:50]
    assert generate(50, seed=7) != generate(50, seed=8)
    assert generate(0, seed=0) == []
    assert len(generate(5, seed=-(2**80))) == 5
    for item in generate(50, seed=7):
        assert sentence(dict(zip(NAMES, item.factors, strict=True))) == item.text
    # A change here changes every user's corpus and every number measured on it.
    assert generate(1, seed=0)[0].text == "The neighbors will not steal blue rings."


def test_factors_are_uniform_and_independent():
    drawn = [item.factors for item in generate(20_000, seed=0)]
    for axis, name in enumerate(NAMES):
        _assert_uniform(Counter(row[axis] for row in drawn), len(FACTORS[name]))
    for first, second in itertools.combinations(range(len(NAMES)), 2):
        cells = len(FACTORS[NAMES[first]]) * len(FACTORS[NAMES[second]])
        _assert_uniform(Counter((row[first], row[second]) for row in drawn), cells)


def _assert_uniform(counts: Counter, cells: int) -> None:
    """Pearson's chi-square within five standard deviations of its mean; a dependence
    would be hundreds away."""
    expected = counts.total() / cells
    statistic = (
        sum((count - expected) ** 2 for count in counts.values()) / expected
        + (cells - len(counts)) * expected
    )
    degrees = cells - 1
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5, (statistic, degrees)


@pytest.mark.parametrize(
    "bad", [{"tense": "pluperfect"}, {"tense": 3}, {"tense": -1}, {"mood": "happy"}]
)
def test_unknown_choices(bad):
    with pytest.raises(ValueError, match=r"tense|mood"):
        build(**bad)


def test_the_files_of_a_corpus(tmp_path):
    text, factors = tmp_path / "new" / "corpus.txt", tmp_path / "factors.csv"
    write_variant(text, "plain", 100, 5, factors)
    drawn = generate(100, seed=5)
    assert text.read_text(encoding="utf-8") == "".join(item.text + "\n" for item in drawn)
    with factors.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == NAMES
    assert [tuple(map(int, row)) for row in rows] == [item.factors for item in drawn]


def test_a_cut_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "corpus.txt"
    path.write_text("old\n")
    [drawn] = generate(1, seed=0)

    def cut(size, seed):
        yield drawn
        raise KeyboardInterrupt

    monkeypatch.setattr(grammar, "draw", cut)
    with pytest.raises(KeyboardInterrupt):
        write_variant(path, "plain", 100, 0)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_variant(tmp_path / "file" / "corpus.txt", "plain", 3, 0)


def test_parse_is_the_inverse_of_sentence():
    for drawn in generate(2000, seed=5):
        factors = {name: FACTORS[name][i] for name, i in zip(NAMES, drawn.factors, strict=True)}
        assert grammar.parse(drawn.text) == factors


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The child bought an old",
        "The child bought a old knife.",
        "The child bought an old knife",
        "the child bought an old knife.",
        "The child bought an old knife. The child bought an old knife.",
        "The child did bought an old knife.",
    ],
)
def test_parse_refuses_what_the_grammar_cannot_say(text):
    assert grammar.parse(text) is None
