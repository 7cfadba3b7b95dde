"""Tokenizers and the cache of tokenized corpora. Every tokenizer is built here: nothing
comes from the network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config

from dsvae.config import DataConfig
from dsvae.data import prepared as cache
from dsvae.data import tokenization
from dsvae.data.grammar import generate
from dsvae.data.prepared import load_prepared, prepare
from dsvae.data.record_tokens import encode
from dsvae.data.tokenization import load_tokenizer
from dsvae.data.tokenizer_training import train_tokenizer
from dsvae.errors import UserError

YELP = Path(__file__).parents[3] / "shared" / "data" / "yelp"
SENTENCES = [item.text for item in generate(1500, seed=1)]


def config(tmp_path, lines: list[str], **options) -> DataConfig:
    """All three splits from one file, the cache beside it."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    file = str(path)
    return DataConfig(
        train_file=file,
        valid_file=file,
        test_file=file,
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


def entries(tmp_path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "cache").iterdir())


# The trained tokenizer


def test_trained_tokenizer_spells_and_reads_back(trained):
    assert (trained.pad_token_id, trained.eos_token_id, trained.unk_token_id) == (0, 1, 2)
    assert 376 == len(trained) == len(set(trained.get_vocab().values()))
    for sentence in SENTENCES[:200]:
        ids = trained(sentence)["input_ids"]
        assert ids[-1] == 1
        assert not {0, 1, 2} & set(ids[:-1])
        assert trained.decode(ids, skip_special_tokens=True) == sentence
    # Frequent words are pieces of their own, and a mark is no part of a word.
    assert trained.tokenize("The kings did not find the lamp.")[-1] == "."
    assert " not" in trained.tokenize("The kings did not find the lamp.")
    # What has no piece is spelled in its UTF-8 bytes.
    assert trained.tokenize("日")[1:] == ["<0xE6>", "<0x97>", "<0xA5>"]


ODD_TEXTS = [
    "THE KINGS SEE A DOG",
    "it 's n't good , he said .",
    'Don\'t "quote" me: 3.50 €!',
    "日本語の文、 🎉👩‍👩‍👧 naïve cafe\u0301 Привет ـمرحبا",
    "½ ﬁ Ⅳ",  # NFKC would change each
    " a space before, two  inside and two after  ",
    "tab\there, a line\nand a lone \r, \x00 \u2028 \ufffd",
    "</s> <pad> <unk> <0x41> Ġ ▁",
    " ",
    "",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_trained_tokenizer_reads_every_text_back(trained, text):
    """None of these characters is in the sentences that it was trained on."""
    ((ids, truncated),) = tokenization.token_ids([text], trained, 10_000)
    assert not truncated
    assert not {0, 1, 2} & set(ids[:-1])
    assert trained.decode(ids, skip_special_tokens=True) == text
    assert trained.decode(ids[:-1]) == text


def test_every_byte_is_predicted(tmp_path):
    """Bits per byte divide by the bytes of the text: a word in capitals or in another
    script must cost its own tokens, and not one unknown piece."""
    lines = [*SENTENCES[:300], "ABRACADABRA", "абракадабра"]
    path = prepare(config(tmp_path, lines), tokenizer=None, vocab_size=300, seed=0)
    prepared = load_prepared(path)
    assert prepared.report["splits"]["test"]["unk"] == 0
    split = prepared.splits["test"]
    assert split.bytes.tolist() == [len(line.encode()) for line in lines]
    # 11 letters, and 22 bytes; pieces of the sentences have two capitals at most
    assert split.lengths[-2] >= 7
    assert split.lengths[-1] >= 12


def test_bytes_are_those_that_the_ids_can_spell(tmp_path, t5):
    """A pretrained tokenizer may have no piece for a character; its bytes do not
    count."""
    data = config(tmp_path, ["abc", "abc 日本語 def", "日本"])
    prepared = load_prepared(prepare(data, tokenizer=t5, vocab_size=None, seed=0))
    split = prepared.splits["train"]
    assert prepared.report["splits"]["train"]["unk"] == 2
    assert split.bytes[0] == 3
    assert len("abcdef") <= split.bytes[1] <= len("abc  def")
    assert split.bytes[2] <= 1


@pytest.mark.parametrize("most", range(2, 12))
def test_a_cut_through_a_character_counts_whole_ones(trained, most):
    text = "日本語"
    columns = encode({"text": [text]}, trained, most).table.to_pydict()
    # the space before the first word, 9 bytes and EOS
    assert columns["truncated"] == [most < 11]
    spelled = columns["bytes"][0] if columns["bytes"] else 0
    # the space before the first word and EOS take a token each
    assert spelled == max(0, min(most - 2, 9)) // 3 * 3


def test_trained_tokenizer_is_the_same_in_every_process(trained):
    def serialized() -> str:
        return train_tokenizer(iter(SENTENCES), 376).backend_tokenizer.to_str()

    expected = trained.backend_tokenizer.to_str()
    assert serialized() == expected
    script = (
        "import hashlib; from dsvae.data.grammar import generate; "
        "from dsvae.data.tokenizer_training import train_tokenizer;"
        "t = train_tokenizer([item.text for item in generate(1500, seed=1)], "
        "376).backend_tokenizer.to_str();"
        "print(hashlib.sha256(t.encode()).hexdigest())"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path(tokenization.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[-1] == hashlib.sha256(expected.encode()).hexdigest()


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_trained_tokenizer_survives_saving(trained, tmp_path, beside_a_model):
    if beside_a_model:
        T5Config().save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    odd = ["  two  spaces", "</s> <pad>", "日本", "", *SENTENCES[:50]]
    assert loaded(odd)["input_ids"] == trained(odd)["input_ids"]
    ids = trained(SENTENCES[0])["input_ids"]
    assert loaded.decode(ids) == trained.decode(ids)
    assert loaded.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_vocabulary_bounds():
    with pytest.raises(UserError, match=r"of 259 pieces .* give --model\.vocab_size 260 or more"):
        train_tokenizer(SENTENCES, 259)
    for size in range(260, 300, 3):
        tokenizer = train_tokenizer(SENTENCES[:20], size)
        assert len(tokenizer) == size
        for text in SENTENCES[:20]:
            ids = tokenizer(text)["input_ids"]
            assert 2 not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    small = train_tokenizer(["the cat"], 5000)
    assert len(small) < 256 + 30
    assert small.decode(small("the cat")["input_ids"], skip_special_tokens=True) == "the cat"
    # Rare characters give way where they would fill the vocabulary.
    many = train_tokenizer(
        ["the cat " * 20_000, "".join(map(chr, range(0x4E00, 0x4E00 + 7)))], 256 + 12
    )
    assert many.tokenize("一")[-3:] == ["<0xE4>", "<0xB8>", "<0x80>"]


# Loading


def test_load_tokenizer(t5, byt5):
    assert load_tokenizer(t5)("the")["input_ids"][-1] == 1
    assert load_tokenizer(byt5)("a")["input_ids"] == [ord("a") + 3, 1]


def test_load_tokenizer_that_is_not_there(tmp_path, trained):
    def error(name) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(name))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such directory" in error(tmp_path / "nowhere")
    assert "no-such/model" in error("no-such/model")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error(tmp_path / "empty")
    # transformers would make an empty T5 tokenizer here
    T5Config().save_pretrained(tmp_path / "only_config")
    assert "no tokenizer" in error(tmp_path / "only_config")
    trained.save_pretrained(tmp_path / "no_pad")
    settings = tmp_path / "no_pad" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": None}))
    assert "no pad token" in error(tmp_path / "no_pad")


# Tokenized splits


def test_prepared_split(tmp_path, trained):
    lines = ["the king", "a box of ünïcode", "the king", "  ", "an old red box is a box ! " * 20]
    trained_dir = tmp_path / "tok"
    trained.save_pretrained(trained_dir)
    prepared = load_prepared(
        prepare(
            config(tmp_path, lines, max_tokens=25),
            tokenizer=str(trained_dir),
            vocab_size=None,
            seed=0,
        )
    )
    split = prepared.splits["train"]
    assert len(split) == 4
    expected = [trained(line.strip())["input_ids"] for line in lines if line.strip()]
    expected[3] = [*expected[3][:24], 1]
    assert [row.tolist() for row in split.rows([3, 0, 1, 2])] == [
        expected[3],
        expected[0],
        expected[1],
        expected[2],
    ]
    assert split.ids(1).tolist() == expected[1]
    assert split.ids(1).dtype == np.int64
    assert split.lengths.tolist() == list(map(len, expected))
    assert split.lengths.dtype == np.int32
    kept = trained.decode(expected[3], skip_special_tokens=True)
    assert kept.startswith("an old")
    assert split.truncated.tolist() == [False, False, False, True]
    assert split.words.tolist() == [2, 4, 2, len(kept.split())]
    assert split.bytes.tolist() == [8, len("a box of ünïcode".encode()), 8, len(kept.encode())]
    figures = prepared.report["splits"]["train"]
    assert figures == {
        "sentences": 4,
        "tokens": sum(map(len, expected)),
        "words": int(split.words.sum()),
        "bytes": int(split.bytes.sum()),
        "unk": sum(ids.count(2) for ids in expected),
        "truncated": 1,
        "skipped_blank": 1,
        "repeated": 1,
        "held_out": False,
    }
    assert figures["unk"] == 0
    assert prepared.report["splits"]["test"]["in_train"] == 4  # it is the same file
    assert prepared.report["source"] == "lines.txt"
    with pytest.raises(IndexError):
        split.ids(4)
    with pytest.raises(IndexError):
        split.rows([-1])
    assert split.rows([]) == []


def test_longest_sentence_that_fits(tmp_path, byt5):
    data = config(tmp_path, ["abcd", "abcde", "abé", "abcé"], max_tokens=5)
    split = load_prepared(prepare(data, tokenizer=byt5, vocab_size=None, seed=0)).splits["train"]
    assert split.lengths.tolist() == [5, 5, 5, 5]
    assert split.truncated.tolist() == [False, True, False, True]
    assert split.bytes.tolist() == [4, 4, 4, 3]  # half of the last é is no text


def test_rows_across_chunks(tmp_path, byt5, monkeypatch):
    monkeypatch.setattr(cache, "BATCH_ROWS", 7)
    lines = [f"line {number}" for number in range(50)]
    prepared = load_prepared(
        prepare(config(tmp_path, lines), tokenizer=byt5, vocab_size=None, seed=0)
    )
    longest = sorted((len(line) + 1 for line in lines), reverse=True)
    for most in (1, 12, 50, 60):
        assert prepared.longest("both", most).tolist() == longest[:most]
    split = prepared.splits["test"]
    split = tokenization.TokenizedSplit(
        datasets.concatenate_datasets([split.dataset, split.dataset])
    )
    assert len(split.dataset.data.column("input_ids").chunks) > 2
    order = np.random.default_rng(0).permutation(100)
    texts = [bytes((row[:-1] - 3).astype(np.uint8)).decode() for row in split.rows(order)]
    assert texts == [lines[index % 50] for index in order]
    assert split.lengths.tolist() == [len(line) + 1 for line in lines * 2]
    assert split.lengths_of(order).tolist() == split.lengths[order].tolist()


def test_several_processes_tokenize_a_large_corpus(tmp_path, byt5, monkeypatch):
    monkeypatch.setattr(cache, "BATCH_ROWS", 7)
    monkeypatch.setattr(cache, "_ROWS_PER_PROCESS", 20)
    monkeypatch.setattr(cache, "usable_cores", lambda: 3)
    used, map_batches = [], cache.map_batches

    def watched(function, split, rows, processes):
        used.append(processes)
        return map_batches(function, split, rows, processes)

    monkeypatch.setattr(cache, "map_batches", watched)
    lines = [f"line {number}" for number in range(49)] + ["longer than the others"]
    (tmp_path / "few.txt").write_text("a line\n")
    few = {f"{split}_file": str(tmp_path / "few.txt") for split in ("valid", "test")}
    data = dataclasses.replace(config(tmp_path, lines, max_tokens=10), **few)
    prepared = load_prepared(prepare(data, tokenizer=byt5, vocab_size=None, seed=0))
    assert used == [2, 0, 0]
    split, figures = prepared.splits["train"], prepared.report["splits"]["train"]
    texts = [bytes((row[:-1] - 3).astype(np.uint8)).decode() for row in split.rows(range(50))]
    assert texts == [line[:9] for line in lines]
    counted = {name: figures[name] for name in ("sentences", "tokens", "words", "truncated")}
    assert counted == {
        "sentences": 50,
        "tokens": sum(len(text) + 1 for text in texts),
        "words": 2 * 49 + 2,
        "truncated": 1,
    }


@pytest.mark.parametrize("kind", ["t5", "byt5", "trained"])
def test_special_tokens_in_the_text_end_no_sentence(tmp_path, kind, request):
    lines = ["the cat </s> is <pad>", "</s>", "the </s>", "<pad></s><pad>"]
    if kind == "trained":
        path = prepare(config(tmp_path, lines), tokenizer=None, vocab_size=300, seed=0)
    else:
        path = prepare(
            config(tmp_path, lines),
            tokenizer=request.getfixturevalue(kind),
            vocab_size=None,
            seed=0,
        )
    prepared = load_prepared(path)
    rows = prepared.splits["train"].rows(range(4))
    for row in rows:
        assert row[-1] == 1
        assert len(row) > 1
        assert not np.isin(row[:-1], [0, 1]).any()
    if kind != "t5":  # these can spell them out
        assert [prepared.tokenizer.decode(row[:-1]) for row in rows] == lines
        assert prepared.report["splits"]["train"]["unk"] == 0


def test_text_of_which_nothing_is_left(tmp_path, trained):
    trained.save_pretrained(tmp_path / "tok")
    tokenizer = load_tokenizer(str(tmp_path / "tok"))
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []
    found = encode({"text": ["", "king"]}, tokenizer, 8)
    assert found.kept == [1]
    assert len(found.table) == found.figures["sentences"] == found.figures["blank"] == 1


def test_content_keys(tmp_path, byt5):
    lines = ["a", "b", "a", "c", "a", "b"]
    keys = {}
    for name, order in {"one": lines, "two": lines[::-1], "fewer": lines[1:]}.items():
        (tmp_path / name).mkdir()
        path = prepare(config(tmp_path / name, order), tokenizer=byt5, vocab_size=None, seed=0)
        keys[name] = load_prepared(path).splits["train"].content_keys
    assert keys["one"].dtype == np.uint64
    assert len(set(keys["one"].tolist())) == 6
    assert set(keys["one"].tolist()) == set(keys["two"].tolist())
    assert keys["one"][3] == keys["two"][2]  # the only "c"
    assert keys["one"][0] == keys["two"][1]  # the first "a" of each order
    assert set(keys["fewer"].tolist()) < set(keys["one"].tolist())


# The cache


def test_cache_hits_by_content_and_options(tmp_path, byt5, t5, monkeypatch):
    data = config(tmp_path, SENTENCES[:60])
    first = prepare(data, tokenizer=byt5, vocab_size=None, seed=0)
    assert entries(tmp_path) == [first.name]
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_fill", lambda *_: pytest.fail("made again"))
        assert prepare(data, tokenizer=byt5, vocab_size=None, seed=0) == first
        # Nothing is held out here, so the seed decides nothing.
        assert prepare(data, tokenizer=byt5, vocab_size=None, seed=1) == first
    ByT5Tokenizer().save_pretrained(tmp_path / "copy")
    assert prepare(data, tokenizer=str(tmp_path / "copy"), vocab_size=None, seed=0) == first
    others = [
        prepare(
            config(tmp_path, SENTENCES[:60], max_tokens=9), tokenizer=byt5, vocab_size=None, seed=0
        ),
        prepare(config(tmp_path, SENTENCES[:61]), tokenizer=byt5, vocab_size=None, seed=0),
        prepare(config(tmp_path, SENTENCES[:60]), tokenizer=t5, vocab_size=None, seed=0),
        prepare(config(tmp_path, SENTENCES[:60]), tokenizer=None, vocab_size=300, seed=0),
        prepare(config(tmp_path, SENTENCES[:60]), tokenizer=None, vocab_size=301, seed=0),
    ]
    assert len({first, *others}) == 6
    assert entries(tmp_path) == sorted(path.name for path in {first, *others})


def test_entry_holds_what_it_says(tmp_path):
    data = DataConfig(builtin_size=100, cache_dir=str(tmp_path / "cache"))
    path = prepare(data, tokenizer=None, vocab_size=300, seed=0)
    assert sorted(entry.name for entry in path.iterdir()) == [
        "report.json",
        "test.arrow",
        "tokenizer",
        "train.arrow",
        "valid.arrow",
    ]
    prepared = load_prepared(path)
    assert {name: len(split) for name, split in prepared.splits.items()} == {
        "train": 90,
        "valid": 5,
        "test": 5,
    }
    assert [prepared.report["splits"][name]["held_out"] for name in ("train", "valid", "test")] == [
        False,
        True,
        True,
    ]
    assert prepared.report["vocab_size"] == len(prepared.tokenizer) == 300
    assert prepare(data, tokenizer=None, vocab_size=300, seed=1) != path


def test_default_place(tmp_path, byt5, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    data = config(tmp_path, SENTENCES[:5])
    data.cache_dir = None
    assert (
        prepare(data, tokenizer=byt5, vocab_size=None, seed=0).parent == tmp_path / "hf" / "dsvae"
    )
    assert [entry.name for entry in (tmp_path / "hf").iterdir()] == ["dsvae"]


@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt(), UserError("bad line"), OSError(28, "No space left on device")]
)
def test_a_cut_write_leaves_nothing(tmp_path, byt5, monkeypatch, fault):
    data = config(tmp_path, SENTENCES[:5])
    tokenize = cache._tokenize

    def cut(corpus, name, *rest):
        if name == "test":
            raise fault
        return tokenize(corpus, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_tokenize", cut)
        expected = UserError if isinstance(fault, OSError) else type(fault)
        with pytest.raises(expected) as caught:
            prepare(data, tokenizer=byt5, vocab_size=None, seed=0)
    if isinstance(fault, OSError):
        assert "No space left" in str(caught.value)
        assert "cache_dir" in str(caught.value)
    assert entries(tmp_path) == []
    assert (
        len(load_prepared(prepare(data, tokenizer=byt5, vocab_size=None, seed=0)).splits["test"])
        == 5
    )


def test_leftovers_of_a_killed_run(tmp_path, byt5):
    """SIGKILL leaves a temporary directory: it is never read, and it is removed once
    nothing was written in it for a day, whatever its key."""
    data = config(tmp_path, SENTENCES[:5])
    path = prepare(data, tokenizer=byt5, vocab_size=None, seed=0)
    report = (path / "report.json").read_text()
    leftover = tmp_path / "cache" / f".{path.name}.0123.tmp"
    path.rename(leftover)
    (leftover / "report.json").unlink()
    assert prepare(data, tokenizer=byt5, vocab_size=None, seed=0) == path
    assert (path / "report.json").read_text() == report
    assert leftover.name in entries(tmp_path)
    other = leftover.with_name(".another.0123.tmp")
    live = leftover.with_name(".live.0123.tmp")
    for directory in (other, live):
        shutil.copytree(leftover, directory)
    day_ago = time.time() - 25 * 3600
    for directory in (leftover, other, live):
        for each in (*directory.rglob("*"), directory):
            if each != live / "train.arrow":
                os.utime(each, (day_ago, day_ago))
    path.rename(tmp_path / "moved")
    prepare(data, tokenizer=byt5, vocab_size=None, seed=0)
    assert entries(tmp_path) == [live.name, path.name]


def test_two_runs_at_once(tmp_path, byt5, monkeypatch):
    """Another run finishes the same entry while this one writes: its entry stands, and
    nothing else is left."""
    data = config(tmp_path, SENTENCES[:5])
    fill = cache._fill

    def overtaken(*arguments):
        monkeypatch.setattr(cache, "_fill", fill)
        prepare(data, tokenizer=byt5, vocab_size=None, seed=0)
        fill(*arguments)

    monkeypatch.setattr(cache, "_fill", overtaken)
    path = prepare(data, tokenizer=byt5, vocab_size=None, seed=0)
    assert entries(tmp_path) == [path.name]
    assert len(load_prepared(path).splits["train"]) == 5


def test_unwritable_cache(tmp_path, byt5):
    data = config(tmp_path, SENTENCES[:5])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*cache_dir"):
        prepare(data, tokenizer=byt5, vocab_size=None, seed=0)


def test_damaged_entry(tmp_path, byt5):
    path = prepare(config(tmp_path, SENTENCES[:5]), tokenizer=byt5, vocab_size=None, seed=0)
    (path / "train.arrow").unlink()
    with pytest.raises(UserError, match="damaged"):
        load_prepared(path)


def test_tokenizers_are_left_without_threads(tmp_path, byt5, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "x")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    prepare(config(tmp_path, SENTENCES[:5]), tokenizer=byt5, vocab_size=None, seed=0)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare(config(tmp_path, SENTENCES[:6]), tokenizer=byt5, vocab_size=None, seed=0)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.skipif(not YELP.is_dir(), reason="needs shared/data/yelp")
def test_real_text(tmp_path):
    file = str(YELP / "valid.txt")
    data = DataConfig(train_file=file, valid_file=file, test_file=file, cache_dir=str(tmp_path))
    prepared = load_prepared(prepare(data, tokenizer=None, vocab_size=2000, seed=0))
    split = prepared.splits["train"]
    lines = [
        line.strip()
        for line in (YELP / "valid.txt").read_text(encoding="utf-8").split("\n")
        if line.strip()
    ]
    read_back = prepared.tokenizer.batch_decode(split.rows(range(500)), skip_special_tokens=True)
    assert read_back == lines[:500]
    assert len(split) == len(lines)
    assert split.words.sum() == sum(len(line.split()) for line in lines)
    # No worse than two pieces a word, and no unknown ones.
    assert split.lengths.sum() < 2 * split.words.sum()
    assert prepared.report["splits"]["train"]["unk"] == 0
