"""Ranks without the wait: processes that have imported everything, of which each rank
is forked and runs its script from the top.

The imports are nine tenths of the time that a small run takes on a rank. What a rank
does after them, how it is signalled and how it ends is as in a process of its own.
There are two of these processes, for even and for odd ranks: strings then hash
differently on neighbouring ranks, as they do in processes that are started apart, and
an order that hangs on it shows.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

READY = b"ready"


class Zygote:
    """The test's end of a process that ranks are forked of. It leaves when this end is
    closed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.socket, other = socket.socketpair()
        self._imported = False
        with other:
            subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it has imported everything: a rank that is forked sooner than the next
        one's process would wait for that one."""
        self._imported = self._imported or bool(self.socket.recv(len(READY)))

    def fork(self, command: list[str], environment: dict[str, str], cwd: Path) -> Forked:
        """`python SCRIPT ARGUMENTS...`, without the python."""
        request = json.dumps(
            {"command": command, "environment": environment, "cwd": str(cwd)}
        ).encode()
        with contextlib.ExitStack() as files:
            ours, theirs = [], []
            for _ in range(3):  # stdout, stderr, and what becomes of the process
                reading, writing = os.pipe()
                ours.append(open(reading, errors="replace"))  # noqa: SIM115
                theirs.append(files.enter_context(open(writing, "w")).fileno())
            whole = files.enter_context(tempfile.TemporaryFile())
            whole.write(request)
            whole.flush()
            socket.send_fds(self.socket, [b"fork"], [whole.fileno(), *theirs])
        return Forked(*ours)


class Forked:
    """A rank: what `subprocess.Popen` with pipes and a session of its own offers, as
    far as the tests need it."""

    def __init__(self, stdout, stderr, status) -> None:
        self.returncode: int | None = None
        self._status = status
        self._texts: dict[object, str] = {}
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True)
            for pipe in (stdout, stderr)
        ]
        self._pipes = (stdout, stderr)
        for reader in self._readers:
            reader.start()
        said = status.readline()
        if not said:
            raise RuntimeError("the process that ranks are forked of is gone")
        self.pid = int(said)

    def _read(self, pipe) -> None:
        with pipe:
            self._texts[pipe] = pipe.read()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr), when both are closed and the process has ended."""
        end = None if timeout is None else time.monotonic() + timeout
        for reader in self._readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
        while any(reader.is_alive() for reader in self._readers) or self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.01)
        return self._texts[self._pipes[0]], self._texts[self._pipes[1]]


def serve(requests: socket.socket) -> dict:
    """Forks at every request. Returns in the forked processes alone, with what each has
    to run."""
    running: dict[int, int] = {}  # by process: where its end is reported
    while True:
        if select.select([requests], [], [], 0.01 if running else None)[0]:
            message, files, *_ = socket.recv_fds(requests, len(b"fork"), 4)
            if not message:
                os._exit(0)
            whole, stdout, stderr, status = files
            with open(whole, "rb") as file:
                file.seek(0)
                request = json.loads(file.read())
            if (process := os.fork()) == 0:
                os.setsid()
                os.write(status, f"{os.getpid()}\n".encode())
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                for file in (stdout, stderr, status, *running.values()):
                    os.close(file)
                requests.close()
                return request
            os.close(stdout)
            os.close(stderr)
            running[process] = status
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = running.pop(ended[0])
            with contextlib.suppress(BrokenPipeError):  # a test that failed has let it go
                os.write(status, f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
            os.close(status)


if __name__ == "__main__":
    del sys.path[0]  # tests/: no rank has it
    # What a run imports, at its start and with its first optimizer (torch's compiler):
    # the order is for what train.py sets first.
    for name in ("dsvae.train", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)
    assert threading.active_count() == 1, "a thread is not forked with the process"
    sys.stdout.flush()
    sys.stderr.flush()
    # what is imported stays: looking through it for garbage would copy its memory in
    # every fork
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(READY)
    asked = serve(requests)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    # As Python makes them at its start: those that are here were made for other files.
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    errors = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = errors
    sys.argv = asked["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
