"""Corpora: what is read from files, data sets and the grammar, what is held out, and
every bad source in one line."""

from __future__ import annotations

import itertools
import json
import math
import os
import uuid

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsvae.config import DataConfig
from dsvae.data import corpora, readers
from dsvae.data.grammar import generate
from dsvae.data.sources import SPLITS, source_of
from dsvae.errors import UserError

LINES = [f"sentence number {number}" for number in range(200)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def load_corpus(data: DataConfig, seed: int) -> corpora.Corpus:
    """The corpus in a folder that goes with the test, the cache's."""
    folder = datasets.config.HF_DATASETS_CACHE / str(uuid.uuid4())
    folder.mkdir(parents=True)
    return corpora.load_corpus(source_of(data), seed, folder)


def fingerprint(data: DataConfig, seed: int) -> dict:
    return source_of(data).identity(seed)


def texts(data: DataConfig, split: str = "train", seed: int = 0) -> list[str]:
    return load_corpus(data, seed).splits[split]["text"][:]


def three(path, **options) -> DataConfig:
    """The same file for all splits, so that nothing is held out."""
    return DataConfig(train_file=path, valid_file=path, test_file=path, **options)


def error_of(data: DataConfig, seed: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(data, seed)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read


def test_text_lines_end_only_at_newlines(tmp_path):
    content = "\ufeffone\r\n two \n\n \t\nth\u2028r\x0be\x85e\x0c!\rfour\nlast".encode()
    corpus = load_corpus(three(write(tmp_path / "a.txt", content)), seed=0)
    assert corpus.splits["train"]["text"][:] == [
        "one",
        "two",
        "th\u2028r\x0be\x85e\x0c!\rfour",
        "last",
    ]
    assert corpus.skipped_blank == {"train": 2, "valid": 2, "test": 2}
    assert corpus.held_out == ()
    assert corpus.splits["train"].column_names == ["text"]


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a", "A.TXT"])
def test_text_suffixes(tmp_path, name):
    assert texts(three(write(tmp_path / name, "x\ny\n"))) == ["x", "y"]


def test_more_sentences_than_one_write(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BATCH_ROWS", 7)
    assert texts(three(write(tmp_path / "a.txt", "\n".join(LINES)))) == LINES


def test_jsonl(tmp_path):
    lines = [
        '{"text": " a ", "n": 1}',
        "",
        '{"n": "x", "text": "2020-01-01"}',
        '{"text": ""}',
        '{"text": "b\\nc"}',
    ]
    corpus = load_corpus(three(write(tmp_path / "a.jsonl", "\r\n".join(lines))), seed=0)
    assert corpus.splits["train"]["text"][:] == ["a", "2020-01-01", "b\nc"]
    assert corpus.skipped_blank["train"] == 2  # a blank line and a blank sentence


def test_the_place_of_a_sentence_of_jsonl_is_its_line(tmp_path):
    """Labels and the numbers that `dsvae reconstruct` prints go by it."""
    path = tmp_path / "a.jsonl"
    write(path, '{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert list(readers.read_file(path, "--test_file", "text")) == ["a", "", "", "b"]


def test_json_with_one_object_per_line(tmp_path):
    path = write(tmp_path / "a.json", '{"s": "a"}\n{"s": "b"}')
    assert texts(three(path, text_column="s")) == ["a", "b"]


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffn,text\n1,NA\n2,"a, ""b"" c"\n\n3,None\n4,12\n5,\n')
    corpus = load_corpus(three(path), seed=0)
    assert corpus.splits["train"]["text"][:] == ["NA", 'a, "b" c', "None", "12"]
    assert corpus.skipped_blank["train"] == 2


def test_quotes_of_tsv_are_characters(tmp_path):
    """With csv's quoting, the second row and the third become one sentence."""
    rows = 'text\tn\r\na, b\t1\n"open\t2\nshut"\t2\n\n"closed" or not\t3\n""\t4\n'
    corpus = load_corpus(three(write(tmp_path / "a.tsv", rows)), seed=0)
    assert corpus.splits["train"]["text"][:] == [
        "a, b",
        '"open',
        'shut"',
        '"closed" or not',
        '""',
    ]
    assert corpus.skipped_blank["train"] == 1


def test_long_csv_fields(tmp_path):
    """The csv module refuses more than 131,072 characters, in any column."""
    long = "word " * 100_000
    path = write(tmp_path / "a.csv", f'page,text\n{long},a\nb,"{long}, and more"\n')
    assert texts(three(path)) == ["a", f"{long}, and more"]


def test_a_csv_quote_that_is_never_closed_does_not_swallow_any_file(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_FIELD", 1000)
    message = error_of(three(write(tmp_path / "a.csv", 'text\n"a\n' + "b\n" * 5000)))
    assert "correct its quotes" in message
    assert int(message.split(":")[1]) < 600


def test_parquet(tmp_path):
    pq.write_table(pa.table({"n": [1, 2, 3], "s": ["a", " ", "b"]}), tmp_path / "a.parquet")
    corpus = load_corpus(three(str(tmp_path / "a.parquet"), text_column="s"), seed=0)
    assert corpus.splits["train"]["text"][:] == ["a", "b"]
    assert corpus.skipped_blank["train"] == 1


def test_builtin_is_the_grammar():
    corpus = load_corpus(DataConfig(builtin_size=400, builtin_seed=9), seed=0)
    assert {name: len(split) for name, split in corpus.splits.items()} == {
        "train": 360,
        "valid": 20,
        "test": 20,
    }
    every = sorted(text for split in corpus.splits.values() for text in split["text"])
    assert every == sorted(item.text for item in generate(400, seed=9))
    assert corpus.held_out == ("valid", "test")


def test_the_entropy_is_known_of_the_built_in_corpus_alone():
    assert source_of(DataConfig()).entropy == pytest.approx(math.log(3_538_944))
    assert source_of(DataConfig(train_file="a.txt")).entropy is None
    assert source_of(DataConfig(dataset="someone/something")).entropy is None


def local_dataset(tmp_path, **splits: list[str]) -> str:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, sentences in splits.items():
        write(
            folder / f"{name}.jsonl",
            "".join(json.dumps({"text": text}) + "\n" for text in sentences),
        )
    return str(folder)


def test_data_set(tmp_path):
    corpus = load_corpus(
        DataConfig(dataset=local_dataset(tmp_path, train=LINES, validation=[" v ", ""])), seed=0
    )
    assert corpus.splits["valid"]["text"][:] == ["v"]
    assert corpus.held_out == ("test",)
    assert sorted([*corpus.splits["train"]["text"], *corpus.splits["test"]["text"]]) == sorted(
        LINES
    )
    assert corpus.skipped_blank == {"train": 0, "valid": 1, "test": 0}


# What is held out


def test_held_out_is_disjoint_complete_and_seeded(tmp_path):
    data = DataConfig(train_file=write(tmp_path / "a.txt", "\n".join(LINES)))
    parts = {name: texts(data, name, seed=1) for name in SPLITS}
    assert [len(parts[name]) for name in SPLITS] == [180, 10, 10]
    assert sorted(itertools.chain(*parts.values())) == sorted(LINES)
    assert parts["valid"] == texts(data, "valid", seed=1) != texts(data, "valid", seed=2)
    assert parts["train"] == [line for line in LINES if line in set(parts["train"])]


def test_copies_of_a_sentence_stay_together(tmp_path):
    """60 texts, number k comes 1 + k % 5 times, spread over the file: no text is in two
    splits, and none gets lost."""
    lines = [f"text {k}" for copy in range(5) for k in range(60) if copy <= k % 5]
    data = DataConfig(train_file=write(tmp_path / "a.txt", "\n".join(lines)))
    for seed in range(5):
        corpus = load_corpus(data, seed)
        parts = {name: corpus.splits[name]["text"][:] for name in SPLITS}
        assert [len(set(parts[name])) for name in SPLITS] == [54, 3, 3]
        assert len(set(itertools.chain(*map(set, parts.values())))) == 60
        assert sorted(itertools.chain(*parts.values())) == sorted(lines)
        assert corpus.repeated == {name: len(part) - len(set(part)) for name, part in parts.items()}
        assert corpus.in_train == {"valid": 0, "test": 0}


def test_copies_between_named_files_are_counted(tmp_path):
    data = DataConfig(
        train_file=write(tmp_path / "a.txt", "a\nb\na\nc"),
        valid_file=write(tmp_path / "v.txt", "a\nx\na"),
        test_file=write(tmp_path / "t.txt", "y\nz"),
    )
    corpus = load_corpus(data, seed=0)
    assert corpus.repeated == {"train": 1, "valid": 1, "test": 0}
    assert corpus.in_train == {"valid": 2, "test": 0}


def test_training_sentences_that_are_held_out_elsewhere_are_dropped(tmp_path):
    files = {
        "train_file": write(tmp_path / "a.txt", "a\nb\nc\na\nb\nd"),
        "valid_file": write(tmp_path / "v.txt", "c\nx\nc"),
        "test_file": write(tmp_path / "t.txt", "y\na"),
    }
    data = DataConfig(**files, deduplicate=True)
    corpus = load_corpus(data, seed=0)
    assert corpus.splits["train"]["text"][:] == ["b", "b", "d"]  # what only train repeats stays
    assert corpus.splits["valid"]["text"][:] == ["c", "x", "c"]
    assert corpus.dropped == 3
    assert corpus.repeated == {"train": 1, "valid": 1, "test": 0}
    assert corpus.in_train == {"valid": 0, "test": 0}
    plain = DataConfig(**files)
    assert load_corpus(plain, seed=0).dropped == 0
    assert fingerprint(data, 0) == {**fingerprint(plain, 0), "deduplicate": True}
    assert "deduplicate" not in fingerprint(plain, 0)
    assert "every training sentence" in error_of(three(files["train_file"], deduplicate=True))


def test_only_records_with_the_same_condition_are_dropped(tmp_path):
    def records(name, *pairs):
        lines = (json.dumps({"text": text, "c": c}) for text, c in pairs)
        return write(tmp_path / name, "\n".join(lines))

    data = DataConfig(
        train_file=records("a.jsonl", ("a", "1"), ("a", "2"), ("b", "1")),
        valid_file=records("v.jsonl", ("a", "2")),
        test_file=records("t.jsonl", ("b", "2")),
        condition_column="c",
        deduplicate=True,
    )
    train = load_corpus(data, seed=0).splits["train"]
    assert list(zip(train["text"], train["condition"], strict=True)) == [("a", "1"), ("b", "1")]


def test_only_the_missing_split_is_held_out(tmp_path):
    data = DataConfig(
        train_file=write(tmp_path / "a.txt", "\n".join(LINES)),
        test_file=write(tmp_path / "t.txt", "t"),
    )
    corpus = load_corpus(data, seed=0)
    assert {name: len(split) for name, split in corpus.splits.items()} == {
        "train": 190,
        "valid": 10,
        "test": 1,
    }
    assert corpus.held_out == ("valid",)
    assert corpus.source.description == "a.txt, t.txt"


def test_held_out_has_bounds(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a\nb\nc")
    assert [
        len(split) for split in load_corpus(DataConfig(train_file=path), 0).splits.values()
    ] == [1, 1, 1]
    monkeypatch.setattr(corpora, "HELD_OUT_MOST", 3)
    path = write(tmp_path / "b.txt", "\n".join(LINES))
    assert len(load_corpus(DataConfig(train_file=path), 0).splits["valid"]) == 3


def test_too_few_to_hold_out(tmp_path):
    message = error_of(DataConfig(train_file=write(tmp_path / "a.txt", "a\nb\n")))
    assert "a.txt has 2 sentences" in message
    assert "at least 3" in message
    message = error_of(DataConfig(train_file=write(tmp_path / "b.txt", "a\nb\na\nb\n")))
    assert "b.txt has 2 different sentences" in message
    assert "built-in" in error_of(DataConfig(builtin_size=2))
    assert "built-in" in error_of(DataConfig(builtin_size=0))


def test_the_corpus_keeps_its_files_where_it_is_told(tmp_path):
    path, work = write(tmp_path / "a.txt", "x\ny"), tmp_path / "work"
    work.mkdir()
    corpus = corpora.load_corpus(source_of(three(path)), 0, work)
    assert corpus.splits["train"]["text"][:] == ["x", "y"]
    assert sorted(entry.name for entry in work.iterdir()) == [
        "test.arrow",
        "train.arrow",
        "valid.arrow",
    ]


# Bad sources


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", ["a.txt", "empty"]),
        ("a.txt", b" \n\r\n\t", ["a.txt", "only 3 blank"]),
        ("a.txt", b"fine\nfine\nna\xefve\n", ["a.txt:3", "UTF-8", "0xef", "column 3"]),
        ("a.txt", "x\n".encode("utf-16"), ["a.txt:1", "UTF-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["a.jsonl:2", "UTF-8"]),
        ("a.csv", b"text\na\n\xe9\n", ["a.csv:3", "UTF-8"]),
        ("a.docx", b"PK", ["a.docx", ".txt", ".jsonl", ".parquet"]),
        ("a.jsonl", b'{"text": "a"}\n{"text: 3}\n', ["a.jsonl:2", "json"]),
        ("a.jsonl", b'"a"\n', ["a.jsonl:1", "object", "str"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', ["a.jsonl:2", "text", "null"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', ["a.jsonl:2", "text", "int"]),
        (
            "a.jsonl",
            b'{"texts": "a", "id": 1}\n',
            ["a.jsonl:1", "'texts', 'id'", "--text_column texts"],
        ),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', ["a.jsonl:1", "surrogate"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": []}', ["a.jsonl:2", "list"]),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]', ["a.json:1", "array", "one object per line"]),
        ("a.json", b'\n[\n{"text": "a"},', ["a.json:2", "array", "one object per line"]),
        ("a.json", b'{\n"text": "a"}', ["a.json:1", "not valid json", "one object per line"]),
        ("a.csv", b"text,n\nhello, world,1\n", ["a.csv:2", "3 fields", "header has 2"]),
        ("a.csv", b"n,text\n1,a\n2\n", ["a.csv:3", "1 fields"]),
        ("a.csv", b'n,text\n1,"a\n2,b\n', ["a.csv", "csv"]),
        ("a.csv", b'n,text\n1,x\n2,"a\n3,b"\n', ["a.csv:3", "until line 4", "quotes"]),
        ("a.csv", b'n,text\n"1\n2",b\n', ["a.csv:2", "until line 3"]),
        ("a.tsv", b"text\tn\na\tb\t1\n", ["a.tsv:2", "3 fields", "header has 2", "tabs"]),
        ("a.csv", b"sentence,n\na,1\n", ["a.csv", "'sentence', 'n'", "--text_column"]),
        ("a.csv", b"text,n\n", ["a.csv", "no sentences"]),
        ("a.parquet", b"no parquet", ["a.parquet", "parquet"]),
    ],
)
def test_bad_file(tmp_path, name, content, said):
    write(tmp_path / "good.txt", "\n".join(LINES))
    bad = write(tmp_path / name, content)
    for data in (
        DataConfig(train_file=bad),
        DataConfig(train_file=str(tmp_path / "good.txt"), test_file=bad),
    ):
        message = error_of(data)
        assert all(part in message for part in said), message


def test_bad_parquet_values(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert f"{path}, row 2" in error_of(three(path))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert "row 1" in error_of(three(path))
    pq.write_table(pa.table({"texts": ["a"]}), path)
    assert "--text_column texts" in error_of(three(path))


def test_paths_that_are_no_files(tmp_path):
    write(tmp_path / "train.txt", "a\n")
    message = error_of(DataConfig(train_file=str(tmp_path / "trian.txt")))
    assert "no such file" in message
    assert "train.txt?" in message
    assert "directory" in error_of(DataConfig(train_file=str(tmp_path)))
    os.mkfifo(tmp_path / "pipe.txt")
    assert "regular file" in error_of(DataConfig(train_file=str(tmp_path / "pipe.txt")))


def test_contradictions(tmp_path):
    path = write(tmp_path / "a.txt", "a\n")
    assert "--dataset and --valid_file" in error_of(DataConfig(dataset="x", valid_file=path))
    assert "without --train_file" in error_of(DataConfig(test_file=path))


def test_bad_data_sets(tmp_path):
    assert "no/such-set" in error_of(DataConfig(dataset="no/such-set"))
    name = local_dataset(tmp_path, train=LINES)
    assert "'text'" in error_of(DataConfig(dataset=name, text_column="sentence"))
    assert "nonsense" in error_of(DataConfig(dataset=f"{name}:nonsense"))


def test_data_set_without_train(tmp_path):
    assert "no split train, only test" in error_of(
        DataConfig(dataset=local_dataset(tmp_path, test=LINES))
    )


# What tells sources apart


def test_fingerprint(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(LINES))
    base = fingerprint(DataConfig(train_file=path), seed=0)
    json.dumps(base)
    (tmp_path / "elsewhere").mkdir()
    assert (
        fingerprint(
            DataConfig(train_file=write(tmp_path / "elsewhere" / "a.txt", "\n".join(LINES))), 0
        )
        == base
    )
    assert fingerprint(DataConfig(train_file=path), seed=1) != base
    assert fingerprint(DataConfig(train_file=path, text_column="unused"), seed=0) == base
    assert fingerprint(DataConfig(train_file=path, valid_file=path), seed=0) != base
    assert fingerprint(three(path), seed=0) == fingerprint(three(path), seed=1)
    write(tmp_path / "a.txt", "\n".join(reversed(LINES)))
    assert fingerprint(DataConfig(train_file=path), seed=0) != base
    builtin = fingerprint(DataConfig(), seed=0)
    assert builtin == fingerprint(DataConfig(max_tokens=3), seed=0)
    assert builtin != fingerprint(DataConfig(builtin_size=30), seed=0)
    assert builtin != fingerprint(DataConfig(builtin_seed=1), seed=0)


def test_fingerprint_of_a_data_set(tmp_path):
    name = local_dataset(tmp_path, train=LINES, valid=["v"], test=["t"])
    base = fingerprint(DataConfig(dataset=name), seed=0)
    assert base == fingerprint(DataConfig(dataset=name), seed=1)
    write(tmp_path / "set" / "test.jsonl", '{"text": "other, and longer"}\n')
    assert base != fingerprint(DataConfig(dataset=name), seed=0)


def test_held_out_sizes_follow_the_rule():
    for total in (3, 19, 40, 59, 60, 99):
        splits = {
            "train": datasets.Dataset.from_dict({"text": [str(number) for number in range(total)]})
        }
        corpora._hold_out(splits, ("valid", "test"), 0, "here")
        assert len(splits["valid"]) == len(splits["test"]) == max(1, int(np.floor(total * 5 / 100)))
        assert (
            len({*splits["train"]["text"], *splits["valid"]["text"], *splits["test"]["text"]})
            == total
        )


# Streams, first sentences, mixtures


def test_a_stream_gives_what_the_download_gives(tmp_path):
    name = local_dataset(tmp_path, train=LINES, validation=[" v ", ""])
    whole, stream = DataConfig(dataset=name), DataConfig(dataset=name, streaming=True)
    for split in SPLITS:
        assert texts(stream, split) == texts(whole, split)
    assert fingerprint(stream, 0) == fingerprint(stream, 0) != fingerprint(whole, 0)
    assert "'text'" in error_of(DataConfig(dataset=name, streaming=True, text_column="sentence"))
    assert "no/such-set" in error_of(DataConfig(dataset="no/such-set", streaming=True))


def test_a_stream_is_read_no_further_than_asked(tmp_path, monkeypatch):
    """Its second file would break it off."""
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    rows = [json.dumps({"text": line}) + "\n" for line in LINES]
    write(folder / "train-0.jsonl", "".join(rows))
    write(folder / "train-1.jsonl", '{"text": "a"}\n{"text: 3}\n')
    options = {"dataset": str(tmp_path / "set"), "streaming": True}
    corpus = load_corpus(DataConfig(**options, max_sentences=150), seed=0)
    assert sum(map(len, corpus.splits.values())) == 150
    assert corpus.source.description.endswith("at most 150 of each")
    assert "cannot be read after row" in error_of(DataConfig(**options))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("downloaded"))
    load_corpus(DataConfig(**options, max_sentences=20), seed=0)


def test_the_class_names_of_a_stream(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "l": datasets.ClassLabel(names=["bad", "good"])}
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": LINES, "l": [1, 0] * 100}, features=features).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    name = str(tmp_path / "set")
    found = [
        load_corpus(DataConfig(dataset=name, streaming=streaming, label_column="l"), 0)
        for streaming in (False, True)
    ]
    assert found[0].splits["train"]["label"][:] == found[1].splits["train"]["label"][:]
    assert set(found[1].splits["train"]["label"]) == {"bad", "good"}


def test_the_first_sentences_of_every_file(tmp_path):
    data = three(write(tmp_path / "a.txt", "a\n\nb\nc\n"), max_sentences=3)
    assert texts(data) == texts(data, "test") == ["a", "b"]  # a blank one counts as read
    assert fingerprint(data, 0) == {**fingerprint(three(data.train_file), 0), "max_sentences": 3}
    assert sum(map(len, load_corpus(DataConfig(max_sentences=50), 0).splits.values())) == 50


def test_a_mixture_keeps_the_files_apart(tmp_path):
    one = write(tmp_path / "a.txt", "\n".join(LINES[:120]))
    two = write(tmp_path / "b.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in LINES[90:]))
    data = DataConfig(train_file=f"{one}, {two}", weights=[1, 1])
    corpus = load_corpus(data, seed=0)
    assert corpus.source.files == ("a.txt", "b.jsonl")
    assert corpus.source.description == "a.txt, b.jsonl"
    train = corpus.splits["train"]
    assert train["part"][:] == sorted(train["part"])
    for part, lines in enumerate((LINES[:120], LINES[90:])):
        own = [t for t, p in zip(train["text"], train["part"], strict=True) if p == part]
        assert own == [line for line in lines if line in set(own)]
    # 5% of the 200 different sentences each
    assert [len(set(corpus.splits[name]["text"])) for name in SPLITS] == [180, 10, 10]
    assert fingerprint(data, 0)["files"]["train"][::2] == ["a.txt", "b.jsonl"]
    other = DataConfig(train_file=data.train_file, weights=[3, 1])
    assert fingerprint(other, 0) == fingerprint(data, 0)  # the same sentences


def test_mixtures_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(LINES))
    assert "give --data.weights too" in error_of(DataConfig(train_file=f"{path},{path}"))
    assert "b.txt" in error_of(DataConfig(train_file=f"{path},{tmp_path}/b.txt", weights=[1, 1]))
    # A name may have a comma.
    assert texts(three(write(tmp_path / "a,b.txt", "x\ny"))) == ["x", "y"]
