"""Clusters, classes and tags of sentences: against forward passes of single sentences."""

import io
import json
import re
import sys

import pytest
import torch
from small_models import make_vae, small_tokenizer

from dsvae.cli import main
from dsvae.data.records import Record
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE
from dsvae.generation.labelling import Tagged, classify_stream, cluster_stream, tag_stream
from dsvae.generation.reading import Line

TEXTS = [
    "a bad bee",
    "the cab had a bed",
    "abe",
    "he  had the beach-ball, cab bad bed",
    "each ace bathed",
    "a tea",
    "dad had the bad tea the cab had",
]
CONDITIONS = ["bad bee", "cab bed cab", "tea", "a beach ball", "ace", "tea", "had a bed"]
CLASSES = ("animal", "none", "tool")
TAGS = ("B-A", "B-B", "I-A", "I-B", "O")
HEADS = {"clusters": 5, "classes": CLASSES, "tags": TAGS}
STREAM = [f" {TEXTS[0]}\n", "\n", *TEXTS[1:], "  "]
NUMBERS = [1, *range(3, len(TEXTS) + 2)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer([*TEXTS, "- ,"] * 3, 60)


@pytest.fixture(scope="module")
def vae(tokenizer):
    return SentenceVAE(make_vae(**HEADS), tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def conditional(tokenizer):
    return SentenceVAE(make_vae(conditional=True, prior="learned", **HEADS), tokenizer)


def forward(vae, text, condition=None):
    """The output for one sentence, with a label at the first piece of each word."""
    found = vae.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    ids, spans = found.input_ids, found.offset_mapping[0].tolist()
    labels = torch.full_like(ids, -100)
    for word in re.finditer(r"\S+", text):
        pieces = [i for i, (a, b) in enumerate(spans) if a < word.end() and b > word.start()]
        labels[0, pieces[0]] = 0
    given = {}
    if condition is not None:
        given["condition_ids"] = c = vae.tokenizer(condition, return_tensors="pt").input_ids
        ids = torch.cat([c, ids], dim=1)
        labels = torch.cat([torch.full_like(c, -100), labels], dim=1)
    with torch.no_grad():
        return vae.model(ids, tag_labels=labels, encode_only=True, **given)


def tags_of(out):
    return [TAGS[tag] for tag in out.tags[0].tolist() if tag != -100]


@pytest.mark.parametrize("kind", ["plain", "conditional"])
def test_each_head_says_what_it_says_of_single_sentences(vae, conditional, kind):
    model = vae if kind == "plain" else conditional
    conditions = [None] * len(TEXTS) if kind == "plain" else CONDITIONS
    lines = [Line(*each) for each in zip(NUMBERS, TEXTS, conditions, strict=True)]
    records = [Record(line.text, line.condition) for line in lines]
    stream = [records[0], Record(""), *records[1:]] if kind == "conditional" else STREAM
    outs = [forward(model, line.text, line.condition) for line in lines]

    found = list(cluster_stream(model, stream))
    assert [(line, best) for line, best, _ in found] == [
        (line, int(out.clusters.argmax())) for line, out in zip(lines, outs, strict=True)
    ]
    assert [p for *_, p in found] == pytest.approx([float(out.clusters.max()) for out in outs])
    assert len({best for _, best, _ in found}) > 1

    found = list(classify_stream(model, stream))
    scores = [torch.softmax(out.class_logits[0].double(), 0) for out in outs]
    assert [(line, name) for line, name, _ in found] == [
        (line, CLASSES[int(each.argmax())]) for line, each in zip(lines, scores, strict=True)
    ]
    assert [p for *_, p in found] == pytest.approx([float(each.max()) for each in scores])

    assert list(tag_stream(model, stream)) == [
        (line, Tagged(line.text.split(), tags_of(out)))
        for line, out in zip(lines, outs, strict=True)
    ]
    assert len({tag for out in outs for tag in tags_of(out)}) > 2


def test_what_is_skipped_and_cut_is_counted(vae, tokenizer):
    for stream_of in (cluster_stream, classify_stream, tag_stream):
        short = SentenceVAE(vae.model, tokenizer, batch_size=2, max_tokens=6)
        assert [line.line for line, *_ in stream_of(short, STREAM)] == NUMBERS
        long = sum(len(tokenizer(text).input_ids) > 6 for text in TEXTS)
        assert (short.counts.blank, short.counts.truncated) == (2, long)
        assert 0 < long < len(TEXTS)
    # A cut sentence has the words that the model has read, with a tag each.
    for line, (words, tags) in tag_stream(short, STREAM):
        assert words == line.text.split()[: len(words)]
        assert len(words) == len(tags) > 0


def test_entities_are_named_by_their_words():
    tagged = Tagged(["the", "old", "king", "sang", "."], ["O", "B-A", "I-A", "O", "B-B"])
    assert tagged.entities == [
        {"type": "A", "first": 1, "last": 2, "text": "old king"},
        {"type": "B", "first": 4, "last": 4, "text": "."},
    ]


def test_a_model_without_the_head_is_refused(tokenizer, conditional):
    bare = SentenceVAE(make_vae(), tokenizer)
    for stream_of, name in (
        (cluster_stream, "clusters"),
        (classify_stream, "classes"),
        (tag_stream, "tags"),
    ):
        with pytest.raises(UserError, match=f"the model has no {name}: give one") as caught:
            next(stream_of(bare, TEXTS))
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="no condition is given"):
            next(stream_of(conditional, TEXTS))


# The commands


def save(vae, directory):
    vae.model.save_pretrained(directory)
    vae.tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def model_dir(vae, tmp_path_factory):
    return save(vae, tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def run(capsys):
    def call(*words, code=0):
        assert main([*map(str, words), "--device", "cpu"]) == code
        return capsys.readouterr()

    return call


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_the_commands_print_what_the_functions_give(run, vae, model_dir, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{each.strip()}\n" for each in STREAM))
    clusters = list(cluster_stream(vae, TEXTS))
    out, err = run("cluster", model_dir, path)
    assert out == "".join(f"{best}\t{p:.4f}\t{line.text}\n" for line, best, p in clusters)
    assert err == "dsvae: 2 blank sentences skipped\n"
    rows = objects(run("cluster", model_dir, path, "--json").out)
    assert [(row["line"], row["sentence"]) for row in rows] == list(
        zip(NUMBERS, TEXTS, strict=True)
    )
    assert [row["cluster"] for row in rows] == [best for _, best, _ in clusters]
    assert [row["probability"] for row in rows] == pytest.approx([p for *_, p in clusters])

    classes = list(classify_stream(vae, TEXTS))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    out, _ = run("classify", model_dir, "--batch_size", 2)
    assert out == "".join(f"{name}\t{p:.4f}\t{line.text}\n" for line, name, p in classes)
    rows = objects(run("classify", model_dir, path, "--json").out)
    assert [row["class"] for row in rows] == [name for _, name, _ in classes]

    tagged = [found for _, found in tag_stream(vae, TEXTS)]
    out, _ = run("tag", model_dir, path)
    blocks = [
        [tuple(line.split("\t")) for line in block.splitlines()]
        for block in out.removesuffix("\n\n").split("\n\n")
    ]
    assert blocks == [list(zip(*found, strict=True)) for found in tagged]
    rows = objects(run("tag", model_dir, path, "--json").out)
    assert [(row["words"], row["tags"], row["entities"]) for row in rows] == [
        (found.words, found.tags, found.entities) for found in tagged
    ]
    assert [row["line"] for row in rows] == NUMBERS


def test_the_commands_read_columns(run, conditional, tmp_path):
    model_dir = save(conditional, tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    pairs = list(zip(TEXTS, CONDITIONS, strict=True))
    path.write_text("".join(json.dumps({"x": x, "c": c}) + "\n" for x, c in pairs))
    records = [Record(*pair) for pair in pairs]
    source = (path, "--text_column", "x", "--condition_column", "c", "--json")
    rows = objects(run("cluster", model_dir, *source).out)
    found = list(cluster_stream(conditional, records))
    assert [row["cluster"] for row in rows] == [best for _, best, _ in found]
    assert [row["condition"] for row in rows] == CONDITIONS
    rows = objects(run("tag", model_dir, *source).out)
    assert [row["tags"] for row in rows] == [t.tags for _, t in tag_stream(conditional, records)]
    assert "no condition is given" in run("tag", model_dir, path, "--text_column", "x", code=2).err


@pytest.mark.parametrize("name", ["cluster", "classify", "tag"])
def test_mistakes_of_the_commands_are_one_line(run, tokenizer, model_dir, tmp_path, name, capsys):
    bare = save(SentenceVAE(make_vae(), tokenizer), tmp_path / "bare")
    capsys.readouterr()  # the progress of saving
    path = tmp_path / "text.txt"
    path.write_text("a bed\n")
    (tmp_path / "blank.txt").write_text("\n")
    for words, message in (
        ((bare, path), "the model has no "),
        ((model_dir, tmp_path / "blank.txt"), "has no sentences"),
        ((model_dir, tmp_path / "none.txt"), "no such file"),
        ((model_dir, path, "--condition_column", "c"), "has no columns"),
    ):
        out, err = run(name, *words, code=2)
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
