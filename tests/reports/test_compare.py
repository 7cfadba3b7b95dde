"""`dsvae compare` on output directories that are written here, and on real runs."""

import csv
import json
import re

import pytest
import yaml
from launch import CONFIGS, start, train
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

import dsvae.reports.compare_plot as plot_module
from dsvae.cli import main
from dsvae.reports.compare import compare_runs
from dsvae.reports.figures import new_figure
from dsvae.run_directory import RunDirectory
from dsvae.status import Status

TEXT = {"sentences": 100, "tokens": 1200, "words": 1000, "bytes": 5000, "truncated": 0}
NO_LATENT = {
    "kl": 0.0,
    "elbo": -40.0,
    "mi": 0.0,
    "mi_cap": 4.605,
    "marginal_kl": 0.0,
    "au": 0,
    "kl_per_dim": [],
    "rec_shuffled": 40.0,
}
CONFIG = {
    "ds_config": "somewhere/ds_config.json",
    "data": {
        "train_file": "data/train.txt",
        "valid_file": "data/valid.txt",
        "test_file": "data/test.txt",
    },
    "phase1": {"steps": 50},
    "phase2": {"steps": 200},
}


def evaluation(rec=30.0, kl=10.0, **more):
    """An evaluation as in metrics.json and metrics.jsonl."""
    found = {
        "rec": rec,
        "kl": kl,
        "elbo": -(rec + kl),
        "ppl_token": 28.0,
        "ppl_word": 38.2,
        "bits_per_byte": 1.131,
    }
    found |= {
        "mi": 3.5,
        "mi_cap": 4.605,
        "marginal_kl": kl - 3.5,
        "au": 7,
        "kl_per_dim": [kl / 2, kl / 2],
    }
    return found | {"rec_shuffled": rec + 12.5, "se": {"rec": 0.25, "kl": 0.125}} | TEXT | more


def row(step, phase, split="train", **more):
    return {
        "step": step,
        "phase": phase,
        "split": split,
        **(evaluation() if split != "train" else {"rec": 1.0}),
        **more,
    }


def merged(base, more):
    return base | {
        k: merged(base.get(k, {}), v) if isinstance(v, dict) else v for k, v in more.items()
    }


def make(
    directory, metrics=None, *, config=None, rows=(), said=None, tokenizer="one", ds_config=None
):
    """An output directory. `metrics` is the final evaluation, and `said` what is in
    status.json."""
    directory.mkdir(parents=True)
    tree = merged(CONFIG, {"output_dir": str(directory), **(config or {})})
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    if metrics is not None:
        (directory / "metrics.json").write_text(json.dumps({"test": metrics}))
    if rows:
        (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    if said is not None:
        Status(**said).write(directory / "status.json")
    if tokenizer:
        (directory / "tokenizer").mkdir()
        rules = {"version": "1.0", "truncation": None, "model": {"vocab": [[tokenizer, -1.0]]}}
        (directory / "tokenizer" / "tokenizer.json").write_text(json.dumps(rules))
    if ds_config is not None:
        (directory / "ds_config.json").write_text(json.dumps(ds_config))
    return directory


@pytest.fixture
def compare(capsys, tmp_path):
    """Runs the command: rows of the printed table as heading -> cell, all that was
    printed, the rows of the CSV file, the printed warnings."""

    def call(*words, out=None):
        out = out or tmp_path / "out"
        assert main(["compare", *map(str, words), "--output", str(out)]) == 0
        text = capsys.readouterr().out
        lines = [
            [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in text.splitlines()
            if line.startswith("| ")
        ]
        headings = [re.sub(r" [↓↑]$", "", heading) for heading in lines[0]]
        table = {cells[0]: dict(zip(headings, cells, strict=True)) for cells in lines[2:]}
        with (out / "comparison.csv").open(newline="") as file:
            rows = {each["run"]: each for each in csv.DictReader(file)}
        return table, text, rows, re.findall(r"^warning: (.*)", text, re.M)

    return call


@pytest.fixture
def fail(capsys):
    def call(*words):
        assert main(["compare", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "skipped, because" not in line]
        assert out == ""
        assert len(lines) == 1
        assert lines[0].startswith("dsvae: error: ")
        return lines[0]

    return call


# Numbers and settings


def test_table_and_files_hold_the_final_metrics(compare, tmp_path):
    make(tmp_path / "a", evaluation(30.0, 10.0), rows=[row(250, 2, "valid", rec=99.0)])
    make(
        tmp_path / "b",
        evaluation(25.0, 16.5, au=3, nll_iw=40.25),
        config={"phase2": {"free_bits": 0.5}},
    )
    table, text, rows, _ = compare(tmp_path / "a", tmp_path / "b")
    assert list(table) == ["a", "b"]
    assert [table[run]["rec"] for run in "ab"] == ["30.000", "25.000"]
    assert [table[run]["elbo"] for run in "ab"] == ["-40.000", "-41.500"]
    assert [table[run]["au"] for run in "ab"] == ["7", "3"]
    assert [table[run]["rec_shuffled-rec"] for run in "ab"] == ["12.500", "12.500"]
    assert [table[run]["nll_iw"] for run in "ab"] == ["-", "40.250"]
    assert [table[run]["state"] for run in "ab"] == ["finished", "finished"]
    assert "99" not in text
    assert "warning" not in text
    assert "*" not in text
    assert (rows["b"]["kl"], rows["b"]["se.rec"], rows["a"]["nll_iw"], rows["b"]["ppl_word"]) == (
        "16.5",
        "0.25",
        "",
        "38.2",
    )
    assert rows["a"]["values_of"] == "test"
    assert [rows[run]["rec"] for run in "ab"] == ["30.0", "25.0"]
    assert [rows[run]["phase2.free_bits"] for run in "ab"] == ["0", "0.5"]


def test_direction_and_unit_stand_beside_every_metric(compare, tmp_path):
    _, text, *_ = compare(make(tmp_path / "a", evaluation()))
    heading = text.splitlines()[0]
    for name, better, arrow in (
        ("rec", "lower", "↓"),
        ("elbo", "higher", "↑"),
        ("ppl_token", "lower", "↓"),
        ("mi", "higher", "↑"),
    ):
        assert f" {name} {arrow} " in heading
        assert re.search(
            rf"^- `{name}` \((\S+, )?{better} is better\): \w|^- `{name}` \(.*{better} is "
            rf"better\): -",
            text,
            re.M,
        )
    assert " kl |" in heading
    assert re.search(r"^- `rec` \(nats/sentence, ", text, re.M)
    assert re.search(r"^- `kl` \(nats/sentence\): ", text, re.M)


def test_only_settings_that_differ_are_columns(compare, tmp_path):
    own = {
        "log_every": 3,
        "keep_checkpoints": 9,
        "eval_every": 5,
        "data": {"cache_dir": "elsewhere"},
    }
    zero2, zero3 = (
        {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}} for stage in (2, 3)
    )
    make(tmp_path / "a", evaluation(), ds_config=zero2)
    more = {
        "model": {"pooling": "attention", "t5": {"d_model": 64}},
        "phase1": {"sample_latent": False},
    }
    make(tmp_path / "b", evaluation(), config=merged(own, more), ds_config=zero3)
    table, *_ = compare(tmp_path / "a", tmp_path / "b")
    settings = {
        "model.pooling",
        "model.t5.d_model",
        "phase1.sample_latent",
        "ds_config.zero_optimization.stage",
    }
    assert {name for name in table["a"] if "." in name} == settings
    assert [table[run]["model.pooling"] for run in "ab"] == ["mean", "attention"]
    assert [table[run]["phase1.sample_latent"] for run in "ab"] == ["true", "false"]
    assert [table[run]["model.t5.d_model"] for run in "ab"] == ["-", "64"]
    assert [table[run]["ds_config.zero_optimization.stage"] for run in "ab"] == ["2", "3"]


def test_fields_that_a_run_does_not_read_are_no_difference(compare, tmp_path):
    make(tmp_path / "a", evaluation(), config={"phase1": {"lr": 0.002}})
    make(tmp_path / "b", evaluation(), config={"phase1": {"lr": 0.003}, "phase": "2"})
    make(
        tmp_path / "c",
        evaluation(),
        config={"phase1": {"lr": 0.002}, "data": {"builtin_seed": 4}, "seed": 5},
    )
    lm = {
        "model": {"injection": "none", "latent_dim": 5, "pooling": "max"},
        "phase1": {"lr": 0.002},
        "phase2": {"free_bits": 3},
    }
    make(tmp_path / "d", evaluation(40.0, **NO_LATENT), config=lm)
    table, *_ = compare(*(tmp_path / name for name in "abcd"))
    found = {name for name in table["a"] if "." in name or name in ("phase", "seed")}
    assert found == {"phase", "seed", "model.injection"}


def test_a_model_without_a_latent_has_no_kl(compare, tmp_path):
    make(tmp_path / "vae", evaluation())
    make(tmp_path / "lm", evaluation(40.0, **NO_LATENT), config={"model": {"injection": "none"}})
    table, text, rows, _ = compare(tmp_path / "vae", tmp_path / "lm")
    assert [
        table["lm"][name] for name in ("rec", "elbo", "kl", "mi", "au", "rec_shuffled-rec")
    ] == ["40.000", "-40.000", *"----"]
    assert (rows["lm"]["kl"], rows["lm"]["se.kl"], rows["lm"]["se.rec"]) == ("", "", "0.25")
    assert "Without a latent: lm." in text
    assert table["vae"]["kl"] == "10.000"


def test_files_are_shown_by_name_where_names_differ(compare, tmp_path):
    make(
        tmp_path / "a",
        evaluation(),
        config={"data": {"train_file": "/x/one.txt", "valid_file": "/x/v.txt"}},
    )
    make(
        tmp_path / "b",
        evaluation(),
        config={"data": {"train_file": "/x/two.txt", "valid_file": "/y/v.txt"}},
    )
    table, _, rows, _ = compare(tmp_path / "a", tmp_path / "b")
    assert [table[run]["data.train_file"] for run in "ab"] == ["one.txt", "two.txt"]
    assert [table[run]["data.valid_file"] for run in "ab"] == ["/x/v.txt", "/y/v.txt"]
    assert rows["a"]["data.train_file"] == "/x/one.txt"


# States

BOTH = [row(s, 1) for s in (10, 50)] + [row(50, 1, "valid", rec=8.0), row(60, 2)]
RUNNING = {"state": "running", "phase": 2, "step": 1130, "steps": 2000}
STOPPED = {"state": "stopped", "exit_code": 75, "reason": "SIGTERM: saved at step 70"}
FAILED = {"state": "failed", "exit_code": 2, "reason": "no such file"}


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (RUNNING, "phase 2 at step 1,130 of 2,000 (killed)"),
        (RUNNING | STOPPED, "phase 2 at step 1,130 of 2,000 (stopped)"),
        (FAILED, "preparing (failed)"),
        ({"state": "finished", "phase": 1, "step": 50, "steps": 50}, "finished (phase 1 only)"),
        (None, "unfinished"),  # by an older dsvae
    ],
)
def test_state_of_a_run_without_a_final_evaluation(compare, tmp_path, said, state):
    make(tmp_path / "done", evaluation())
    run = make(tmp_path / "run", rows=BOTH, said=said)
    table, text, *_ = compare(run, tmp_path / "done")
    assert table["run"]["state"] == state
    assert table["run"]["values of"] == "valid, step 50 (phase 1)"
    assert table["run"]["rec"] == "8.000*"
    assert table["done"]["state"] == "finished"
    reason = (said or {}).get("reason")
    assert reason is None or f"run: exit code {said['exit_code']}: {reason}" in text


def test_a_live_run_is_told_from_a_killed_one(compare, tmp_path):
    run = make(tmp_path / "run", rows=BOTH, said=RUNNING)
    with RunDirectory(run).claim():
        assert compare(run)[0]["run"]["state"].endswith("(running)")
    assert compare(run)[0]["run"]["state"].endswith("(killed)")


def test_validation_values_are_starred_and_never_mixed_with_final_ones(compare, tmp_path):
    make(tmp_path / "b", evaluation(30.0))
    make(
        tmp_path / "a",
        rows=[row(100, 2, "valid", rec=21.0), row(150, 2, "valid", rec=20.0), row(160, 2)],
    )
    make(tmp_path / "c", evaluation(29.0))
    table, text, rows, _ = compare(
        tmp_path / "a", tmp_path / "b", tmp_path / "c", "--sort_by", "rec"
    )
    # the lower value of a stands behind: it is on other sentences
    assert list(table) == ["c", "b", "a"]
    assert [table[run]["rec"] for run in "abc"] == ["20.000*", "30.000", "29.000"]
    assert [table[run]["values of"] for run in "abc"] == [
        "valid, step 150 (phase 2)",
        "test",
        "test",
    ]
    assert r"\* not final: the newest values on validation sentences" in text
    assert (rows["a"]["rec"], rows["a"]["values_of"], rows["a"]["step"]) == ("20.0", "valid", "150")
    assert [rows[run]["values_of"] for run in "cba"] == ["test", "test", "valid"]


@pytest.mark.parametrize(
    "content", ['{"test": {"rec": 3', '{"test": 3}', "[1]", '{"test": {"kl": 1.0}}', "", "\xff"]
)
def test_a_damaged_metrics_json_is_named(compare, tmp_path, content):
    make(tmp_path / "good", evaluation())
    broken = make(
        tmp_path / "broken", rows=[row(250, 2, "valid", rec=33.0), row(250, 2, "test", rec=34.0)]
    )
    (broken / "metrics.json").write_bytes(content.encode("latin-1"))
    table, text, *_ = compare(tmp_path / "good", broken)
    assert table["broken"]["state"] == "failed to read"
    assert table["broken"]["rec"] == "33.000*"
    assert re.search(r"^broken: metrics.json cannot be read: \S", text, re.M)
    assert table["good"]["state"] == "finished"


def test_what_else_cannot_be_read_is_named(compare, tmp_path):
    good = make(tmp_path / "good", evaluation())
    no_yaml = make(tmp_path / "no_yaml", evaluation())
    (no_yaml / "config.yaml").write_text("data: [")
    unknown = make(tmp_path / "unknown", rows=BOTH, config={"frobnicate": 1})
    lines = make(tmp_path / "lines", rows=BOTH)
    with (lines / "metrics.jsonl").open("a") as file:
        file.write("{broken}\n\n" + json.dumps(row(90, 2)) + '\n{"step": 95, "pha')
    bare = make(tmp_path / "bare", rows=BOTH)
    (bare / "config.yaml").unlink()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").touch()
    table, text, _, _ = compare(good, no_yaml, unknown, lines, bare, tmp_path / "locked")
    states = {name: cells["state"] for name, cells in table.items()}
    assert states == {
        "good": "finished",
        "no_yaml": "finished",
        "unknown": "unfinished",
        "lines": "unfinished",
        "bare": "unfinished",
        "locked": "not started",
    }
    assert re.search(r"^no_yaml: .*config.yaml: not valid YAML", text, re.M)
    assert re.search(r"^unknown: .*config.yaml: unknown field frobnicate$", text, re.M)
    # not the one a live run is writing
    assert "lines: metrics.jsonl: 1 line(s) cannot be read; the first is line 5" in text
    assert "bare: no config.yaml in it" in text


def test_numbers_that_are_none_or_not_finite_are_left_out(compare, tmp_path):
    found = evaluation(nll_iw=float("inf"), mi=None)
    table, *_ = compare(make(tmp_path / "a", found))
    assert table["a"]["rec"] == "30.000"
    assert "mi" not in table["a"]
    assert "nll_iw" not in table["a"]


# What may be compared


def test_other_test_sentences_are_a_warning(compare, tmp_path):
    make(tmp_path / "a", evaluation())
    make(tmp_path / "b", evaluation(words=1001))
    make(tmp_path / "c", evaluation())
    table, _, rows, warnings = compare(*(tmp_path / name for name in "abc"))
    assert [table[run]["text"] for run in "abc"] == ["A", "B", "A"]
    assert [rows[run]["text"] for run in "abc"] == ["A", "B", "A"]
    assert len(warnings) == 1
    assert "not the same test sentences (A: 100 sentences, 1,000 words" in warnings[0]
    assert "tokenizer" not in table["a"]


@pytest.mark.parametrize(
    ("one", "two", "warned"),
    [
        ({"seed": 1}, {"seed": 2}, False),  # the files are given: the seed cuts nothing
        ({"data": {"test_file": None}, "seed": 1}, {"data": {"test_file": None}, "seed": 2}, True),
        ({"data": {"train_file": None}}, {"data": {"train_file": None, "builtin_seed": 1}}, True),
        ({"data": {"train_file": None}}, {"data": {"train_file": None}}, False),
        ({"data": {"dataset": "x/y"}}, {"data": {"dataset": "x/z"}}, True),
        # a copy: equal counts
        ({"data": {"test_file": "here/t.txt"}}, {"data": {"test_file": "there/t.txt"}}, False),
    ],
)
def test_settings_tell_texts_apart_that_have_equal_counts(compare, tmp_path, one, two, warned):
    table, *_, warnings = compare(
        make(tmp_path / "a", evaluation(), config=one),
        make(tmp_path / "b", evaluation(), config=two),
    )
    assert bool(warnings) == warned
    assert ("text" in table["a"]) == warned


def test_validation_text_is_held_against_validation_text(compare, tmp_path):
    make(tmp_path / "a", evaluation())
    for name, words in (("b", 1000), ("c", 1000), ("d", 2)):
        make(tmp_path / name, rows=[row(60, 2, "valid", words=words)])
    _, *_, warnings = compare(*(tmp_path / name for name in "abc"))
    assert warnings == []
    table, *_, warnings = compare(*(tmp_path / name for name in "abcd"))
    assert [table[run]["text"] for run in "abcd"] == ["A", "B", "B", "C"]
    assert "not the same validation sentences" in warnings[0]


def test_other_tokenizers_are_a_warning(compare, tmp_path):
    make(tmp_path / "a", evaluation(), tokenizer="one")
    make(tmp_path / "b", evaluation(tokens=900), tokenizer="two")
    rules = make(tmp_path / "c", evaluation(), tokenizer="one") / "tokenizer" / "tokenizer.json"
    # Written down otherwise, and with what the last call left: the same tokenizer.
    rules.write_text(
        json.dumps(
            json.loads(rules.read_text()) | {"version": "2", "truncation": {"max_length": 9}},
            indent=3,
        )
    )
    table, *_, warnings = compare(*(tmp_path / name for name in "abc"))
    assert [table[run]["tokenizer"] for run in "abc"] == ["A", "B", "A"]
    assert len(warnings) == 1
    assert "not the same tokenizer (A: a, c; B: b): ppl_token compares only within" in warnings[0]
    assert "text" not in table["a"]  # the words are the same: nats per sentence compare
    make(tmp_path / "d", evaluation(), tokenizer=None)
    *_, warnings = compare(tmp_path / "a", tmp_path / "d")
    assert "no tokenizer to read in d" in warnings[0]


# Words of the command line


def test_directories_of_runs_globs_and_names(compare, tmp_path, capsys):
    for name in ("sweep/run10", "sweep/run2", "other/run2"):
        make(tmp_path / name, evaluation())
    (tmp_path / "sweep" / "logs").mkdir()
    (tmp_path / "sweep" / "notes.txt").touch()
    table, *_ = compare(tmp_path / "sweep")
    assert list(table) == ["run2", "run10"]
    table, *_ = compare(tmp_path / "other", tmp_path / "sweep", tmp_path / "sweep" / "run2")
    assert list(table) == ["other/run2", "sweep/run2", "sweep/run10"]
    (tmp_path / "sweep" / "logs").rmdir()
    sweep = tmp_path / "sweep"
    assert main(["compare", *map(str, sorted(sweep.iterdir()))]) == 0
    assert "not directories: " + str(sweep / "notes.txt") in capsys.readouterr().err
    # The comparison that now lies among them is none of them, and is not replaced in
    # silence.
    assert sorted(path.name for path in (sweep / "comparison").iterdir()) == [
        f"comparison.{kind}" for kind in ("csv", "svg")
    ]
    assert main(["compare", *map(str, sorted(sweep.iterdir()))]) == 0
    out, err = capsys.readouterr()
    assert f"the earlier comparison in {sweep / 'comparison'} is replaced" in err
    assert out.count("| finished |") == 2


def test_runs_of_different_places_go_into_the_current_directory(tmp_path, monkeypatch, capsys):
    make(tmp_path / "x" / "a", evaluation())
    make(tmp_path / "y" / "b", evaluation())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["compare", "../x/a", "../y/b"]) == 0
    assert (tmp_path / "here" / "comparison" / "comparison.csv").is_file()
    assert "| x/a | finished |" in capsys.readouterr().out


def test_sort_by_metrics_settings_and_names(compare, fail, tmp_path):
    for name, bits, rec, mi in (
        ("a", 0.5, 30.0, 1.0),
        ("b", 0.25, 20.0, 3.0),
        ("c", 0.125, 25.0, 2.0),
    ):
        make(tmp_path / name, evaluation(rec, mi=mi), config={"phase2": {"free_bits": bits}})
    make(tmp_path / "d", config={"phase2": {"free_bits": 0.3}})
    runs = [tmp_path / name for name in "dcba"]

    def order(name):
        return "".join(compare(*runs, "--sort_by", name)[0])

    assert "".join(compare(*runs)[0]) == "dcba"
    assert order("rec") == "bcad"  # the lowest first
    assert order("mi") == "bcad"  # the highest first
    assert order("elbo") == "bcad"
    assert order("phase2.free_bits") == "cbda"
    assert order("run") == "abcd"
    assert "--sort_by ebo: neither a metric" in fail(*runs, "--sort_by", "ebo")
    assert "did you mean elbo?" in fail(*runs, "--sort_by", "ebo")


# Seeds


def test_runs_that_differ_only_in_their_seed_are_a_row(compare, tmp_path):
    for seed, rec, more in ((0, 30.0, {"nll_iw": 39.0}), (1, 31.0, {}), (5, 35.0, {})):
        make(tmp_path / f"a_s{seed}", evaluation(rec, **more), config={"seed": seed})
    other = {"phase2": {"free_bits": 0.5}}
    for seed, rec in ((0, 20.0), (10, 23.0)):
        make(tmp_path / f"b_seed{seed}", evaluation(rec), config=other | {"seed": seed})
    make(tmp_path / "a_s6", rows=[row(60, 2, "valid")], config={"seed": 6})
    make(tmp_path / "lonely", evaluation(), config={"phase1": {"lr": 0.5}, "seed": 3})
    names = ("a_s0", "lonely", "b_seed0", "a_s1", "a_s6", "b_seed10", "a_s5")
    table, text, rows, _ = compare(*(tmp_path / name for name in names), "--group")
    assert list(table) == ["a", "lonely", "b", "a_s6"]
    # 30, 31, 35: mean 32, squared deviations 4 + 1 + 9 = 14; 20, 23: 21.5, 4.5
    assert table["a"]["rec"] == f"32.000 ± {7**0.5:.3f}"
    assert table["b"]["rec"] == f"21.500 ± {4.5**0.5:.3f}"
    assert table["lonely"]["rec"] == "30.000"
    assert [table[name]["seed"] for name in table] == ["0, 1, 5", "3", "0, 10", "6"]
    assert [table[name]["state"] for name in ("a", "b", "lonely")] == [
        "3 finished",
        "2 finished",
        "finished",
    ]
    assert table["a"]["rec_shuffled-rec"] == "12.500 ± 0.000"
    assert "nll_iw" not in table["a"]  # one of three has it
    assert table["a"]["au"] == "7 ± 0.000"
    assert (table["a"]["phase2.free_bits"], table["b"]["phase2.free_bits"]) == ("0", "0.5")
    assert (float(rows["a"]["rec"]), float(rows["a"]["sd.rec"])) == (32.0, pytest.approx(7**0.5))
    assert (rows["a"]["se.rec"], rows["lonely"]["se.rec"]) == ("", "0.25")
    assert "mean ± standard deviation" in text
    alone = compare(*(tmp_path / name for name in names))
    assert list(alone[0]) == list(names)
    assert "±" not in alone[1]


def test_rows_of_several_seeds_say_what_was_not_the_same(compare, tmp_path):
    for name, config in (
        ("seed0_big", {"seed": 0}),
        ("seed1_big", {"seed": 1}),
        ("seed1_big_again", {"seed": 1}),
        ("seed0_small", {"seed": 0, "model": {"latent_dim": 3}}),
        ("seed1_small", {"seed": 1, "model": {"latent_dim": 3}}),
    ):
        held_out = {"data": {"test_file": None}}
        make(tmp_path / name, evaluation(), config=merged(config, held_out), tokenizer=name)
    table, _, _, warnings = compare(tmp_path, "--group")
    assert [table[name]["text"] for name in table] == ["A, B", "A, B"]
    assert list(table) == ["seed0_big and others", "seed0_small and others"]
    assert [table[name]["tokenizer"] for name in table] == ["A, C, D", "B, E"]
    assert any("not the same test sentences" in warning for warning in warnings)
    assert "seed0_big and others: several runs of seed 1; the deviation is too small" in warnings


def test_mistakes_are_one_line(fail, tmp_path):
    make(tmp_path / "run", evaluation())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    assert "no such directory" in fail(tmp_path / "run", tmp_path / "gone")
    assert f"nothing in {tmp_path / 'empty'} is a run" in fail(tmp_path / "run", tmp_path / "empty")
    assert "no directories of runs" in fail(tmp_path / "file.txt")
    assert "RUNS is missing: dsvae compare RUNS..." in fail()
    assert "unknown flag --sortby; did you mean --sort_by?" in fail(
        tmp_path / "run", "--sortby", "rec"
    )
    assert f"cannot write to {tmp_path / 'file.txt'}" in fail(
        tmp_path / "run", "--output", tmp_path / "file.txt"
    )


def test_runs_may_be_given_as_a_flag_and_with_odd_names(compare, tmp_path, capsys):
    odd = make(tmp_path / "a | b, [c]", evaluation())
    table, _, rows, _ = compare(odd)
    assert list(table) == [r"a \| b, [c]"]
    assert list(rows) == ["a | b, [c]"]
    table, *_ = compare("--runs", odd)
    assert list(table) == [r"a \| b, [c]"]


# The plot


def drawn(monkeypatch, directories):
    """The points of the plot, (kl, rec) -> (marker, filled, label), and its
    annotations."""
    kept = []
    monkeypatch.setattr(plot_module, "svg", kept.append)
    plot_module.plot(compare_runs(directories))
    axes = kept[0].axes[0]
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    found = {
        (line.get_xdata()[0], line.get_ydata()[0]): (
            line.get_marker(),
            line.get_markerfacecolor() != "none",
            line.get_label(),
        )
        for line in points
    }
    return found, [each.get_text() for each in axes.texts if isinstance(each, Annotation)]


def test_plot_has_a_point_a_run(monkeypatch, tmp_path):
    make(tmp_path / "vae", evaluation(30.0, 10.0))
    make(tmp_path / "twin", evaluation(30.1, 10.05))
    make(tmp_path / "lm", evaluation(40.0, **NO_LATENT))
    make(tmp_path / "live", rows=[row(90, 2, "valid", rec=33.0, kl=6.0)])
    make(tmp_path / "first", rows=[row(50, 1, "valid", rec=3.0, kl=130.0)])
    names = ("vae", "lm", "live", "first", "twin")
    found, labels = drawn(monkeypatch, [tmp_path / name for name in names])
    assert found == {
        (10.0, 30.0): ("o", True, "1  vae: mi 3.500, au 7"),
        (0.0, 40.0): ("D", True, "2  lm: no latent"),
        (6.0, 33.0): ("o", False, "3  live: mi 3.500, au 7"),
        (10.05, 30.1): ("o", True, "4  twin: mi 3.500, au 7"),
    }
    assert labels == ["1, 4", "2", "3"]
    found, _ = drawn(monkeypatch, [tmp_path / "first"])  # phase 1 alone is better than nothing
    assert list(found) == [(130.0, 3.0)]


def test_plot_tells_injections_apart_and_shows_deviations_and_the_line_of_a_language_model(
    monkeypatch, tmp_path
):
    for name, injection in (("m", "memory"), ("e", "embedding")):
        for seed, (rec, kl) in enumerate(((30.0, 10.0), (32.0, 9.0), (34.0, 11.0))):
            config = {"seed": seed, "model": {"injection": injection}}
            make(tmp_path / f"{name}_s{seed}", evaluation(rec, kl), config=merged(CONFIG, config))
    none = merged(CONFIG, {"model": {"injection": "none"}})
    make(tmp_path / "lm", evaluation(40.0, **NO_LATENT), config=none)
    kept = []
    monkeypatch.setattr(plot_module, "svg", kept.append)
    plot_module.plot(compare_runs(sorted(tmp_path.iterdir()), group=True))
    axes = kept[0].axes[0]
    points = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "None"}
    assert [label.split(": ")[1].split(",")[0] for label in points] == [
        *("embedding", "no latent", "memory")
    ]
    assert len({to_hex(line.get_color()) for line in points.values()}) == 3
    (line,) = [each for each in axes.lines if each.get_linestyle() == "--"]
    assert (line.get_xy1(), line.get_slope()) == ((0.0, 40.0), -1)
    bars = [segment for each in axes.collections for segment in each.get_segments() if len(segment)]
    spans = sorted({tuple(abs(segment[1] - segment[0]).round(6)) for segment in bars})
    assert spans == [(0, 0), (0, 4), (2, 0)]  # twice the deviations of 30, 32, 34 and 9, 10, 11


@pytest.mark.parametrize("members", [("a", "b"), ("0.25_injection_memory", "0.5_injection_both")])
def test_the_plot_has_room_for_the_names_of_a_sweep(monkeypatch, tmp_path, members):
    sweep = "pooling_max_phase1.deletion_0.4_phase2.deletion_0.4_phase2.free_bits_"
    names = [f"{sweep}{member}" if len(member) > 1 else member for member in members]
    for name in names:
        make(tmp_path / name, evaluation(30.0, 10.0))
    kept = []
    monkeypatch.setattr(plot_module, "svg", kept.append)
    plot_module.plot(compare_runs([tmp_path / name for name in names]))
    (figure,) = kept
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    shown = [entry.get_text().split("  ")[1].split(":")[0] for entry in legend.get_texts()]
    assert shown == names
    width = figure.bbox.width
    assert axes.bbox.width / figure.dpi > 4
    assert axes.bbox.x1 < legend.get_window_extent().x0 < legend.get_window_extent().x1 <= width


def test_without_values_there_is_no_plot(compare, tmp_path):
    make(tmp_path / "a", evaluation())
    make(tmp_path / "b")
    compare(tmp_path / "a")
    assert (tmp_path / "out" / "comparison.svg").read_text().startswith("<?xml")
    table, *_ = compare(tmp_path / "b")
    assert table["b"]["state"] == "unfinished"
    # the earlier one would belong to another table
    assert not (tmp_path / "out" / "comparison.svg").exists()


def test_runs_with_noise_on_z_have_a_plot_of_it(compare, tmp_path, monkeypatch):
    """BLEU by noise with its standard errors, and with deviations over seeds."""
    for name, seed, bleu in (("a", 0, 80.0), ("b0", 0, 60.0), ("b1", 1, 50.0), ("none", 0, None)):
        config = {"seed": seed, "model": {"latent_dim": 8 * "abn".index(name[0]) + 8}}
        more = {"se": {"rec": 0.25}}
        if bleu is not None:
            more |= {"noise": {"bleu": {"0": bleu, "0.3": bleu / 2}}, "bleu_area": bleu / 3}
            more["se"]["noise"] = {"bleu": {"0": 1.0, "0.3": 2.0}}
        make(tmp_path / "runs" / name, evaluation(**more), config=config)
    drawn = {}
    monkeypatch.setattr(
        plot_module, "noise_curves", lambda curves: drawn.update(curves) or new_figure()[0]
    )
    table, *_ = compare(tmp_path / "runs", "--group")
    assert table["a"]["bleu_area"].startswith("26.6")
    assert drawn == {
        "a": ({"0": 80.0, "0.3": 40.0}, {"0": 1.0, "0.3": 2.0}),
        "b": (
            {"0": 55.0, "0.3": 27.5},
            {"0": pytest.approx(50**0.5), "0.3": pytest.approx(12.5**0.5)},
        ),
    }
    monkeypatch.undo()
    compare(tmp_path / "runs")
    assert (tmp_path / "out" / "noise.svg").read_text().startswith("<?xml")
    compare(tmp_path / "runs" / "none")
    assert not (tmp_path / "out" / "noise.svg").exists()


def test_the_samples_of_a_run_are_compared(compare, tmp_path):
    for name, value in (("a", 40.5), ("b", None)):
        make(tmp_path / name, evaluation())
        if value is not None:
            row = {"generative_ppl": value, "mauve": None, "se": {"generative_ppl": 0.5}}
            path = tmp_path / name / "model" / "evaluation" / "samples.json"
            path.parent.mkdir(parents=True)
            others = {"held-out": {"generative_ppl": 30.0}}
            path.write_text(json.dumps({"rows": {"samples": row, **others}}))
    table, text, rows, _ = compare(tmp_path / "a", tmp_path / "b")
    assert table["a"]["samples.generative_ppl"] == "40.500"
    assert table["b"]["samples.generative_ppl"] == "-"
    assert rows["a"]["se.samples.generative_ppl"] == "0.5"
    assert "`samples.generative_ppl` (lower is better)" in text


# Real runs


def test_real_runs(compare, tmp_path, tiny):
    """A finished run and one killed in phase 2, compared with their files."""
    ds_config = CONFIGS / "zero0.json"
    words = ("--ds_config", ds_config, "--config", tiny, "--precision", "fp32")
    fidelity = ("--eval.reconstructions", "9", "--eval.noise_sentences", "4")
    done = ("--output_dir", tmp_path / "runs" / "done", "--phase2.free_bits", "0.5")
    train(*words, *done, *fidelity)
    cut = (
        "--phase1.steps",
        "2",
        "--phase2.steps",
        "5000",
        "--checkpoint_every",
        "3",
        "--keep_checkpoints",
        "999",
        "--eval_every",
        "2",
    )
    live = start(*words, "--output_dir", tmp_path / "runs" / "live", *cut)
    # By the second checkpoint, the run has said that it made the first.
    live.wait_for(tmp_path / "runs" / "live" / "checkpoints" / "phase2-step00000006" / "COMPLETE")
    live.kill()
    table, text, rows, warnings = compare(tmp_path / "runs")
    final = json.loads((tmp_path / "runs" / "done" / "metrics.json").read_text())["test"]
    assert float(rows["done"]["elbo"]) == pytest.approx(-(final["rec"] + final["kl"]), rel=1e-9)
    assert float(rows["done"]["se.rec"]) == final["se"]["rec"]
    assert (final["noise_sentences"], sum(final["by_length"]["sentences"].values())) == (4, 9)
    assert float(rows["done"]["noise.bleu.0.5"]) == final["noise"]["bleu"]["0.5"]
    card = (tmp_path / "runs" / "done" / "model" / "README.md").read_text()
    for name in ("exact_match", "token_accuracy_free", "bleu_area", "participation_ratio"):
        assert name in card
    assert table["done"]["state"] == "finished"
    state = re.fullmatch(r"phase 2 at step (\d+) of 5,000 \(killed\)", table["live"]["state"])
    assert int(state[1]) >= 3
    assert re.fullmatch(r"valid, step \d+ \(phase 2\)", table["live"]["values of"])
    assert table["live"]["rec"].endswith("*")
    assert (table["done"]["phase2.free_bits"], table["live"]["phase2.free_bits"]) == ("0.5", "0.2")
    assert {"phase1.steps", "phase2.steps"} <= set(table["done"])
    assert "output_dir" not in table["done"]
    # The same corpus and seed: the same sentences and tokenizer. What is left is what each
    # evaluation says of its own numbers.
    assert f"done: {final['warnings'][0]}" in warnings
    assert all(warning.startswith(("done: ", "live: ")) for warning in warnings)
    assert "\nlive: " not in text
    assert "\ndone: " not in text
