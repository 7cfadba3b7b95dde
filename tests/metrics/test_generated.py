"""Sentences of the prior: adherence by hand, and what is decoded against single calls."""

import math

import numpy as np
import pytest
import torch
from small_models import SMALL, make_vae, small_tokenizer

from dsvae.data.grammar_variants import paired, parse_condition
from dsvae.data.noise import PRIOR, normal
from dsvae.data.record_tokens import tokenize
from dsvae.data.records import Columns, Record
from dsvae.inference.passes import Passes
from dsvae.metrics import generated
from dsvae.metrics.generated import Conditions, of_classifier, of_conditional, of_pairs
from dsvae.parallel.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
RECORDS = [Record(each.record["text"], each.record["condition"]) for each in paired(30, 4)]
RECORDS += [Record("The king admires a hat.", RECORDS[3].condition)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [part for record in RECORDS for part in (record.text, record.condition)]
    return small_tokenizer(texts, SMALL["vocab_size"])


def split_of(records, tokenizer):
    columns = Columns(condition="condition")
    return tokenize(records, tokenizer, 64, "test", columns)[0]


def test_what_a_condition_names():
    wanted = {"subject": "artist", "verb": "admire", "object": "knife"}
    assert parse_condition("artist admire knife") == wanted
    for text in ("artist admire", "admire artist knife", "artist admire knife hat", "positive"):
        assert parse_condition(text) is None


def test_adherence_to_pairs_by_hand():
    wanted = [
        {"subject": "artist", "verb": "admire", "object": "knife"},
        {"subject": "king", "verb": "lose", "object": "hat"},
    ]
    outputs = [
        [
            "The artist admires a red knife.",
            "The artists admired red knives.",  # past
            "Will the artist not admire old knives?",
            "The artist admires a red lamp.",  # another object
        ],
        [
            "The king lost a red hat.",
            "The king lost an old hat.",  # the same tense, polarity and type
            "The king lost lost a hat.",  # no sentence
            "The hat loses a red king.",  # no sentence either
        ],
    ]
    found = of_pairs(outputs, wanted)
    assert found["adherence"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["triples"] == pytest.approx((3 + 1) / 2)
    assert found["se"]["adherence"] == pytest.approx(np.std([0.75, 0.5], ddof=1) / math.sqrt(2))


def test_a_classifier_that_cannot_be_wrong():
    """Each condition has a word of its own, which some outputs lack."""
    records = [f"{word} {i}" for i in range(10) for word in ("good", "bad")]
    conditions = np.array([0, 1] * 10)
    training = np.arange(20) < 10
    outputs = [["good x", "good", "bad", "good"], ["bad", "good", "good y", "bad"]]
    found = of_classifier(outputs, records, conditions, training)
    assert found["adherence_classifier"] == 1
    assert found["adherence"] == pytest.approx(5 / 8)
    order = np.random.default_rng(0).permutation(20)
    again = of_classifier(outputs, [records[i] for i in order], conditions[order], training[order])
    assert again == found


def test_a_condition_that_the_classifier_never_saw_has_no_adherence():
    records, conditions = ["good", "good", "bad", "good"], np.array([0, 0, 1, 0])
    training = np.array([True, False, False, True])
    found = of_classifier([["good"], ["bad"]], records, conditions, training)
    assert math.isnan(found["adherence"])
    assert "too few" in found["undefined"]["adherence"]


def test_which_adherence_is_measured(tokenizer):
    def found(conditions):
        records = [Record(RECORDS[i % 30].text, c) for i, c in enumerate(conditions)]
        split = split_of(records, tokenizer)
        outputs = [["The king lost a red hat."] for _ in Conditions.of(split).chosen]
        return of_conditional(outputs, split, [r.text for r in records], conditions)

    pairs = found([record.condition for record in RECORDS])
    assert 0 <= pairs["adherence"] <= 1
    assert "triples" in pairs
    few = found(["positive", "negative"] * 15)
    assert few["adherence"] == 0.5  # equal outputs are of one class
    assert 0 <= few["adherence_classifier"] <= 1
    many = found([f"{record.condition} {i % 25}" for i, record in enumerate(RECORDS)])
    assert math.isnan(many["adherence"])
    assert "20" in many["undefined"]["adherence"]
    assert "adherence_classifier" not in many


def test_the_choice_of_conditions_does_not_depend_on_the_order(tokenizer, monkeypatch):
    monkeypatch.setattr(generated, "CONDITIONS", 5)

    def chosen(records):
        found = Conditions.of(split_of(records, tokenizer)).chosen
        return [[records[i] for i in rows] for rows in found]

    found = chosen(RECORDS)
    assert len(found) == 5
    assert found == chosen(RECORDS[::-1])
    rows = Conditions.of(split_of(RECORDS, tokenizer)).rows
    assert sorted(len(each) for each in rows) == [1] * 29 + [2]


@pytest.mark.parametrize("prior", ["learned", "fixed"])
def test_outputs_are_those_of_single_conditions(tokenizer, monkeypatch, prior):
    monkeypatch.setattr(generated, "CONDITIONS", 3)
    monkeypatch.setattr(generated, "DRAWS", 2)
    model = make_vae(conditional=True, prior=prior)
    split = split_of(RECORDS, tokenizer)
    passes = Passes(model, token_budget=64)
    prior_of_each = passes.encode(split).prior
    found = generated.decode_conditions(passes, split, prior_of_each, tokenizer, 9, seed=5)
    assert len(found) == 3
    for rows, outputs in zip(Conditions.of(split).chosen, found, strict=True):
        condition = torch.from_numpy(split.conditions(rows[:1])[0])[None]
        p = model.prior(condition)
        for draw in range(2):
            key = (draw, int(split.condition_hashes[rows[0]]))
            noise = torch.from_numpy(normal(5, PRIOR, [key], 6))
            ids = model.generate(
                latent=p.sample(noise), condition_ids=condition, max_new_tokens=9, do_sample=False
            )
            expected = tokenizer.decode(
                [i for i in ids[0, 1:].tolist() if i not in (0, 1)],
                clean_up_tokenization_spaces=False,
            )
            assert outputs[draw] == expected


def test_without_a_latent_all_outputs_of_a_condition_are_one(tokenizer):
    model = make_vae(conditional=True, injection="none")
    split = split_of(RECORDS[:4], tokenizer)
    passes = Passes(model, token_budget=64)
    prior = passes.encode(split).prior
    found = generated.decode_conditions(passes, split, prior, tokenizer, 9, seed=5)
    assert [len(each) for each in found] == [generated.DRAWS] * 4
    assert all(len(set(each)) == 1 for each in found)
