"""A function of the rows of a data set, called in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import datasets

T = TypeVar("T")
Batch = dict[str, list[Any]]

_work: tuple[datasets.Dataset, int, Callable[[Batch], Any]]
"""In a process of the pool: what it reads, how many rows per call, and what it calls."""


def map_batches(
    function: Callable[[Batch], T], split: datasets.Dataset, rows: int, processes: int
) -> Iterator[T]:
    """The result of `function` for each batch of `rows` rows, in the order of the split.

    The processes are forks, so neither the split nor the function is copied to them. With
    fewer than two processes, the calls are made in this one.

    Args:
        function: its results, and the exceptions that it raises, must be picklable.

    Raises:
        BrokenProcessPool: a process was killed.
        Exception: whatever the function raises.
    """
    if processes < 2:
        yield from map(function, split.iter(rows))
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, _begin, (split, rows, function)) as pool:
        yield from pool.map(_call, range(0, len(split), rows))


def usable_cores() -> int:
    """How many cores this process may run on; 1 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _begin(*work: Any) -> None:
    global _work
    _work = work
    # The forks end with their parent, however it ends. The handlers of a run are not theirs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(start: int) -> Any:
    split, rows, function = _work
    return function(split[start : start + rows])
