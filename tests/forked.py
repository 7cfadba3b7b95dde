"""Ranks without the wait: forks of a process that has imported everything already.

The imports are nine tenths of the time that a small run takes on a rank. What a rank
does after them, how it is signalled and how it ends is as in a process of its own.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# What a run imports: at its start, with its first optimizer (torch's compiler), and for
# the figure of its first validation.
PRELOADED = [
    "dsvae.train",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
TESTS = str(Path(__file__).parent)  # no rank has it on its path
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PRELOADED)


class Forked:
    """A rank: what `subprocess.Popen` with pipes and a session of its own offers, as
    far as the tests need it."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        self._process = server.Process(target=_run, args=(command, environment, cwd, names))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr), when the process has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        out, err = (Path(file.name).read_text(errors="replace") for file in self._files)
        return out, err


def _run(command: list[str], environment: dict[str, str], cwd: Path, files: list[str]) -> None:
    """Becomes `python SCRIPT ARGUMENTS...`, without the python."""
    os.setsid()
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # As Python makes them at its start: those that are here were made for other files.
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    errors = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = errors
    faulthandler.enable()  # PYTHONFAULTHANDLER is only read at Python's own start
    sys.argv = command
    sys.path[:] = [str(Path(command[0]).parent), *(path for path in sys.path if path != TESTS)]
    runpy.run_path(command[0], run_name="__main__")
