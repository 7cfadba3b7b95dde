"""How a rank ends: what it says on stderr when an error ends it, and its exit code.

Nearly every error is met by every rank. It is printed once all the same, by rank 0 or
by the one rank that has it.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import sys
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from dsvae.errors import (
    EXIT_DEFECT,
    EXIT_DISK,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    RunStopped,
    UserError,
    first_line,
)
from dsvae.parallel.stopping import Stopping
from dsvae.parallel.watchdog import advice
from dsvae.parallel.world import World, may_come_from_another_rank

PRINTS_WITHIN = 5.0
"""Seconds that the ranks of a node may be apart at their start."""


def explain(
    error: BaseException, world: World | None, reading: bool, stopping: Stopping
) -> tuple[int, str]:
    """Says on stderr what ends this rank; returns its exit code and the reason in one
    line.

    Args:
        world: None if the ranks have not met.
        reading: whether the rank was still reading its command line and its files,
            which all ranks do alike.
    """
    if isinstance(error, UserError):
        if reading:
            _print_on_every_node(f"error: {error}", stopping)
        else:
            _print_once(error, f"error: {error}", world)
        return EXIT_USER_ERROR, first_line(error)
    if isinstance(error, RunStopped):
        # if the ranks never met, rank 0 may be the one that is missing
        _print(error.message, on_every_rank=world is None)
        return error.code, error.message
    if isinstance(error, KeyboardInterrupt):
        _print(
            "interrupted twice, left at once; the same command continues from the last complete "
            "checkpoint"
        )
        return EXIT_INTERRUPTED, "interrupted twice"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        line = (
            f"error: {error}; make room, and the same command continues from the last complete "
            f"checkpoint"
        )
        _print_once(error, line, world)
        return EXIT_DISK, first_line(error)
    if may_come_from_another_rank(error):
        if world is not None and world.watchdog is not None and (lost := world.watchdog.lost()):
            line, code = lost
            _print(f"error: rank {world.rank}: {line}; {advice(code)}", on_every_rank=True)
            return code, line
        if stopping.pending is not None:  # this rank left the operation on a signal
            _print(stopping.pending.message)
            return stopping.pending.code, stopping.pending.message
    _print_stack(error, world)
    return EXIT_DEFECT, f"{type(error).__name__}: {first_line(error)}"


def _print_stack(error: BaseException, world: World | None) -> None:
    """Prints the stack of a defect. The other ranks do not repeat the stack of rank
    0."""
    if world is not None and world.watchdog is not None:
        stack = "".join(traceback.format_exception(error))
        digest = hashlib.sha256(stack.encode()).hexdigest()
        if not world.is_main and world.watchdog.reported(digest):
            last = stack.strip().splitlines()[-1]
            line = f"error: rank {world.rank}: {last} (its stack is that of rank 0)"
            _print(line, on_every_rank=True)
            return
        world.watchdog.report(digest)
    sys.excepthook(type(error), error, error.__traceback__)


def _print_on_every_node(line: str, stopping: Stopping) -> None:
    """Prints one line per node, which may be the only one that lacks a file."""
    if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0:
        _print(line, on_every_rank=True)
        return
    # Launchers end all ranks when the first one leaves, and the one that prints may
    # still be importing.
    end = time.monotonic() + PRINTS_WITHIN
    while stopping.pending is None and time.monotonic() < end:
        time.sleep(0.05)


def _print_once(error: Exception, line: str, world: World | None) -> None:
    """Prints one line for all ranks, or the rank's own line if it may be the only
    one."""
    if world is None:
        _print(line, on_every_rank=True)
    elif getattr(error, "shared", False) or world.is_main or world.watchdog is None:
        _print(line)
        if world.watchdog is not None:
            world.watchdog.report(line)
    elif not world.watchdog.reported(line):
        _print(line.replace("error: ", f"error: rank {world.rank}: ", 1), on_every_rank=True)


def _print(line: str, on_every_rank: bool = False) -> None:
    if on_every_rank or int(os.environ.get("RANK", "0")) == 0:
        print(f"dsvae: {line}", file=sys.stderr, flush=True)


def end_process(code: int) -> NoReturn:
    """Ends this process with everything flushed, without taking the interpreter down.

    Taking it down lasts a while, and sometimes it aborts (three of about a hundred
    small ZeRO-3 runs, torch 2.13, on CPU): a thread that is in C++ at that moment ends
    the process with "terminate called", and a finished run with 134.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
