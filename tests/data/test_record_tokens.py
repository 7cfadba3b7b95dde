"""Records as tokens and batches: tags stand at the right pieces, and conditions, labels
and tags go with their sentences however a step is cut."""

from __future__ import annotations

import json
import os
import unicodedata

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from dsvae.config import DataConfig
from dsvae.data import prepared as cache
from dsvae.data.batches import TrainingBatches, collate_split, evaluation_batches, row_lengths
from dsvae.data.grammar import generate
from dsvae.data.grammar_variants import write_variant
from dsvae.data.prepared import load_prepared, prepare
from dsvae.data.record_tokens import Names, tokenize
from dsvae.data.records import Columns, Record
from dsvae.data.tagging import tagged_ids
from dsvae.errors import UserError
from dsvae.modeling.crf import IGNORE
from dsvae.reports.run_text import data_text

TEXTS = [item.text for item in generate(400, seed=1)]
NAMES = Names(("bad", "good"), ("B-X", "I-X", "O"))
ALL = Columns("text", "condition", "label", "tags")


def records(count=60):
    """Grammar sentences of which every third has no label and every fourth no tags; the
    tag of a word follows from the word."""
    rng = np.random.default_rng(0)
    return [
        Record(
            text,
            " ".join(rng.permutation(["old", "new", "red", "blue"])[: 1 + i % 4]),
            None if i % 3 == 0 else NAMES.labels[i % 2],
            None if i % 4 == 0 else tuple(tag_of(word) for word in text.split()),
        )
        for i, text in enumerate(TEXTS[:count])
    ]


def tag_of(word):
    return NAMES.tags[sum(map(ord, word)) % 3]


@pytest.fixture(scope="module")
def split(trained):
    return tokenize(records(), trained, 64, "test", ALL, NAMES)[0]


# Alignment


@pytest.mark.parametrize("kind", ["trained", "t5_tokenizer"])
@pytest.mark.parametrize(
    "text",
    [
        *TEXTS[:3],
        "a  b\tc \u00a0 d",
        "日本 ab c日d (x) ... don't <e1> king </e1>.",
        "</s> <pad> a</s>b <unk>",
        "\U0001f600\U0001f600 e\u0301 \ufb01ne",
        "x",
    ],
)
def test_the_pieces_from_a_tagged_one_to_the_next_spell_its_word(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    [found] = tagged_ids([text], tokenizer, 200)
    assert len(found.words) == len(found.ids)
    assert (found.ids[-1], found.words[-1]) == (tokenizer.eos_token_id, IGNORE)
    first = [i for i, word in enumerate(found.words) if word != IGNORE]
    assert [found.words[i] for i in first] == list(range(len(text.split())))
    for begin, end, word in zip(first, [*first[1:], -1], text.split(), strict=True):
        pieces = found.ids[begin:end]
        if tokenizer.unk_token_id not in pieces:
            spelled = tokenizer.decode(pieces).replace(" ", "")
            # T5 normalizes, and the trained tokenizer does not
            same = unicodedata.normalize("NFKC", word)
            assert unicodedata.normalize("NFKC", spelled.strip()) == same
        else:
            assert not set(word) <= set("abcdefghijklmnopqrstuvwxyz.?!")


def test_a_word_without_pieces_becomes_the_unknown_piece(t5_tokenizer):
    t5 = t5_tokenizer
    for text in ("the \u00ad cat", "\u00ad the cat", "the cat \u00ad", "\u00ad \u00ad"):
        plain = t5(text, add_special_tokens=False)["input_ids"]
        [found] = tagged_ids([text], t5, 64)
        count = len(text.split())
        assert [word for word in found.words if word != IGNORE] == list(range(count))
        if t5.unk_token_id not in plain:
            assert [i for i in found.ids[:-1] if i != t5.unk_token_id] == plain


def test_without_such_words_tagged_ids_are_the_ids(trained):
    plain = tokenize(TEXTS, trained, 64, "test")[0]
    for found, row in zip(tagged_ids(TEXTS, trained, 64), plain.rows(range(400)), strict=True):
        assert found.ids == row.tolist()


def test_tags_labels_and_conditions_of_a_split(split, trained):
    wanted = [7, 0, 3, 8]
    conditions, tags, rows = split.conditions(wanted), split.tags(wanted), split.rows(wanted)
    for i, condition, tag, row in zip(wanted, conditions, tags, rows, strict=True):
        record = records()[i]
        assert condition[-1] == trained.eos_token_id
        assert trained.decode(condition[:-1]) == record.condition
        assert len(tag) == len(row)
        assert tag[-1] == IGNORE
        assert [NAMES.tags[t] for t in tag if t != IGNORE] == list(record.tags or ())
    assert split.class_labels.dtype == np.int64
    assert [None if n == IGNORE else NAMES.labels[n] for n in split.class_labels] == [
        record.label for record in records()
    ]
    chosen = split.select(wanted)
    assert [each.tolist() for each in chosen.tags(range(4))] == [each.tolist() for each in tags]
    assert chosen.class_labels.tolist() == split.class_labels[wanted].tolist()
    assert split.class_labels_of(np.array(wanted)).tolist() == chosen.class_labels.tolist()


def test_a_split_of_texts_has_none(trained):
    plain = tokenize(TEXTS[:5], trained, 64, "test")[0]
    assert plain.conditions([0]) is plain.tags([0]) is plain.class_labels is None
    assert plain.condition_lengths_of() is None
    assert row_lengths(plain).tolist() == plain.lengths.tolist()


def test_truncation_counts_tags_and_conditions(trained):
    long = Record("the old king", "c " * 30, None, ("O", "B-X", "I-X"))
    short = Record("the king", "c", None, ("O", "O"))
    fits = len(trained("the king", add_special_tokens=False)["input_ids"]) + 1
    split, _, counts = tokenize([long, short], trained, fits, "test", ALL, NAMES)
    left = [[t for t in row if t != IGNORE] for row in split.tags([0, 1])]
    assert (counts["truncated"], counts["conditions_truncated"]) == (1, 1)
    assert len(left[1]) == 2
    assert counts["tags_truncated"] == 3 - len(left[0]) > 0
    assert split.condition_lengths_of().tolist()[0] == fits
    assert counts["tagged"] == 2
    assert counts["labelled"] == 0


def test_keys_of_records(trained):
    def keys(pairs):
        records = [Record(text, condition) for text, condition in pairs]
        return tokenize(records, trained, 64, "test", Columns("text", "condition"))[0]

    pairs = [("king", "a"), ("king", "b"), ("lady", "a"), ("king", "a"), ("a", "king")]
    split = keys(pairs)
    plain = tokenize([text for text, _ in pairs], trained, 64, "test")[0]
    assert len(set(split.content_keys.tolist())) == 5
    assert split.text_keys.tolist() == plain.text_keys.tolist()
    assert set(keys(pairs[::-1]).content_keys.tolist()) == set(split.content_keys.tolist())
    assert keys([("king", "b")]).content_keys[0] == split.content_keys[1]  # the only such record
    assert not set(split.content_keys.tolist()) & set(plain.content_keys.tolist())


def test_a_slow_tokenizer_cannot_place_tags():
    with pytest.raises(UserError, match="fast tokenizer.*ByT5"):
        tagged_ids(["a"], ByT5Tokenizer(), 8)


# Batches


def step(split, index=1, rank=0, world_size=1, **options):
    defaults = {"batch_size": 16, "token_budget": 80, "deletion": 0.4, "posterior_reads": "both"}
    return TrainingBatches(
        split,
        rank=rank,
        world_size=world_size,
        noise_width=4,
        seed=3,
        pad_id=0,
        **{**defaults, **options},
    ).step(index)


def rows_of(steps):
    """Each sentence of a step with everything that goes through the model, unpadded."""
    found = []
    for micro in (micro for each in steps for micro in each.micro_batches):
        for row, index in enumerate(micro.indices.tolist()):
            if micro.weight[row]:
                seen = micro.attention_mask[row].bool()
                found.append(
                    (
                        index,
                        micro.input_ids[row][seen].tolist(),
                        micro.tag_labels[row][seen].tolist(),
                        micro.condition_ids[row][micro.condition_mask[row].bool()].tolist(),
                        int(micro.class_labels[row]),
                        micro.labels[row][micro.labels[row] != IGNORE].tolist(),
                        micro.noise[row].flatten().tolist(),
                    )
                )
    return sorted(found)


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(1, {"token_budget": 30}), (2, {}), (3, {"token_budget": 30}), (2, {"micro_batches": 3})],
)
def test_records_of_a_step_do_not_depend_on_how_it_is_cut(split, world_size, options):
    one = rows_of([step(split, token_budget=10_000)])
    assert len(one) == 16
    ranks = [step(split, rank=r, world_size=world_size, **options) for r in range(world_size)]
    assert rows_of(ranks) == one
    assert len({len(each.micro_batches) for each in ranks}) == 1


def test_condition_and_text_are_packed_and_deletion_keeps_tags_aligned(split, trained):
    """Tags are a function of the word, so that a kept first piece tells its tag."""
    eos = trained.eos_token_id
    deleted = tagged = 0
    for index in range(6):
        for sentence, seen, tags, condition, label, clean, _ in rows_of([step(split, index)]):
            record = records()[sentence]
            assert trained.decode(condition[:-1]) == record.condition
            assert seen[: len(condition)] == condition
            assert seen.count(eos) == 2
            assert seen[-1] == condition[-1] == eos
            assert tags[: len(condition)] == [IGNORE] * len(condition)
            assert tags[-1] == IGNORE
            assert label == (IGNORE if record.label is None else NAMES.labels.index(record.label))
            assert clean == split.ids(sentence).tolist()
            # the kept tokens with their tags, in order, among those of the clean sentence
            rest = iter(zip(clean, split.tags([sentence])[0].tolist(), strict=True))
            text = list(zip(seen[len(condition) :], tags[len(condition) :], strict=True))
            assert all(pair in rest for pair in text)
            deleted += len(clean) - len(text)
            tagged += sum(tag != IGNORE for _, tag in text)
    assert deleted > 100
    assert tagged > 100


def test_the_text_is_noised_as_without_a_condition(split, trained):
    """The condition and the tags change neither z's noise nor what deletion leaves."""
    plain = tokenize([record.text for record in records()], trained, 64, "test")[0]
    without = {
        index: (micro.input_ids[row][micro.attention_mask[row].bool()].tolist(), micro.noise[row])
        for micro in step(plain).micro_batches
        for row, index in enumerate(micro.indices.tolist())
    }
    assert all(
        micro.condition_ids is micro.tag_labels is None for micro in step(plain).micro_batches
    )
    for index, seen, _, condition, _, _, noise in rows_of([step(split)]):
        assert seen[len(condition) :] == without[index][0]
        assert noise == without[index][1].flatten().tolist()


def test_the_posterior_may_read_the_condition_alone(split):
    both, alone = (
        step(split, posterior_reads=reads, deletion=0.0) for reads in ("both", "condition")
    )
    conditions = {row[0]: row[3] for row in rows_of([both])}
    for micro in alone.micro_batches:
        assert micro.condition_ids is micro.condition_mask is micro.tag_labels is None
        for index, ids, mask in zip(
            micro.indices, micro.input_ids, micro.attention_mask, strict=True
        ):
            assert ids[mask.bool()].tolist() == list(conditions[index])


def test_deletion_is_of_the_condition_where_it_is_read_alone(split):
    deleted = total = 0
    for micro in step(split, posterior_reads="condition").micro_batches:
        for row, index in enumerate(micro.indices.tolist()):
            seen = micro.input_ids[row][micro.attention_mask[row].bool()].tolist()
            clean = split.conditions([index])[0].tolist()
            rest = iter(clean)
            assert all(token in rest for token in seen)  # in order
            assert seen[-1] == clean[-1]
            labels = micro.labels[row]
            assert labels[labels != IGNORE].tolist() == split.ids(index).tolist()
            deleted, total = deleted + len(clean) - len(seen), total + len(clean)
    assert 0.1 < deleted / total < 0.6


@pytest.mark.parametrize("reads", ["both", "condition"])
@pytest.mark.parametrize("budget", [60, 100])
def test_the_budget_counts_conditions(split, reads, budget):
    each = step(split, token_budget=budget, posterior_reads=reads, deletion=0.0)
    for micro in each.micro_batches:
        assert max(micro.labels.numel(), micro.input_ids.numel()) <= budget
    assert each.tokens == sum(int((m.labels != IGNORE).sum()) for m in each.micro_batches)
    for indices, _ in evaluation_batches(
        row_lengths(split, reads), token_budget=budget, rank=0, world_size=1
    ):
        batch = pass_batch(split, indices, reads)
        assert max(batch.labels.numel(), batch.input_ids.numel()) <= budget


def pass_batch(split, indices, reads="both"):
    indices = np.asarray(indices)
    size = len(indices)
    return collate_split(
        split,
        indices,
        pad_id=0,
        noise=np.zeros((size, 0), np.float32),
        weight=np.ones(size, np.float32),
        posterior_reads=reads,
    )


def test_a_batch_is_its_sentences_one_by_one(split):
    batch = pass_batch(split, range(12))
    for i in range(12):
        one = pass_batch(split, [i])
        for name in (
            "input_ids",
            "attention_mask",
            "condition_ids",
            "condition_mask",
            "labels",
            "tag_labels",
            "class_labels",
        ):
            own, whole = getattr(one, name)[0], getattr(batch, name)[i]
            size = own.numel()
            assert torch.equal(whole.flatten()[:size], own.flatten()), name
            fill = IGNORE if name in ("labels", "tag_labels") else 0
            assert (whole.flatten()[size:] == fill).all()
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.tag_labels, batch.tag_labels)
    assert moved.indices is batch.indices


# The cache


def config(tmp_path, rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = str(path)
    return DataConfig(
        train_file=file,
        valid_file=file,
        test_file=file,
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


def test_a_prepared_corpus_of_records(tmp_path):
    rows = [
        {"text": r.text, "condition": r.condition, "label": r.label, "tags": r.tags}
        for r in records()
    ]
    columns = {f"{kind}_column": kind for kind in ("condition", "label", "tags")}
    data = config(tmp_path, rows, **columns)
    path = prepare(data, tokenizer=None, vocab_size=320, seed=0)
    found = load_prepared(path)
    assert (found.labels, found.tags) == NAMES
    split = found.splits["valid"]
    assert [found.tokenizer.decode(row[:-1]) for row in split.conditions(range(60))] == [
        record.condition for record in records()
    ]
    figures = found.report["splits"]["train"]
    assert {name: figures[name] for name in ("labelled", "tagged")} == {
        "labelled": 40,
        "tagged": 45,
    }
    assert (figures["conditions_truncated"], figures["tags_truncated"]) == (0, 0)
    said = data_text(found.report, 1).splitlines()
    assert "of 180 records" in said[3]
    assert "120 records with a label (labels: bad, good)" in said[3]
    assert "135 records with tags (3 different, 0 truncated)" in said[3]
    plain = prepare(config(tmp_path, rows), tokenizer=None, vocab_size=320, seed=0)
    assert plain != path
    text_only = load_prepared(plain)
    assert text_only.labels == text_only.tags == ()
    assert text_only.splits["train"].dataset.column_names == [
        "input_ids",
        "words",
        "bytes",
        "truncated",
        "hash",
    ]
    assert not set(text_only.report) & {"labels", "tags"}
    assert len(data_text(text_only.report, 1).splitlines()) == len(said) - 1


def test_the_identity_of_text_alone_is_what_it_was(tmp_path, monkeypatch):
    """A change here would make every cached corpus again."""
    seen = {}
    dumps = json.dumps
    monkeypatch.setattr(
        cache.json, "dumps", lambda value, **more: seen.update(last=value) or dumps(value, **more)
    )
    monkeypatch.setattr(cache, "_fill", lambda *_: None)
    prepare(config(tmp_path, [{"text": "a"}]), tokenizer=None, vocab_size=320, seed=0)
    assert set(seen["last"]) == {"format", "corpus", "tokenizer", "max_tokens"}
    assert set(seen["last"]["corpus"]) == {"files", "column", "held_out_seed"}


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ({"l": "x"}, {"l": "y"}, "label 'y' is not among those of the training sentences .x."),
        ({"l": None}, {"l": "y"}, "no training sentence has a value in --label_column"),
        ({"l": "x", "t": ["O"]}, {"l": "x", "t": ["B"]}, "tag 'B' is not among"),
    ],
)
def test_labels_and_tags_that_training_lacks(tmp_path, train, test, said):
    data = config(tmp_path, [{"text": "a", **train}])
    data.test_file = str(tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "b", **test}))
    data.label_column, data.tags_column = "l", "t" if "t" in train else None
    with pytest.raises(UserError, match=said) as caught:
        prepare(data, tokenizer=None, vocab_size=320, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["paired", "relations", "tagged"])
def test_the_variants_of_the_grammar_can_be_prepared(tmp_path, kind):
    write_variant(tmp_path / "c.jsonl", kind, 400, 1, labelled=300 if kind == "tagged" else None)
    present = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
    columns = {f"{name}_column": name for name in present if name != "text"}
    data = DataConfig(
        train_file=str(tmp_path / "c.jsonl"), cache_dir=str(tmp_path / "cache"), **columns
    )
    found = load_prepared(prepare(data, tokenizer=None, vocab_size=376, seed=0))
    assert sum(len(split) for split in found.splits.values()) == 400
    assert len(found.labels) == {"paired": 0, "relations": 8, "tagged": 2}[kind]
    assert len(found.tags) == (4 if kind == "tagged" else 0)
    for part in found.report["splits"].values():
        assert part.get("tags_truncated", 0) == 0
