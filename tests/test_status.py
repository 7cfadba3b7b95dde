"""A run says its state, and readers tell a live run from a killed one."""

import json
import os
import socket
import subprocess
import sys
import types
from datetime import datetime, timedelta, timezone

import pytest
from launch import ROOT

from dsvae import status
from dsvae.config import RunConfig, merge, parse_flags, to_yaml
from dsvae.errors import UserError
from dsvae.reports import training_log
from dsvae.reports.training_log import Reporter
from dsvae.run_directory import RunDirectory, state


@pytest.fixture
def run(tmp_path):
    """(directory, reporter) of a run that holds its lock."""
    directory = RunDirectory(tmp_path)
    with directory.claim():
        yield directory, Reporter(RunConfig(output_dir=str(tmp_path)), enabled=True)


def said(directory):
    return json.loads(directory.status.read_text())


def test_a_run_says_where_it_is(run):
    directory, reporter = run
    assert directory.state() == "not started"
    reporter.begin()
    assert directory.state() == "preparing (running)"
    reporter.start_phase(1, 1000, 300)
    assert directory.state() == "phase 1 at step 300 of 1,000 (running)"
    reporter.saved(400)
    assert said(directory)["saved"] == 400
    reporter.start_phase(2, 50, 0)
    assert said(directory)["saved"] is None
    reporter.close(None)
    assert directory.state() == "finished"
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "exit_code": 0, "phase": 2}
    assert said(directory).items() >= mine.items()


def test_steps_are_a_sign_of_life(run, monkeypatch):
    directory, reporter = run
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(training_log, "time", clock)
    reporter.begin()
    reporter.start_phase(1, 100, 0)
    seen = []
    for _ in range(30):
        clock.now += 1
        reporter.advance()
        seen.append(said(directory)["step"])
    assert seen[-1] >= 20
    assert len(set(seen)) <= 4  # and no file per step


@pytest.mark.parametrize(
    ("code", "word"), [(75, "stopped"), (130, "stopped"), (2, "failed"), (74, "failed")]
)
def test_the_end_of_a_run_has_its_reason(run, code, word, capsys):
    directory, reporter = run
    reason = "SIGTERM: saved at step 7"
    reporter.ended(code, reason)  # before it has begun, the directory may be another run's
    assert not directory.status.exists()
    reporter.begin()
    reporter.start_phase(2, 50, 7)
    reporter.ended(code, reason)
    assert directory.state() == f"phase 2 at step 7 of 50 ({word})"
    assert (said(directory)["exit_code"], said(directory)["reason"]) == (code, reason)
    reporter.begin()
    assert f"phase 2 at step 7 of 50 ({word})" in capsys.readouterr().out
    assert directory.state() == "preparing (running)"
    assert said(directory)["reason"] is None


def test_a_killed_run_no_longer_counts_as_running(tmp_path):
    code = """if True:
        import os, sys
        from dsvae.run_directory import RunDirectory
        from dsvae.status import Status
        run = RunDirectory(sys.argv[1])
        lock = run.claim()
        Status(phase=1, step=3, steps=9).write(run.status)
        print(run.state(), flush=True)
        os.kill(os.getpid(), 9)"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-9, "phase 1 at step 3 of 9 (running)\n")
    assert RunDirectory(tmp_path).state() == "phase 1 at step 3 of 9 (killed)"


@pytest.mark.parametrize(("ago", "word"), [(60, "running"), (3600, "killed")])
def test_a_run_on_another_host_whose_lock_is_not_seen_here(tmp_path, monkeypatch, ago, word):
    there = status.Status(phase=1, step=3, steps=9, host="another host")
    monkeypatch.setattr(status, "_now", lambda: moment.isoformat(timespec="seconds"))
    moment = datetime.now(timezone.utc) - timedelta(seconds=ago)
    there.write(tmp_path / "status.json")
    assert RunDirectory(tmp_path).state() == f"phase 1 at step 3 of 9 ({word})"


def test_asking_for_the_state_does_not_keep_a_run_from_its_directory(run, tmp_path):
    directory, _ = run
    with pytest.raises(UserError, match="still alive"):
        RunDirectory(tmp_path).claim()
    status.Status().write(directory.status)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
        RunDirectory(tmp_path).claim()


def test_a_status_that_cannot_be_written_stops_no_run(tmp_path):
    status.Status().write(tmp_path / "gone" / "status.json")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running"}'])
def test_a_damaged_status_says_nothing(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert status.read(tmp_path / "status.json") is None
    assert RunDirectory(tmp_path).state() == "not started"


def test_the_scripts_of_a_cluster_are_told_what_is_finished(tmp_path):
    run = RunDirectory(tmp_path)
    words = ("--output_dir", str(tmp_path), "--seed", "3")
    assert state(*words) == ["not started"]
    run.config.write_text(to_yaml(merge(parse_flags(words))))
    status.Status("finished", phase=1).write(run.status)
    run.phase1_model.mkdir(parents=True)
    assert state(*words, "--phase", "1") == ["finished"]
    assert state(*words) == ["finished (phase 1 only)"]
    run.model.mkdir()
    run.metrics.write_text("{}")
    status.Status("finished", phase=2).write(run.status)
    assert state(*words) == ["finished"]
    assert state(*words, "--model.latent_dim", "4") == ["finished with other values"]
    assert state(*words, "--phase1.lr", "x") == ["finished with other values"]  # for train.py
