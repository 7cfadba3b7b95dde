"""What ends a rank, and what it says then; the other ranks are a stand-in."""

import json
import os
import signal
import threading
import time
import types
from contextlib import nullcontext

import pytest
import torch

from dsvae import failures, train
from dsvae.config import build, load_tree
from dsvae.data import sources
from dsvae.data.grammar import generate
from dsvae.errors import (
    EXIT_DEFECT,
    EXIT_RANK_LOST,
    EXIT_RESUMABLE,
    EXIT_USER_ERROR,
    UserError,
)
from dsvae.parallel.world import World
from dsvae.reports.training_log import Reporter


class Others:
    """A watchdog to which another rank is lost, always."""

    def __init__(self, before=lambda: None, shown=()):
        self.before, self.shown, self.code = before, list(shown), None

    def lost(self):
        self.before()
        return "rank 1 no longer answers", EXIT_RANK_LOST

    def report(self, line):
        self.shown.append(line)

    def reported(self, line):
        return line in self.shown

    def close(self, code=None):
        self.code = code


def ended(monkeypatch, error, others, rank=0):
    """The exit code of a rank on which `error()` is raised in the midst of a run."""
    world = World(rank, rank, 2, torch.device("cpu"), others)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(train.configuration, "read", lambda _: types.SimpleNamespace(**SETTINGS))
    monkeypatch.setattr(train.ds_config, "load", lambda _: {})
    monkeypatch.setattr(train, "join", lambda _: world)
    monkeypatch.setattr(train, "run", lambda *_: error())
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return train.main([])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SETTINGS = {"ds_config": "x.json", "hang_timeout": 1.0, "output_dir": "runs/x", "report_to": "none"}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def raising(error, module):
    """A function of that module which raises."""
    scope = {"__name__": module, "error": error}
    exec("def operation():\n    raise error", scope)
    return scope["operation"]


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "dsvae.modeling.t5_vae"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "deepspeed.runtime.engine"),
        (torch.OutOfMemoryError("CUDA out of memory"), "torch.distributed.distributed_c10d"),
    ],
)
def test_an_error_of_its_own_is_no_lost_rank(error, module, monkeypatch, capsys):
    """Although another rank is lost at the same time, and a signal came."""

    def with_signal():
        monkeypatch.setattr(train.Stopping, "pending", types.SimpleNamespace(code=75, message=""))
        raising(error, module)()

    others = Others()
    assert ended(monkeypatch, with_signal, others) == EXIT_DEFECT
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert str(error) in stderr
    assert "no longer answers" not in stderr
    assert others.code == EXIT_DEFECT


@pytest.mark.parametrize("module", ["torch.distributed.distributed_c10d", "deepspeed.comm.torch"])
def test_an_operation_that_fails_because_of_another_rank_names_it(module, monkeypatch, capsys):
    error = RuntimeError("Connection reset by peer")
    assert ended(monkeypatch, raising(error, module), Others()) == EXIT_RANK_LOST
    stderr = capsys.readouterr().err
    assert stderr.startswith("dsvae: error: rank 0: rank 1 no longer answers; ")
    assert stderr.count("\n") == 1


def test_a_signal_while_the_end_is_explained_changes_nothing(monkeypatch, capsys):
    """The deepspeed launcher sends SIGTERM to all ranks when the first has failed."""
    others = Others(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
    error = RuntimeError("Connection reset by peer")
    operation = raising(error, "torch.distributed.distributed_c10d")
    assert ended(monkeypatch, operation, others) == EXIT_RANK_LOST
    assert "SIGTERM" not in capsys.readouterr().err


def test_a_mistake_is_printed_before_a_launcher_ends_the_rank_that_prints_it(monkeypatch, capsys):
    """A launcher ends all ranks when the first one leaves: the silent ones of a node wait
    for its signal."""

    def refuse(_):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise UserError("no such file")

    monkeypatch.setattr(failures, "PRINTS_WITHIN", 60.0)
    monkeypatch.setattr(train.configuration, "read", refuse)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    begin = time.monotonic()
    try:
        assert train.main([]) == EXIT_USER_ERROR
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert 0.2 <= time.monotonic() - begin < 30
    assert capsys.readouterr().err == ""


def test_an_operation_that_fails_on_a_signal(monkeypatch, capsys):
    others = Others()
    others.lost = lambda: None
    operation = raising(RuntimeError("interrupted"), "torch.distributed.distributed_c10d")

    def on_signal():
        pending = train.RunStopped(EXIT_RESUMABLE, "SIGTERM: left at once")
        monkeypatch.setattr(train.Stopping, "pending", pending)
        operation()

    assert ended(monkeypatch, on_signal, others) == EXIT_RESUMABLE
    assert capsys.readouterr().err == "dsvae: SIGTERM: left at once\n"


def test_a_stack_that_all_ranks_have_is_shown_once(monkeypatch, capsys):
    def defect():
        raise TypeError("an unexpected keyword argument")

    first = Others()
    assert ended(monkeypatch, defect, first) == EXIT_DEFECT
    assert "Traceback" in capsys.readouterr().err
    assert ended(monkeypatch, defect, Others(shown=first.shown), rank=1) == EXIT_DEFECT
    assert capsys.readouterr().err == (
        "dsvae: error: rank 1: TypeError: an unexpected keyword argument "
        "(its stack is that of rank 0)\n"
    )

    def other():
        raise TypeError("another one")

    assert ended(monkeypatch, other, Others(shown=first.shown), rank=1) == EXIT_DEFECT
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_is_lost_says_so_in_its_status(monkeypatch, tmp_path):
    monkeypatch.setitem(SETTINGS, "output_dir", str(tmp_path))
    operation = raising(RuntimeError("Connection reset"), "torch.distributed.distributed_c10d")
    begun = []
    monkeypatch.setattr(
        train, "Reporter", lambda *given: begun.append(Reporter(*given)) or begun[0]
    )

    def lose():
        begun[0].begin()
        operation()

    assert ended(monkeypatch, lose, Others()) == EXIT_RANK_LOST
    said = json.loads((tmp_path / "status.json").read_text())
    assert (said["state"], said["exit_code"]) == ("failed", EXIT_RANK_LOST)
    assert said["reason"] == "rank 1 no longer answers"


def test_a_start_reads_its_files_once_and_leaves_the_configuration_alone(tmp_path, monkeypatch):
    """A first start, and one that goes on in the same directory."""
    texts = [drawn.text for drawn in generate(200, seed=1)]
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    config = build(
        {
            "ds_config": "x.json",
            "output_dir": str(tmp_path / "run"),
            "data": {
                "train_file": str(tmp_path / "train.txt"),
                "cache_dir": str(tmp_path / "cache"),
            },
            "model": {"vocab_size": 516},
        },
        where="test",
    )
    read, hash_file = [], sources._hash_file
    monkeypatch.setattr(sources, "_hash_file", lambda file: read.append(file) or hash_file(file))
    engine = types.SimpleNamespace(ds_config={}, zero_stage=0, precision="fp32")
    monkeypatch.setattr(train, "phase_engine", lambda *_: nullcontext((engine, None)))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_phase", stop)
    for _ in range(2):
        reporter = train.Reporter(config, enabled=True)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, {}, World(0, 0, 1, torch.device("cpu")), train.Stopping(), reporter)
        assert [file.name for file in read] == ["train.txt"]
        assert config.ds_config == "x.json"
        read.clear()
    written = build(load_tree(str(tmp_path / "run" / "config.yaml")), where="test")
    assert written.ds_config == str(tmp_path / "run" / "ds_config.json")
