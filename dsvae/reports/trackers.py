"""Experiment trackers beside TensorBoard: what a run reports, sent to wandb, trackio or
MLflow by their public functions.

Each tracker works in a thread of its own, behind a queue. One that fails or is too slow
warns once and is left out: it never ends a run, and no step waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsvae.config import RunConfig, flatten, to_tree
from dsvae.errors import UserError, first_line
from dsvae.files import write_json

PROJECT = "dsvae"
WAITING = 2_000
"""Entries that may wait for a tracker."""
PATIENCE = 30.0
"""Seconds that a run waits for a tracker at its end."""


@dataclass
class Entry:
    """What a tracker is sent at a time."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    tables: dict[str, tuple[list[str], list[list[str]]]] = field(default_factory=dict)
    """Headings and rows by name."""
    images: dict[str, Any] = field(default_factory=dict)
    """PIL images by name."""


@dataclass
class Record:
    """The record of a run at a tracker."""

    config: RunConfig
    id: str | None
    """The tracker's name of it, if an earlier start of the run has made it."""

    @property
    def name(self) -> str:
        return Path(self.config.output_dir).name


Session = tuple[str, Callable[[Entry], None], Callable[[int], None]]
"""The id of the record; what writes an entry; what ends the record, by an exit code."""


def wandb(record: Record) -> Session:
    """Opens a run of Weights & Biases. WANDB_PROJECT, WANDB_MODE and the others hold."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=record.name,
        id=record.id,
        resume="allow" if record.id else None,
        dir=record.config.output_dir,
        config=to_tree(record.config),
        settings=wandb.Settings(console="off", silent=True),
    )

    def write(entry: Entry) -> None:
        values: dict[str, Any] = dict(entry.scalars)
        for name, (columns, rows) in entry.tables.items():
            values[name] = wandb.Table(columns=[*columns], data=rows)
        values |= {name: wandb.Image(image) for name, image in entry.images.items()}
        run.log(values, step=entry.step)

    return run.id, write, lambda code: run.finish(exit_code=code)


def trackio(record: Record) -> Session:
    """Opens a run of trackio, by default on this machine (TRACKIO_DIR)."""
    import trackio

    name = record.id or f"{record.name}-{os.urandom(3).hex()}"
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    settings = {key: str(value) for key, value in flatten(to_tree(record.config)).items()}
    run = trackio.init(
        project=project,
        name=name,
        config=settings,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )

    def write(entry: Entry) -> None:
        values: dict[str, Any] = dict(entry.scalars)
        for table, (columns, rows) in entry.tables.items():
            values[table] = trackio.Table(columns=columns, data=rows)
        values |= {key: trackio.Image(image) for key, image in entry.images.items()}
        run.log(values, step=entry.step)

    return name, write, lambda code: run.finish()


def mlflow(record: Record) -> Session:
    """Opens a run of MLflow, by default where MLFLOW_TRACKING_URI says. Tables and images
    are artifacts."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if record.id is None:
        found = client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else client.create_experiment(title)
        id = client.create_run(experiment, run_name=record.name).info.run_id
        settings = flatten(to_tree(record.config)).items()
        params = [Param(name, str(value)[:500]) for name, value in settings]
        for start in range(0, len(params), 100):  # a request has at most 100
            client.log_batch(id, params=params[start : start + 100])
    else:
        id = record.id
        client.set_terminated(id, "RUNNING")

    def write(entry: Entry) -> None:
        now = int(time.time() * 1000)
        values = entry.scalars.items()
        client.log_batch(id, [Metric(name, value, now, entry.step) for name, value in values])
        for name, (columns, rows) in entry.tables.items():
            lines = "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
            client.log_text(id, lines + "\n", f"{name}/{entry.step:08d}.jsonl")
        for name, image in entry.images.items():
            client.log_image(id, image, f"{name}/{entry.step:08d}.png")

    def finish(code: int) -> None:
        client.set_terminated(id, "FAILED" if code else "FINISHED")

    return id, write, finish


TRACKERS = {"wandb": wandb, "trackio": trackio, "mlflow": mlflow}


class Tracker:
    """One tracker at work in its thread.

    Args:
        say: prints a line.
        ids: the file with the names of the run's records.
    """

    def __init__(self, name: str, config: RunConfig, ids: Path, say: Callable[[str], None]) -> None:
        self.name, self._config, self._ids, self._say = name, config, ids, say
        self._queue: queue.Queue[Entry | int] = queue.Queue(WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def put(self, entry: Entry | int) -> None:
        """Takes an entry, or at the end the exit code of the run; returns at once."""
        try:
            if not self._failed:
                self._queue.put_nowait(entry)
        except queue.Full:
            self._fail("it is too slow")

    def wait(self, until: float) -> None:
        """Waits until everything is written, but not beyond a time of `time.monotonic`."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive() and not self._failed:
            self._fail(f"it did not end within {PATIENCE:.0f} s")

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._say(f"warning: {self.name} gets no more of this run ({reason}); the run goes on")

    def _work(self) -> None:
        try:
            with _lock:
                known = read_ids(self._ids)
            record = Record(self._config, known.get(self.name))
            id, write, finish = TRACKERS[self.name](record)
            with _lock:
                write_json(self._ids, read_ids(self._ids) | {self.name: id})
            while not self._failed:
                entry = self._queue.get()
                if isinstance(entry, int):
                    finish(entry)
                    return
                write(entry)
        except BaseException as error:  # a library may end its thread with SystemExit
            self._fail(first_line(error) or type(error).__name__)


_lock = threading.Lock()
"""Held while the file of the ids is read or written."""


def read_ids(path: Path) -> dict[str, str]:
    """Returns the names of the run's records by tracker."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def names_of(report_to: str) -> list[str]:
    """Returns the names in `report_to`; none has no name."""
    return [] if report_to == "none" else report_to.split(",")


def check(report_to: str) -> None:
    """Raises UserError if the package of a tracker is not installed."""
    for name in names_of(report_to):
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            package = "mlflow-skinny" if name == "mlflow" else name
            raise UserError(
                f"--report_to {report_to}: {name} is not installed: pip install {package}, or "
                f"leave it out"
            )


def start(config: RunConfig, ids: Path, say: Callable[[str], None]) -> Iterator[Tracker]:
    """Starts the trackers of a run."""
    for name in names_of(config.report_to):
        if name in TRACKERS:
            yield Tracker(name, config, ids, say)
