"""The variants of the built-in corpus: entropies by enumeration, and what the records
say."""

import itertools
import json
import math
from collections import Counter

import pytest

from dsvae.data import grammar, grammar_variants
from dsvae.data.grammar import FACTORS
from dsvae.data.grammar_variants import (
    DEPENDENT,
    PAIR_ENTROPY,
    PAIR_ENTROPY_IN_RELATION,
    PAIRED_ENTROPY,
    RELATION_INFORMATION,
    dependent_value,
    draw_lines,
    entity,
    paired,
    relations,
    tagged,
    write_variant,
)
from dsvae.data.tokenizer_training import train_tokenizer
from dsvae.errors import UserError

NAMES = tuple(FACTORS)


def entropy(counts):
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_entropy_of_a_paired_sentence_given_its_condition():
    """Every combination of the dependent factors, for every subject. The sentence tells
    all factors, so its entropy is theirs."""
    for subject in range(16):
        shares = [
            Counter(dependent_value(name, subject, case) for case in range(20))
            for name in DEPENDENT
        ]
        joint = Counter(
            {
                values: math.prod(c[v] for c, v in zip(shares, values, strict=True))
                for values in itertools.product(*shares)
            }
        )
        assert len(joint) == 72
        assert max(joint.values()) == 18**5
        assert entropy(joint) + math.log(12) == pytest.approx(PAIRED_ENTROPY, abs=1e-12)
    assert pytest.approx(4.2490, abs=5e-5) == PAIRED_ENTROPY


def test_every_value_is_usual_for_some_subject():
    for name in DEPENDENT:
        assert {dependent_value(name, s, 0) for s in range(16)} == set(range(len(FACTORS[name])))


def test_paired_records():
    drawn = list(paired(6000, seed=1))
    assert list(paired(100, seed=1)) == drawn[:100] != list(paired(100, seed=2))
    follows: Counter[str] = Counter()
    for record, factors in drawn:
        choice = dict(zip(NAMES, factors, strict=True))
        value = {name: FACTORS[name][index] for name, index in choice.items()}
        assert record["text"] == grammar.sentence(choice)
        assert record["condition"] == f"{value['subject']} {value['verb']} {value['object']}"
        for name in DEPENDENT:
            follows[name] += choice[name] == dependent_value(name, choice["subject"], 0)
    for name in DEPENDENT:  # five standard errors
        assert abs(follows[name] / 6000 - 0.9) < 5 * (0.9 * 0.1 / 6000) ** 0.5
    for name in ("subject", "verb", "adjective", "object"):
        counts = Counter(factors[NAMES.index(name)] for _, factors in drawn)
        assert set(counts) == set(range(len(FACTORS[name])))


def test_what_a_pair_says_of_its_relation():
    """Every relation with all cases of both entities."""
    joint = Counter()
    for relation in range(8):
        own = Counter(entity(relation, case) for case in range(160))
        assert own[2 * relation] == own[2 * relation + 1] == 73  # .9 / 2 + .1 / 16
        for a, b in itertools.product(own, own):
            joint[relation, a, b] += own[a] * own[b]
    pairs, relation_counts = Counter(), Counter()
    for (relation, a, b), count in joint.items():
        pairs[a, b] += count
        relation_counts[relation] += count
    pair, given = entropy(pairs), entropy(joint) - entropy(relation_counts)
    assert pair == pytest.approx(PAIR_ENTROPY) == pytest.approx(4.239, abs=5e-4)
    assert given == pytest.approx(PAIR_ENTROPY_IN_RELATION) == pytest.approx(2.320, abs=5e-4)
    assert pair - given == pytest.approx(RELATION_INFORMATION) == pytest.approx(1.919, abs=5e-4)
    best = sum(max(joint[r, a, b] for r in range(8)) for a, b in pairs) / joint.total()
    assert best == pytest.approx(0.9125, abs=5e-5)


def test_relation_records():
    drawn = list(relations(3000, seed=1))
    assert list(relations(100, seed=1)) == drawn[:100] != list(relations(100, seed=2))
    for record, factors in drawn:
        value = {n: FACTORS[n][i] for n, i in zip(NAMES, factors, strict=True)}
        assert record["text"] == f"{value['subject']} | {value['object']}"
        assert record["label"] == FACTORS["verb"].index(value["verb"]) // 2
        plain = record["condition"]
        for marker in ("<e1> ", " </e1>", "<e2> ", " </e2>"):
            assert plain.count(marker) == 1
            plain = plain.replace(marker, "")
        assert plain == grammar.sentence(value)
        first, second = (
            record["condition"].split(f"<{m}> ")[1].split(f" </{m}>")[0] for m in ("e1", "e2")
        )
        assert first in grammar._SUBJECTS | {v: k for k, v in grammar._SUBJECTS.items()}
        assert second in grammar._OBJECTS | {v: k for k, v in grammar._OBJECTS.items()}
    assert len(Counter(record["label"] for record, _ in drawn)) == 8


def test_markers_survive_a_trained_tokenizer_and_cost_few_pieces():
    drawn = [record for record, _ in relations(2000, seed=1)]
    tokenizer = train_tokenizer([r["text"] for r in drawn] + [r["condition"] for r in drawn], 500)
    marked = 0
    for record in drawn[:200]:
        ids = tokenizer(record["condition"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == record["condition"]
        plain = record["condition"]
        for marker in ("<e1> ", " </e1>", "<e2> ", " </e2>"):
            plain = plain.replace(marker, "")
        marked += len(ids) - len(tokenizer(plain, add_special_tokens=False)["input_ids"])
    assert marked / 200 <= 4 * 3.5


def test_tagged_records():
    drawn = list(tagged(2000, seed=3))
    assert [r["text"] for r, _ in drawn] == [each.text for each in grammar.draw(2000, seed=3)]
    for record, factors in drawn:
        value = {n: FACTORS[n][i] for n, i in zip(NAMES, factors, strict=True)}
        words = [word.strip(".?!") for word in record["text"].split()]
        found = {
            tag: [w for w, t in zip(words, record["tags"], strict=True) if t == tag]
            for tag in ("B-PROF", "B-OBJ", "I-OBJ")
        }
        nouns = (value["object"], grammar._OBJECTS[value["object"]])
        assert found["B-OBJ"] == [value["adjective"]]
        assert found["I-OBJ"][0] in nouns
        occupation = value["subject"] in grammar_variants.OCCUPATIONS
        subject = (value["subject"], grammar._SUBJECTS[value["subject"]])
        assert record["label"] == ("occupation" if occupation else "none")
        assert [word in subject for word in found["B-PROF"]] == [True] * occupation
        assert set(record["tags"]) <= {"O", "B-PROF", "B-OBJ", "I-OBJ"}
    few = [record for record, _ in tagged(50, seed=3, labelled=7)]
    assert few[:7] == [record for record, _ in drawn[:7]]
    assert all(r["label"] is None and r["tags"] is None for r in few[7:])


def test_files(tmp_path):
    for kind in ("paired", "relations", "tagged"):
        path, factors = tmp_path / f"{kind}.jsonl", tmp_path / f"{kind}.csv"
        write_variant(path, kind, 20, 1, factors)
        lines = path.read_text().splitlines()
        assert lines == [each.text for each in draw_lines(kind, 20, 1)]
        assert all("text" in json.loads(line) for line in lines)
        assert len(factors.read_text().splitlines()) == 21
    write_variant(tmp_path / "plain.txt", "plain", 20, 1)
    assert (tmp_path / "plain.txt").read_text().splitlines() == [
        each.text for each in grammar.generate(20, 1)
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a.jsonl", "nested", 3, 0), "plain, paired, relations, tagged"),
        (("a.txt", "paired", 3, 0), ".jsonl"),
        (("a.jsonl", "paired", 3, 0, None, 2), "--labelled is for --kind tagged"),
        (("a.jsonl", "tagged", 3, 0, None, 0), "at least 1"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(UserError, match=said):
        write_variant(*arguments)
