"""The `dsvae` command: through `main` in this process, and in a few tests as the real
command in a shell."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import make_t5, make_vae, small_tokenizer
from transformers.utils import logging as transformers_logging

from dsvae import cli, command_line
from dsvae import config as configuration
from dsvae.cli import COMMANDS, main
from dsvae.config import field_types
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE
from dsvae.generation.latents import Latents

TEXTS = [
    "a bad bee",
    "the cab had a bed",
    "abe",
    "he had the beach ball",
    "each ace bathed",
    "a tea",
]
FEW = ("--max_new_tokens", "7", "--device", "cpu")
# Besides those that the model was trained for: what fire would read as Python, or as
# its own signs.
LITERAL = [
    "1, 2",
    "None",
    "[ok]",
    "True",
    "1.0",
    "{'a': 1}",
    "-",
    "- a bed",
    "(a)",
    '"a"',
    "a=b",
    "1e3",
    "0x1f",
]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer([*TEXTS, "1, 2 None [ok] True - = ( ) { } ' : \" . x"] * 3, 60)


def save(directory, tokenizer, **latent):
    make_vae(**latent).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def model_dir(tokenizer, tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "model", tokenizer)


@pytest.fixture(scope="module")
def vae(model_dir):
    return SentenceVAE.from_pretrained(model_dir, device="cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "text.txt").write_text("\n".join([TEXTS[0], "", *TEXTS[1:]]) + "\n")
    (directory / "labels.txt").write_text("pos\n\nneg\npos\nneg\npos\nneg\n")
    (directory / "text.csv").write_text("n,review\n" + "".join(f"1,{text}\n" for text in TEXTS))
    (directory / "empty.txt").write_text("")
    (directory / "blank.txt").write_text("\n  \n")
    (directory / "short.txt").write_text("pos\nneg\n")
    (directory / "one.txt").write_text("pos\n" * 7)
    (directory / "gap.txt").write_text("pos\n\nneg\n\nneg\npos\nneg\n")
    (directory / "latin.txt").write_bytes(b"a bed\ncaf\xe9\n")
    return directory


@pytest.fixture
def run(capsys):
    """Runs a command line that must succeed: its stdout."""

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def fail(capsys):
    """Runs a command line that must fail as a user error: its one line."""

    def call(*words):
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        errors = [line for line in err.splitlines() if not line.startswith("dsvae: seed")]
        assert len(errors) == 1, err
        assert errors[0].startswith("dsvae: error: ")
        return errors[0]

    return call


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# What the commands print


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "-n", "1", "--seed", "0", *FEW),
        ("reconstruct", "text.txt", *FEW),
        ("interpolate", "a tea", "abe", "--steps", "2", *FEW),
        ("encode", "text.txt", "--output", "latents", "--device", "cpu"),
        ("evaluate", "--test_file", "text.txt", "--output", "evaluation"),
    ],
    ids=lambda words: words[0],
)
def test_no_command_shows_the_bar_of_transformers(
    words, model_dir, corpus, tmp_path, monkeypatch, capsys
):
    transformers_logging.enable_progress_bar()  # as in a fresh process
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus / "text.txt", tmp_path)
    assert main([words[0], model_dir, *words[1:]]) == 0
    assert "Loading weights" not in capsys.readouterr().err


def test_sample_repeats_with_its_seed(run, vae, model_dir):
    words = ("sample", model_dir, "-n", 4, "--seed", 3, *FEW)
    expected = vae.sample(4, seed=3, max_new_tokens=7)
    assert objects(run(*words, "--json")) == [
        {"sample": i, "sentence": text} for i, text in enumerate(expected, 1)
    ]
    assert run(*words) == "".join(f"{i}  {text}\n" for i, text in enumerate(expected, 1))
    drawn = run(*words, "--do_sample", "--temperature", 1.5)
    assert drawn == run(*words, "--do_sample", "--temperature", 1.5)
    assert drawn != run(
        "sample", model_dir, "-n", 4, "--seed", 4, "--do_sample", "--temperature", 1.5, *FEW
    )


def test_sample_tells_a_fresh_seed_that_repeats_it(capsys, model_dir):
    words = ["sample", model_dir, "-n", "3", "--do_sample", *FEW]
    assert main(words) == 0
    out, err = capsys.readouterr()
    seed = re.search(r"--seed (\d+)", err)[1]
    assert main([*words, "--seed", seed]) == 0
    assert capsys.readouterr().out == out


def test_sample_of_the_aggregate_posterior_says_where_it_comes_from(run, model_dir, corpus):
    words = (
        "sample",
        model_dir,
        "-n",
        6,
        "--seed",
        1,
        "--json",
        "--source",
        "aggregate",
        "--file",
        corpus / "text.txt",
        *FEW,
    )
    rows = objects(run(*words))
    lines = (corpus / "text.txt").read_text().splitlines()
    assert [row["sample"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(lines[row["line"] - 1] == row["from"] for row in rows)
    assert objects(run(*words)) == rows


@pytest.mark.parametrize("batch_size", [2, 128])
def test_reconstruct_takes_files_and_stdin(run, vae, model_dir, corpus, monkeypatch, batch_size):
    words = ("reconstruct", model_dir, *FEW, "--batch_size", batch_size)
    found = vae.reconstruct(TEXTS, max_new_tokens=7)
    numbers = [1, 3, 4, 5, 6, 7]
    rows = [
        {"line": n, "sentence": text, "reconstruction": made}
        for n, text, made in zip(numbers, TEXTS, found, strict=True)
    ]
    assert objects(run(*words, corpus / "text.txt", "--json")) == rows
    pairs = [
        f"{n:>6}  {text}\n        {made}\n"
        for n, text, made in zip(numbers, TEXTS, found, strict=True)
    ]
    assert run(*words, "--file", corpus / "text.txt") == "".join(pairs)
    for source in ([], ["-"]):
        stdin(monkeypatch, (corpus / "text.txt").read_bytes())
        assert objects(run(*words, *source, "--json")) == rows
    csv = objects(run(*words, corpus / "text.csv", "--text_column", "review", "--json"))
    assert [row["reconstruction"] for row in csv] == found


def test_reconstruct_reports_on_stderr_what_was_not_taken_as_it_came(capsys, model_dir, corpus):
    assert (
        main(["reconstruct", model_dir, str(corpus / "text.txt"), *FEW, "--max_tokens", "4"]) == 0
    )
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 * len(TEXTS)
    assert "dsvae: 1 blank sentences skipped" in err
    assert re.search(r"dsvae: \d sentences truncated to 4 tokens \(--max_tokens\)", err)
    assert re.search(
        r"dsvae: \d generated sentences cut before their end \(--max_new_tokens\)", err
    )


def test_interpolate_analogy_and_traverse_print_what_the_class_gives(run, vae, model_dir):
    a, b, c = TEXTS[1], TEXTS[3], TEXTS[4]
    for path in ("linear", "slerp"):
        rows = objects(
            run("interpolate", model_dir, a, b, "--steps", 5, "--path", path, "--json", *FEW)
        )
        assert [row["t"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
        assert [row["sentence"] for row in rows] == vae.interpolate(
            a, b, steps=5, path=path, max_new_tokens=7
        )
    text = vae.analogy(a, b, c, max_new_tokens=7)
    assert objects(run("analogy", model_dir, a, b, c, "--json", *FEW)) == [
        {"a": a, "b": b, "c": c, "sentence": text}
    ]
    assert (
        run("analogy", model_dir, a, b, c, *FEW)
        == f"a         {a}\nb         {b}\nc         {c}\nsentence  {text}\n"
    )
    rows = objects(
        run("traverse", model_dir, a, "--dim", 3, "--steps", 3, "--width", 1.5, "--json", *FEW)
    )
    assert [row["offset"] for row in rows] == [row["value"] for row in rows] == [-1.5, 0, 1.5]
    assert [row["sentence"] for row in rows] == vae.traverse(
        a, 3, steps=3, width=1.5, max_new_tokens=7
    )
    lines = run(
        "traverse", model_dir, a, "--dim=3", "--steps=3", "--scale=posterior", *FEW
    ).splitlines()
    assert [line[:8] for line in lines] == [" -3.00  ", " +0.00  ", " +3.00  "]


def test_edit_moves_along_the_attribute_vector(run, vae, model_dir, corpus):
    labels = ["pos", "neg", "pos", "neg", "pos", "neg"]
    vector = vae.attribute_vector(TEXTS, labels, "neg")
    words = (
        "edit",
        model_dir,
        TEXTS[0],
        "--toward",
        "neg",
        "--labels_file",
        corpus / "labels.txt",
        "--strength",
        2.5,
    )
    words = (*words, "--text_file", corpus / "text.txt", *FEW)
    expected = vae.edit(TEXTS[0], vector, strength=2.5, max_new_tokens=7)
    plain = vae.reconstruct([TEXTS[0]], max_new_tokens=7)[0]
    row = {"sentence": TEXTS[0], "reconstruction": plain, "edited": expected, "strength": 2.5}
    assert objects(run(*words, "--json")) == [row]
    assert run(*words).splitlines()[2] == f"edited          {expected}"


def test_an_edit_and_the_reconstruction_beside_it_are_sampled_alike(run, model_dir, corpus):
    words = (
        "edit",
        model_dir,
        TEXTS[0],
        "--toward",
        "neg",
        "--labels_file",
        corpus / "labels.txt",
        "--text_file",
    )
    words = (
        *words,
        corpus / "text.txt",
        "--do_sample",
        "--temperature",
        "3.0",
        "--max_new_tokens",
        12,
        "--device",
        "cpu",
        "--json",
    )
    rows = [
        objects(run(*words, "--strength", strength, "--seed", seed))[0]
        for seed in (1, 2)
        for strength in (0, 50)
    ]
    assert [row["reconstruction"] == row["edited"] for row in rows] == [True, False, True, False]
    assert rows[0]["reconstruction"] == rows[1]["reconstruction"] != rows[2]["reconstruction"]


@pytest.fixture(scope="module")
def coded_dir(tokenizer, tmp_path_factory):
    """A model of 6 variables with 4 categories each."""
    directory = tmp_path_factory.mktemp("coded") / "model"
    return save(directory, tokenizer, family="categorical", categories=4)


def test_categories_are_set_and_traversed(run, coded_dir):
    coded = SentenceVAE.from_pretrained(coded_dir, device="cpu")
    a = TEXTS[1]
    plain = coded.reconstruct([a], max_new_tokens=7)[0]
    over = coded.traverse(a, 3, max_new_tokens=7)
    assert objects(run("traverse", coded_dir, a, "--dim", 3, "--json", *FEW)) == [
        {"category": i, "sentence": text} for i, text in enumerate(over)
    ]
    assert run("traverse", coded_dir, a, "--dim", 3, *FEW) == "".join(
        f"{i:>3}  {text}\n" for i, text in enumerate(over)
    )
    for category, text in enumerate(over):
        words = ("edit", coded_dir, a, "--set", f"3={category}", *FEW)
        row = {"sentence": a, "reconstruction": plain, "edited": text, "set": {"3": category}}
        assert objects(run(*words, "--json")) == [row]
        assert run(*words).splitlines()[2] == f"edited          {text}"
    both = coded.with_categories(coded.encode([a]).point, {3: 1, 0: 2})
    (row,) = objects(run("edit", coded_dir, a, "--set=3=1,0=2", "--json", *FEW))
    assert row["edited"] == coded.decode(both, max_new_tokens=7)[0]
    assert row["set"] == {"3": 1, "0": 2}


def test_what_a_latent_does_not_have_is_refused(fail, coded_dir, model_dir, corpus):
    a, b, c = TEXTS[:3]
    files = ("--labels_file", corpus / "labels.txt", "--text_file", corpus / "text.txt")
    for words in (
        ("interpolate", coded_dir, a, b),
        ("analogy", coded_dir, a, b, c),
        ("edit", coded_dir, a, "--toward", "pos", *files),
    ):
        assert "continuous latent, and this model's is categorical" in fail(*words, *FEW)
    assert "steps is for dimensions" in fail("traverse", coded_dir, a, "--dim", 0, "--steps", 3)
    assert "variables 0 to 5" in fail("traverse", coded_dir, a, "--dim", 6)
    assert "categories 0 to 3" in fail("edit", coded_dir, a, "--set", "0=4")
    assert "variables 0 to 5" in fail("edit", coded_dir, a, "--set", "6=0")
    assert "this model's latent is gaussian" in fail("edit", model_dir, a, "--set", "0=1")


def test_encode_writes_the_posteriors_in_the_order_of_the_file(
    run, vae, model_dir, corpus, tmp_path, monkeypatch
):
    path = tmp_path / "latents"
    posterior = vae.encode(TEXTS)
    stdin(monkeypatch, (corpus / "text.txt").read_bytes())
    for source in ([corpus / "text.txt"], []):
        assert (
            run("encode", model_dir, *source, "-o", path, "--batch_size", 2, "--device", "cpu")
            == ""
        )
        ((found, strings),) = Latents(path).shards()
        assert len(strings["text"]) == 6
        torch.testing.assert_close(found["mean"], posterior.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["logvar"], posterior.logvar, rtol=1e-4, atol=1e-5)
        assert found["line"].tolist() == [1, 3, 4, 5, 6, 7]
        shutil.rmtree(path)


def test_corpus_writes_sentences_and_factors(run, tmp_path):
    printed = run("corpus", "-n", 3, "--seed", 5)
    assert len(printed.splitlines()) == 3
    run("corpus", "-n", 3, "--seed", 5, "-o", tmp_path / "c.txt", "--factors", tmp_path / "f.csv")
    assert (tmp_path / "c.txt").read_text() == printed
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("kind", ["paired", "relations", "tagged"])
def test_corpus_writes_records(run, tmp_path, kind):
    words = ("corpus", "--kind", kind, "-n", 5, "--seed", 2)
    rows = objects(run(*words))
    assert len(rows) == 5
    assert (
        list(rows[0])
        == {
            "paired": ["condition", "text"],
            "relations": ["condition", "text", "label"],
            "tagged": ["text", "label", "tags"],
        }[kind]
    )
    run(*words, "-o", tmp_path / "c.jsonl", "--factors", tmp_path / "f.csv")
    assert objects((tmp_path / "c.jsonl").read_text()) == rows
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 6
    if kind == "tagged":
        few = objects(run(*words, "--labelled", 2))
        assert [row["label"] is None for row in few] == [False, False, True, True, True]


def test_evaluate_hands_everything_over(run, monkeypatch):
    import dsvae.reports.evaluation

    seen = {}
    monkeypatch.setattr(
        dsvae.reports.evaluation,
        "evaluate_directory",
        lambda model_dir, **kwargs: seen.update(kwargs, model_dir=model_dir),
    )
    run("evaluate", "DIR", "--test_file", "1.0", "--iw_samples", 8, "--max_tokens", 32)
    assert seen == {
        "model_dir": "DIR",
        "precision": "fp32",
        "test_file": "1.0",
        "labels_file": None,
        "output": None,
        "samples": 1,
        "iw_samples": 8,
        "sentences": None,
        "batch_tokens": 16384,
        "text_column": "text",
        "condition_column": None,
        "label_column": None,
        "tags_column": None,
        "max_tokens": 32,
        "seed": 0,
        "noise_sentences": 0,
    }
    main(["--local_rank=1", "evaluate", "OTHER"])  # as the deepspeed launcher starts it
    assert seen["model_dir"] == "OTHER"


# The command line


@pytest.mark.parametrize("text", LITERAL)
def test_sentences_that_look_like_python_arrive_as_they_are(run, model_dir, text):
    (row,) = objects(run("analogy", model_dir, text, TEXTS[0], text, "--json", *FEW))
    assert (row["a"], row["b"], row["c"]) == (text, TEXTS[0], text)
    (row,) = objects(run("analogy", model_dir, "--json", *FEW, "--b=" + text, "--", "--a", "--"))
    assert (row["a"], row["b"], row["c"]) == ("--a", text, "--")


def test_a_boolean_flag_may_stand_anywhere(run, model_dir):
    after = run("interpolate", model_dir, *TEXTS[:2], "--steps", 2, *FEW, "--json")
    assert run("interpolate", "--json", model_dir, *TEXTS[:2], "--steps", 2, *FEW) == after
    assert run("interpolate", "--json=true", model_dir, *TEXTS[:2], "--steps=2", *FEW) == after
    assert (
        run(
            "interpolate",
            "--max-new-tokens=7",
            model_dir,
            *TEXTS[:2],
            "-j",
            "--steps=2",
            "--device=cpu",
        )
        == after
    )
    plain = run("interpolate", "--json", "false", model_dir, *TEXTS[:2], "--steps", 2, *FEW)
    assert plain.splitlines()[0].startswith("0.000  ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_every_flag(run, name):
    text = run(name, "--help")
    assert text == run(name, "-h")
    referred = field_types() if name in ("train", "plan") else ()  # to the help of the run
    for flag in COMMANDS[name].parameters.keys() - set(referred):
        assert re.search(rf"--{flag}\b|^    {flag.upper()}$", text, re.M), flag
    own = text.split("OPTIONS OF GENERATE")[0]
    described = re.findall(
        r"^    (?:-., )?--\w+=.*\n(?:        (?:Type|Default): .*\n)*(.*)", own, re.M
    )
    assert described
    assert all(line.startswith("        ") for line in described)
    for letter, flag in re.findall(r"^    -(.), --(\w+)=", own, re.M):
        assert COMMANDS[name].parameters[flag].letter == letter
    assert "FIRE_METADATA" not in text
    assert "Optional[" not in text


def test_help_lists_the_commands_and_version_is_the_package_s(run):
    text = run("--help")
    assert all(re.search(rf"^    {name} +\w", text, re.M) for name in COMMANDS)
    assert re.fullmatch(r"dsvae \d+\.\d+.*\n", run("--version"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command"),
        (["smaple"], "did you mean sample?"),
        (
            ["sample", "M", "--temprature", "1"],
            "unknown flag --temprature; did you mean --temperature?",
        ),
        (["sample", "M", "--num_return_sequences", "2"], "unknown flag --num_return_sequences"),
        (["encode", "M", "--outptu", "x"], "did you mean --output?"),
        (["encode", "M", "F"], "--output is missing: dsvae encode MODEL_DIR [FILE]"),
        (["traverse", "M", "a"], "--dim is missing"),
        (["traverse", "M", "a", "--dim"], "--dim needs a value"),
        (["traverse", "M", "a", "--dim", "1.5"], "--dim must be a whole number, not '1.5'"),
        (["traverse", "M", "a", "--dim", "1", "--width", "nan"], "--width must be a number"),
        (
            ["edit", "M", "a"],
            "--toward is missing: give --toward, --labels_file and --text_file, or",
        ),
        (["edit", "M", "a", "--toward", "pos"], "--labels_file is missing"),
        (["edit", "M", "a", "--set", "3"], "--set is '3': write VARIABLE=CATEGORY"),
        (["edit", "M", "a", "--set", "1=2,1=3"], "names variable 1 twice"),
        (["edit", "M", "a", "--set", "1=2", "--toward", "x"], "--set and --toward are given"),
        (["interpolate", "M", "a"], "B is missing: dsvae interpolate MODEL_DIR A B"),
        (
            ["interpolate", "M", "a", "b", "c"],
            "'c' is one word too many for dsvae interpolate MODEL_DIR A B",
        ),
        (
            ["interpolate", "M", "a", "b", "--path", "slep"],
            "--path is 'slep', not one of linear, slerp",
        ),
        (["interpolate", "M", "a", "b", "--steps", "1"], "at least 2"),
        (["interpolate", "M", "a", "b", "--steps", "3", "--steps", "4"], "--steps is given twice"),
        (["interpolate", "M", "-bad", "b"], "unknown flag -bad"),
        (["sample", "M", "--do_sample", "x"], "'x' is one word too many"),
        (["sample", "M", "--json=maybe"], "--json must be true or false"),
        (
            ["sample", "M", "--bad_words_ids", "1,2"],
            "--bad_words_ids must be a list such as [1, 2]",
        ),
        (["sample", "M", "-n", "0"], "at least 1"),
        (["sample", "M", "--source", "aggregate"], "belong together"),
        (["sample", "M", "--top_p", "0.9"], "no effect without --do_sample"),
        (["corpus", "-n", "0"], "at least 1"),
        (["corpus", "--factors", "f.csv"], "--factors needs --output"),
        (["corpus", "--kind", "nested"], "paired"),
        (["corpus", "--kind", "paired", "-o", "a.txt"], ".jsonl"),
        (["corpus", "--labelled", "3"], "--kind tagged"),
        (["corpus", "--output", "no/../f.csv", "--factors", "./f.csv"], "name two files"),
    ],
)
def test_mistakes_in_the_command_line(fail, words, message):
    assert message in fail(*words)


def test_unknown_flags_are_told_before_anything_runs():
    called = []

    def work(word: str, *, n: int = 1) -> None:
        """Works."""
        called.append((word, n))

    commands = command_line.commands([work])
    with pytest.raises(UserError, match="unknown flag --m"):
        command_line.dispatch(commands, ["work", "a", "--m", "2"], "test")
    assert called == []
    command_line.dispatch(commands, ["work", "1,2", "-n", "-3"], "test")
    assert called == [("1,2", -3)]


def test_bad_input_is_told_in_one_line(fail, model_dir, corpus, tokenizer, tmp_path, monkeypatch):
    text, labels = corpus / "text.txt", corpus / "labels.txt"
    assert "no such directory" in fail("sample", tmp_path / "none")
    assert "config.json" in fail("sample", corpus)
    assert "model" in fail("sample", Path(model_dir).parent)
    (tmp_path / "t5").mkdir()
    assert "t5 model" in fail("sample", make_t5("t5 v1.0", tmp_path / "t5"))
    assert "injection none" in fail("sample", save(tmp_path / "lm", tokenizer, injection="none"))
    make_vae().save_pretrained(tmp_path / "bare")
    assert "tokenizer" in fail("sample", tmp_path / "bare")
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    assert "model.safetensors" in fail("sample", broken)
    assert "no such file" in fail("reconstruct", model_dir, tmp_path / "none.txt")
    assert "is empty" in fail("reconstruct", model_dir, corpus / "empty.txt")
    assert "no sentences" in fail("reconstruct", model_dir, corpus / "blank.txt")
    assert "no sentences" in fail(
        "sample", model_dir, "--source", "aggregate", "--file", corpus / "blank.txt"
    )
    assert "no column 'text'" in fail("reconstruct", model_dir, corpus / "text.csv")
    for data, message in ((b"", "stdin has no sentences"), (b"a\n\xe9\n", "stdin:2: not UTF-8")):
        stdin(monkeypatch, data)
        assert message in fail("reconstruct", model_dir)
    assert "dimensions 0 to 5" in fail("traverse", model_dir, "a", "--dim", 6)
    assert "longer than max_tokens (4)" in fail(
        "analogy", model_dir, *TEXTS[1:4], "--max_tokens", 4
    )
    assert "blank" in fail("interpolate", model_dir, "a", " ")
    assert "--device warp" in fail("sample", model_dir, "--device", "warp")
    assert "--seed must be" in fail("sample", model_dir, "--seed", -1)
    assert "strictly positive" in fail("sample", model_dir, "--do_sample", "--temperature", 0)

    def edit(toward, labels_file, text_file=text):
        return fail(
            "edit",
            model_dir,
            "a",
            "--toward",
            toward,
            "--labels_file",
            labels_file,
            "--text_file",
            text_file,
        )

    assert "no such label" in edit("great", labels)
    assert "only pos, neg" in edit("great", labels) or "only neg, pos" in edit("great", labels)
    assert "has 2 lines" in edit("pos", corpus / "short.txt")
    assert "no label but pos" in edit("pos", corpus / "one.txt")
    assert "gap.txt:4: no label" in edit("pos", corpus / "gap.txt")
    assert "no such file" in edit("pos", corpus / "none.txt")


def test_a_failed_encode_leaves_nothing(fail, model_dir, corpus, tmp_path):
    output = tmp_path / "out" / "latents"
    assert "latin.txt:2: not UTF-8" in fail("encode", model_dir, corpus / "latin.txt", "-o", output)
    assert "no sentences" in fail("encode", model_dir, corpus / "blank.txt", "-o", output)
    assert list(output.parent.iterdir()) == []
    assert "cannot write" in fail(
        "encode", model_dir, corpus / "text.txt", "-o", corpus / "text.txt" / "x"
    )


def test_interrupts_and_closed_pipes_end_quietly(capsys, monkeypatch):
    def stop() -> None:
        """Is interrupted."""
        raise KeyboardInterrupt

    def close() -> None:
        """Finds nobody who reads."""
        raise BrokenPipeError

    monkeypatch.setattr(cli, "COMMANDS", command_line.commands([stop, close]))
    assert main(["stop"]) == 130
    assert capsys.readouterr().err == "dsvae: interrupted\n"
    assert main(["close"]) == 0
    assert capsys.readouterr().err == ""


# The real command


def command():
    beside = Path(sys.executable).with_name("dsvae")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "dsvae.cli"]


def test_the_command_in_a_pipeline(model_dir):
    reconstruct = " ".join([*command(), "reconstruct", model_dir, *FEW])
    shell = f"set -o pipefail; yes 'a bad bee' | head -2000 | {reconstruct} | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert done.stdout == "     1  a bad bee\n"
    assert done.stderr == ""


def test_sentences_on_stdin_arrive_as_they_are(run, vae, model_dir, monkeypatch):
    stdin(monkeypatch, "".join(f"{text}\n" for text in LITERAL).encode())
    rows = objects(run("reconstruct", model_dir, "--json", *FEW))
    assert [row["sentence"] for row in rows] == LITERAL
    assert [row["reconstruction"] for row in rows] == vae.reconstruct(LITERAL, max_new_tokens=7)


def shell(line, **env):
    """A line of bash in which DSVAE is the command: the finished process."""
    line = line.replace("DSVAE", shlex.join(command()))
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, timeout=120, env={**os.environ, **env}
    )


def test_results_that_find_no_room_are_one_line():
    for line in ("DSVAE corpus -n 3 > /dev/full", "DSVAE --help > /dev/full"):
        done = shell(line)
        assert done.returncode == 74, done.stderr
        (error,) = done.stderr.decode().splitlines()
        assert error.startswith("dsvae: error: ")
        assert "No space left on device" in error


def test_results_are_utf_8_whatever_the_locale(model_dir):
    text = "a b\u00fcd \u4e2d"
    line = f"printf '{text}\\n' | DSVAE reconstruct {shlex.join([model_dir, '--json', *FEW])}"
    done = shell(line, PYTHONIOENCODING="latin-1", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8"))["sentence"] == text


def test_closed_streams_are_told(model_dir):
    words = shlex.join([model_dir, *FEW])
    done = shell(f"DSVAE reconstruct {words} <&-")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"dsvae: error: stdin is closed: give FILE, or sentences on stdin\n"
    done = shell(f"DSVAE sample {words} >&-")
    assert (done.returncode, done.stderr) == (
        2,
        b"dsvae: error: stdout is closed: send the results to a file, or to /dev/null\n",
    )
    done = shell(f"DSVAE sample {words} -n 2 2>&-")  # its warnings do not go to stdout instead
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


def test_a_terminated_encode_leaves_nothing(model_dir, tmp_path):
    output = tmp_path / "latents"
    words = [
        *command(),
        "encode",
        model_dir,
        "-o",
        str(output),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        # More than a pipe holds: this returns once most is read, and so encoded. The pipe
        # stays open, so that the command waits for more.
        process.stdin.write(b"a bad bee\n" * 20_000)
        process.stdin.flush()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_train_becomes_the_launcher_of_deepspeed(monkeypatch, fail):
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, words: calls.append((program, words)))
    line = "train --ds_config zero2 --num_gpus 2 --hostfile=nodes --phase1.steps 50 --verbose"
    assert main(line.split()) == 0
    ((program, words),) = calls
    assert program == words[0] == sys.executable
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    script = next(i for i, word in enumerate(words) if word.endswith("dsvae/train.py"))
    assert sorted(words[3:script]) == ["--hostfile=nodes", "--num_gpus=2"]
    config = configuration.read(words[script + 1 :])
    assert (config.ds_config, config.phase1.steps, config.verbose) == ("zero2", 50, True)
    assert "phase1.steps" in fail("train", "--phase1.step", "5")
