"""A function of the rows of a data set, called in several processes.

Each is a new interpreter. A fork would copy the locks that other threads hold at that
moment, and nothing would ever release them; `multiprocessing` would import the main
module again, with torch and DeepSpeed.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

import datasets

from dsvae.errors import UserError

T = TypeVar("T")
Batch = dict[str, list[Any]]


def map_batches(
    function: Callable[[Batch], T], split: datasets.Dataset, rows: int, processes: int
) -> Iterator[T]:
    """Yields the result of `function` for each batch of `rows` rows, in the order of the
    split.

    With fewer than two processes, the calls are made in this one. Otherwise the processes
    end with this one, however it ends.

    Args:
        function: it, its results and the exceptions that it raises must be picklable.

    Raises:
        UserError: a process was killed.
        Exception: whatever the function raises.
    """
    if processes < 2:
        yield from map(function, split.iter(rows))
        return
    with ExitStack() as stack:
        busy: deque[_Worker] = deque()  # each with one batch, in their order
        for batch in split.iter(rows):
            results = []
            if len(busy) < processes:
                worker = _Worker(function)
                stack.callback(worker.end)
            else:
                worker = busy.popleft()
                results.append(worker.result())
            worker.send(batch)
            busy.append(worker)
            yield from results
        for worker in busy:
            yield worker.result()


def usable_cores() -> int:
    """Returns how many cores this process may run on; 1 if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


class _Worker:
    """A process that calls a function, seen from its parent."""

    def __init__(self, function: Callable[[Batch], Any]) -> None:
        self._connection, other = Pipe()
        script = f"import sys; sys.path[:] = {sys.path!r}; from dsvae.data import processes; "
        script += f"processes.work({other.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", script],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # it has one core
        )
        other.close()
        self.send(function)

    def send(self, value: Any) -> None:
        """Sends the function, and later its arguments."""
        with suppress(OSError):  # `result` says that the process has ended
            self._connection.send(value)

    def result(self) -> Any:
        """Returns what the function makes of the argument that was sent, or raises what
        it raises."""
        try:
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise UserError(
                f"a process that tokenizes has ended (exit code {self._process.wait()}): give it "
                f"more memory, or fewer cores"
            ) from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def work(file: int) -> None:
    """Calls a function in a process of `map_batches`.

    Args:
        file: the descriptor of the connection to the parent.
    """
    # Signals to the whole group are for the parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(file)
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    function = pickle.loads(received.get())
    while True:
        batch = pickle.loads(received.get())
        try:
            connection.send((function(batch), None))
        except Exception as error:
            connection.send((None, error))


def _receive(connection: Connection, received: queue.SimpleQueue[bytes]) -> None:
    """Receives what the parent sends, and ends the process with it."""
    try:
        while True:
            received.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)
