"""`dsvae cache`: what it lists, what it removes, and what it leaves alone."""

import json
import os
import subprocess
import sys
import time

import pytest
from transformers import ByT5Tokenizer

from dsvae.cli import main
from dsvae.config import DataConfig
from dsvae.data.prepared import load_prepared, prepare


@pytest.fixture
def made(tmp_path):
    """A cache of two corpora, the second of which was last used 10 days ago."""
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    paths = []
    for name, lines in (("small.txt", 3), ("large.txt", 4000)):
        file = tmp_path / name
        file.write_text("".join(f"sentence {i}\n" for i in range(lines)))
        given = dict.fromkeys(("train_file", "valid_file", "test_file"), str(file))
        data = DataConfig(**given, cache_dir=str(tmp_path / "cache"))
        arguments = {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": None, "seed": 0}
        paths.append(prepare(data, **arguments))
    os.utime(paths[1], (time.time() - 10 * 86_400,) * 2)
    assert prepare(data, **arguments) == paths[1]
    assert time.time() - paths[1].stat().st_mtime < 86_400  # a run began with it
    os.utime(paths[1], (time.time() - 10 * 86_400,) * 2)
    return paths


def run(tmp_path, capsys, *words):
    code = main(["cache", "--cache_dir", str(tmp_path / "cache"), "--json", *words])
    assert code == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_list(tmp_path, made, capsys):
    large, small = run(tmp_path, capsys)
    assert [small["path"], large["path"]] == [str(path) for path in made]
    assert [small["source"], large["source"]] == ["small.txt", "large.txt"]
    assert [small["sentences"], large["sentences"]] == [9, 12_000]
    assert large["size"] == sum(f.stat().st_size for f in made[1].rglob("*") if f.is_file())
    assert small["days"] < 1 < 9.9 < large["days"] < 10.1
    assert run(tmp_path, capsys, "--older_than", "5") == [large | {"days": pytest.approx(10)}]
    assert main(["cache", "--cache_dir", str(tmp_path / "cache")]) == 0
    assert "12,000 sentences of large.txt" in capsys.readouterr().out


def test_clearing_removes_entries_and_leftovers_alone(tmp_path, made, capsys):
    cache = tmp_path / "cache"
    for name in (".0123.4567.tmp", ".89ab.cdef.tmp", "notes"):
        (cache / name).mkdir()
    os.utime(cache / ".0123.4567.tmp", (0, 0))
    [removed] = run(tmp_path, capsys, "--clear", "--older_than", "5")
    assert (removed["path"], removed["removed"]) == (str(made[1]), True)
    left = {".89ab.cdef.tmp", "notes", made[0].name}
    assert {entry.name for entry in cache.iterdir()} == left
    (made[0] / "report.json").write_text("{")
    assert [entry["source"] for entry in run(tmp_path, capsys, "--clear")] == ["damaged"]
    assert {entry.name for entry in cache.iterdir()} == left - {made[0].name}
    assert run(tmp_path, capsys, "--clear") == []


def test_what_a_run_uses_stays(tmp_path, made, capsys):
    code = "import sys; from dsvae.data.prepared import load_prepared;"
    code += "data = load_prepared(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(made[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "ready\n"
        found = run(tmp_path, capsys, "--clear")
        other.stdin.close()
    assert {row["path"]: row["removed"] for row in found} == {
        str(made[0]): False,
        str(made[1]): True,
    }
    assert len(load_prepared(made[0]).splits["train"]) == 3
    assert not made[1].exists()
    assert [row["removed"] for row in run(tmp_path, capsys, "--clear")] == [True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cache_dir", "nowhere"], "--cache_dir nowhere: no such directory"),
        (["--cache_dir", "file"], "--cache_dir file: no such directory"),
        (["--older_than", "-1"], "--older_than"),
        (["--older_than", "nan"], "--older_than"),
        (["--older_than", "week"], "--older_than"),
        (["--clean"], "--clear"),
        (["0123"], "0123"),
    ],
)
def test_wrong_words(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["cache", *words]) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert len(found.err.splitlines()) == 1
    assert found.out == ""


def test_a_cache_that_does_not_exist_yet_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    assert main(["cache"]) == 0
    assert str(tmp_path / "hf" / "dsvae") in capsys.readouterr().err
