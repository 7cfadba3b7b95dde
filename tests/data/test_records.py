"""Records: conditions, labels and tags from every kind of file, and every fault in one
line."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsvae.config import DataConfig
from dsvae.data import corpora, sources
from dsvae.data.readers import read_file, read_records
from dsvae.data.records import Columns, Record
from dsvae.errors import UserError

ALL = Columns("text", "c", "l", "t")
NAMED = {"condition_column": "c", "label_column": "l", "tags_column": "t"}
RECORDS = [
    Record("a b", "first", "yes", ("O", "B-X")),
    Record("c", "second", None, None),
    Record("d e f", "third", "no", ("B-X", "I-X", "O")),
]


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def rows():
    """The records as json objects."""
    return [
        {"text": r.text, "c": r.condition, "l": r.label, "t": r.tags and list(r.tags)}
        for r in RECORDS
    ]


def save(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind in ("jsonl", "json"):
        return write(path, "".join(json.dumps(row) + "\n" for row in rows()))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows()), path)
        return path
    separator = "," if kind == "csv" else "\t"
    lines = [separator.join(("n", "t", "l", "c", "text"))] + [
        separator.join(("1", " ".join(r.tags or ()), r.label or "", r.condition, r.text))
        for r in RECORDS
    ]
    return write(path, "\n".join(lines))


def read(path, columns=ALL):
    return list(read_records(path, "--train_file", columns))


def error_of(path, columns=ALL):
    with pytest.raises(UserError) as caught:
        read(path, columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, kind):
    path = save(tmp_path, kind)
    assert read(path) == RECORDS
    assert read(path, Columns("text")) == [Record(each.text) for each in RECORDS]
    assert read(path, Columns("c", label="l")) == [
        Record(each.condition, label=each.label) for each in RECORDS
    ]
    assert list(read_file(path, "--file", "text")) == [each.text for each in RECORDS]


def test_a_column_may_serve_twice(tmp_path):
    """On Yelp, the sentiment is the condition and the label."""
    path = write(tmp_path / "a.csv", "text,s\nfine,positive\n")
    assert read(path, Columns("text", "s", "s")) == [Record("fine", "positive", "positive")]
    table = pa.table({"text": ["fine"], "s": ["positive"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", Columns("text", "s", "s"))[0].label == "positive"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ('"x"', "x"),
        ('" x "', "x"),
        ("3", "3"),
        ("0", "0"),
        ("2.5", "2.5"),
        ("true", "true"),
        ("false", "false"),
        ("null", None),
        ('""', None),
        ('" "', None),
        ("NaN", None),
    ],
)
def test_labels_are_text(tmp_path, value, label):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a", "l": {value}}}\n')
    assert read(path, Columns(label="l")) == [Record("a", label=label)]


def test_a_row_may_lack_a_label_and_tags(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        '{"text": "a"}\n\n{"text": "b", "l": 1, "t": []}\n{"text": " "}\n{"text": "c", "t": "O"}\n',
    )
    assert read(path, Columns(label="l", tags="t")) == [
        Record("a"),
        Record(""),
        Record("b", label="1"),
        Record(" "),
        Record("c", tags=("O",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x", "l": 1, "t": "O"}', ["a.jsonl:1", "'c'", "--condition_column"]),
        ("a.jsonl", '\n{"text": "x", "c": null}', ["a.jsonl:2", "null", "--condition_column"]),
        ("a.jsonl", '{"text": "x", "c": 3}', ["a.jsonl:1", "int", "--condition_column"]),
        ("a.jsonl", '{"text": "x", "c": " "}', ["a.jsonl:1", "column c is blank", "condition"]),
        ("a.jsonl", '{"text": "x", "c": "\\ud83d"}', ["a.jsonl:1", "surrogate"]),
        ("a.jsonl", '{"text": "x", "c": "y", "l": {}}', ["a.jsonl:1", "dict", "--label_column"]),
        (
            "a.jsonl",
            '{"text": "x", "c": "y", "l": null, "tt": null}',
            ["a.jsonl:", "'t'", "--tags_column tt"],
        ),
        (
            "a.jsonl",
            '{"text": "x y", "c": "y", "t": ["O"]}',
            ["a.jsonl:1: 1 tags for 2 words", "per whitespace word"],
        ),
        ("a.jsonl", '{"text": "x", "c": "y", "t": 5}', ["a.jsonl:1", "int", "--tags_column"]),
        ("a.jsonl", '{"text": "x", "c": "y", "t": [1]}', ["a.jsonl:1", "int", "tag"]),
        ("a.jsonl", '{"text": "x", "c": "y", "t": ["B X"]}', ["a.jsonl:1", "'B X'", "tag"]),
        ("a.csv", "text,c,l\nx,y,z", ["a.csv: no column 't'", "--tags_column"]),
        ("a.csv", "text,c,t,ll\nx,y,z,u", ["a.csv: no column 'l'", "--label_column ll"]),
        ("a.csv", "text,c,l,t\nx,,,", ["a.csv:2", "blank", "condition"]),
        ("a.csv", "text,c,l,t\nx,y,,\nu v,y,,O O O", ["a.csv:3: 3 tags for 2 words"]),
        ("a.tsv", "text\tc\tl\tt\nx\ty\t\tO B", ["a.tsv:2: 2 tags for 1 words"]),
        ("a.txt", "x\n", ["a.txt (--train_file) has no columns", "--condition_column", ".jsonl"]),
    ],
)
def test_bad_records(tmp_path, name, content, said):
    message = error_of(write(tmp_path / name, content))
    assert all(part in message for part in said), message


def test_bad_parquet_records(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "c": ["u", None]}), path)
    assert f"{path}, row 2" in error_of(path, Columns(condition="c"))
    pq.write_table(pa.table({"text": ["x", "y z"], "t": [["O"], ["O"]]}), path)
    assert f"{path}, row 2: 1 tags for 2 words" in error_of(path, Columns(tags="t"))
    assert "no column 'l'" in error_of(path, Columns(label="l"))


# Corpora of records


def load(data, tmp_path, seed=0):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return corpora.load_corpus(sources.source_of(data), seed, work)


def three(path, **options):
    return DataConfig(train_file=str(path), valid_file=str(path), test_file=str(path), **options)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_corpus_keeps_its_columns(tmp_path, kind):
    train = load(three(save(tmp_path, kind), **NAMED), tmp_path).splits["train"]
    assert train.column_names == ["text", "condition", "label", "tags"]
    assert [tuple(row.values()) for row in train] == [
        (r.text, r.condition, r.label, r.tags and list(r.tags)) for r in RECORDS
    ]


def test_equal_texts_with_other_conditions_are_other_records(tmp_path):
    """What is held out is cut by text and condition; copies stay together."""
    pairs = [(f"text {i % 4}", f"condition {i // 4 % 10}") for i in range(80)]
    path = write(
        tmp_path / "a.jsonl", "".join(json.dumps({"text": t, "c": c}) + "\n" for t, c in pairs)
    )
    corpus = load(DataConfig(train_file=str(path), condition_column="c"), tmp_path)
    found = {
        name: list(zip(split["text"], split["condition"], strict=True))
        for name, split in corpus.splits.items()
    }
    assert {name: len(rows) for name, rows in found.items()} == {"train": 72, "valid": 4, "test": 4}
    assert {name: len(set(rows)) for name, rows in found.items()} == {
        "train": 36,
        "valid": 2,
        "test": 2,
    }
    assert corpus.repeated == {"train": 36, "valid": 2, "test": 2}
    assert corpus.in_train == {"valid": 0, "test": 0}
    assert len(set().union(*found.values())) == 40


def test_class_numbers_of_a_data_set_have_names(tmp_path, monkeypatch):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "l": datasets.ClassLabel(names=["bad", "good"]),
            "t": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    part = datasets.Dataset.from_dict(
        {"text": ["a b", "c", "d"], "l": [1, 0, -1], "t": [[0, 1], [1], [0]]}, features=features
    )
    parts = datasets.DatasetDict({"train": part, "validation": part, "test": part})
    monkeypatch.setattr(sources.HubDataSet, "_load", lambda *_: (parts, {}))
    data = DataConfig(dataset="x", label_column="l", tags_column="t")
    train = load(data, tmp_path).splits["train"]
    assert train["label"][:] == ["good", "bad", None]
    assert train["tags"][:] == [["O", "B-X"], ["B-X"], ["O"]]
    with pytest.raises(UserError, match="'c'.*--condition_column"):
        load(DataConfig(dataset="x", condition_column="c"), tmp_path)


@pytest.mark.parametrize("kind", ["condition", "label", "tags"])
def test_sources_without_columns_are_refused(tmp_path, kind):
    path = write(tmp_path / "a.txt", "x\n")
    good = save(tmp_path, "csv")
    column = {f"{kind}_column": "c"}
    for data, said in (
        (DataConfig(**column), "built-in corpus"),
        (DataConfig(train_file=str(path), **column), "has no columns"),
        (DataConfig(train_file=str(good), test_file=str(path), **column), r"--test_file\) has no"),
    ):
        with pytest.raises(UserError, match=f"{said}") as caught:
            sources.source_of(data).identity(0)
        assert f"--{kind}_column" in str(caught.value)


def test_a_fingerprint_changes_only_with_the_columns_that_are_named(tmp_path):
    path = save(tmp_path, "csv")
    base = sources.source_of(three(path)).identity(0)
    assert set(base) == {"files", "column", "held_out_seed"}
    others = [
        sources.source_of(three(path, **options)).identity(0)
        for options in (
            {"condition_column": "c"},
            {"condition_column": "l"},
            {"label_column": "c"},
            {"tags_column": "t"},
            NAMED,
        )
    ]
    for other in others:
        assert {name: other[name] for name in base} == base
        assert other != base
    assert len({json.dumps(other, sort_keys=True) for other in others}) == 5
