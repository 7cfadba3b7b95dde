"""Trackers with their real packages, offline, and with stand-ins that fail or hang."""

import json
import struct
import threading

import pytest

from dsvae.config import RunConfig, names_reports
from dsvae.errors import UserError
from dsvae.reports import trackers
from dsvae.reports.training_log import Reporter

VALUES = {"loss": 3.0, "rec": 2.0, "kl": 1.0, "tokens_per_s": 1.0, "flops_per_s": 1.0}
VALUES["peak_memory_gb"] = 1.0
TEST = {"rec": 1.5, "kl": 0.5, "kl_per_dim": [0.5, 0.0], "sentences": 4}


def start(directory, report_to, first, steps, code=0):
    """A start of a run: it logs steps, and ends with an exit code."""
    directory.mkdir(exist_ok=True)
    reporter = Reporter(RunConfig(output_dir=str(directory), report_to=report_to), enabled=True)
    reporter.open(first)
    for step in steps:
        reporter.scalars(step, 1, {**VALUES, "loss": 10.0 - step}, [0.25, 0.75])
    last = steps[-1]
    reporter.evaluation(last, 1, "valid", {"rec": 1.25, "rec_shuffled": 4.0, "kl_per_dim": [1.0]})
    reporter.text(last, [("a bed", "a bee")], ["the cab"])
    if code:
        reporter.ended(code, "stopped")
        reporter._jsonl.close()
    else:
        reporter.evaluation(last, 2, "test", TEST)
        reporter.close(None)


def cut_and_resumed(directory, name):
    """Steps 1 to 4, cut; the checkpoint had step 2, so that 3 and 4 come again."""
    start(directory, name, 1, [1, 2, 3, 4], code=75)
    start(directory, name, 3, [3, 4, 5, 6])
    return json.loads((directory / "trackers.json").read_text())[name]


def records(data):
    """The records of a .wandb file, a log in LevelDB's format: blocks of 32 KiB, and in
    them parts of records with (crc, length, kind) before each."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole = (whole if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole


def test_wandb(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    id = cut_and_resumed(tmp_path / "run", "wandb")
    assert "warning" not in capsys.readouterr().out
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{id}.wandb"] * 2
    losses, keys, settings = {}, set(), set()
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
            keys |= items.keys()
            if "main/loss" in items:
                step = json.loads(items["_step"])
                assert step not in losses
                losses[step] = json.loads(items["main/loss"])
            settings |= {update.key for update in record.run.config.update}
    assert losses == {step: 10.0 - step for step in range(1, 7)}
    assert {"main/rec", "reconstruction", "prior", "evaluation", "valid/kl_per_dim"} <= keys
    assert {"seed", "phase2"} <= settings


def test_trackio(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    import sqlite3

    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio.sqlite_storage", "trackio.utils"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    name = cut_and_resumed(tmp_path / "run", "trackio")
    out = capsys.readouterr().out
    assert "warning" not in out
    database = SQLiteStorage.get_project_db_path("dsvae")
    assert str(database).startswith(str(tmp_path))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {row[0] for row in rows} == {name}
    found = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = [(step, m["main/loss"]) for step, m in found if "main/loss" in m]
    assert sorted(losses) == [(step, 10.0 - step) for step in range(1, 7)]
    keys = {key for _, metrics in found for key in metrics}
    assert {"main/rec", "reconstruction", "prior", "evaluation", "valid/kl_per_dim"} <= keys


def test_mlflow(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    id = cut_and_resumed(tmp_path / "run", "mlflow")
    assert "warning" not in capsys.readouterr().out
    client = MlflowClient(store)
    run = client.get_run(id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    history = client.get_metric_history(id, "main/loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 10.0 - s) for s in range(1, 7)]
    assert {f.path for f in client.list_artifacts(id)} >= {"prior", "reconstruction", "evaluation"}
    path = client.download_artifacts(id, "reconstruction/00000006.jsonl", str(tmp_path))
    with open(path) as file:
        assert "a bee" in file.read()


def test_one_that_fails_and_one_that_hangs_do_not_hold_the_run_up(tmp_path, monkeypatch, capsys):
    released, seen = threading.Event(), []

    def fails(record):
        def write(entry):
            raise OSError("no route to host\nmore")

        return "1", write, lambda code: None

    def pictures(record):
        def write(entry):
            seen.extend(entry.images.values())

        return "3", write, lambda code: None

    def hangs(record):
        return "2", lambda entry: released.wait(60), lambda code: None

    each = {"wandb": fails, "mlflow": hangs, "trackio": pictures}
    monkeypatch.setattr(trackers, "TRACKERS", each)
    start(tmp_path / "run", "tensorboard,wandb,trackio", 1, list(range(1, 20)))
    out = capsys.readouterr().out
    assert out.count("warning: wandb") == 1
    assert "no route to host" in out
    assert "more" not in out.replace("no more", "")
    assert "warning: trackio" not in out
    # They are read already: PIL reads late, and two threads would read one file at once.
    assert len(seen) >= 2
    assert getattr(seen[0], "fp", None) is None
    assert seen[0].size > (300, 200)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"train"' in row for row in rows) == 19
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    start(tmp_path / "other", "mlflow", 1, [1, 2])
    released.set()
    assert capsys.readouterr().out.count("warning: mlflow") == 1


def test_none_leaves_metrics_jsonl_alone(tmp_path):
    start(tmp_path, "none", 1, [1, 2])
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "run.png"}


@pytest.mark.parametrize("text", ["", "wandb,", "tensorbord", "none,wandb"])
def test_unknown_names_are_refused(text):
    assert not names_reports(text)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check("tensorboard")
    with pytest.raises(UserError, match="trackio is not installed: pip install trackio"):
        trackers.check("tensorboard,trackio")
