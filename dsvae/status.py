"""What a run says of itself: status.json in its output directory, which rank 0
writes."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from dsvae.config import phase_name
from dsvae.files import write_json

SILENT = 300.0
"""Seconds without a sign of life after which a run on another host counts as killed."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Status:
    """How far a run is, and how its last start ended."""

    state: str = "running"
    """running, finished, stopped (by a signal) or failed. Only a live run is running: one
    that was killed could not change the word (`RunDirectory.state` tells them apart)."""
    phase: int | None = None
    """The phase that runs or ran last; None before the first one."""
    step: int = 0
    """Optimizer steps done in that phase."""
    steps: int = 0
    """Optimizer steps of that phase."""
    saved: int | None = None
    """The step of its newest checkpoint."""
    exit_code: int | None = None
    """None while the run is running."""
    reason: str | None = None
    """The line that ended it; None for a finished run."""
    host: str = field(default_factory=socket.gethostname)
    """Where rank 0 runs."""
    pid: int = field(default_factory=os.getpid)
    """The process of rank 0."""
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    """Its SLURM job, if any."""
    version: str = field(default_factory=lambda: version("dsvae"))
    """That of dsvae."""
    started: str = field(default_factory=_now)
    """When this start began (UTC)."""
    updated: str = field(default_factory=_now)
    """When this was written: a sign of life."""

    def write(self, path: Path) -> None:
        """Replaces the file at once. A run does not fail because this cannot be
        written."""
        self.updated = _now()
        with suppress(OSError):
            write_json(path, asdict(self))

    @property
    def progress(self) -> str:
        """`phase 2 at step 1,000 of 4,000`, or `preparing`."""
        if self.phase is None:
            return "preparing"
        return f"{phase_name(self.phase)} at step {self.step:,} of {self.steps:,}"

    @property
    def is_recent(self) -> bool:
        """Whether a run on another host has shown a sign of life lately."""
        age = datetime.now(timezone.utc) - datetime.fromisoformat(self.updated)
        return self.host != socket.gethostname() and age.total_seconds() < SILENT


def read(path: Path) -> Status | None:
    """Returns what a run has said; None if it has not said anything readable."""
    try:
        found = json.loads(path.read_bytes())
        return Status(**{each.name: found[each.name] for each in fields(Status)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
