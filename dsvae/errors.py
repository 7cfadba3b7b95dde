"""The exception for mistakes that a user can repair, and what each exit code of a run
means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the command, the configuration or the data.

    The message is one line that says what is wrong, where, and what to do. The entry
    points print it to stderr and leave with exit code 2. Nothing has been half-written
    by then.
    """


EXIT_DEFECT = 1
"""A defect in the program, or a lack of memory. The stack is on stderr."""
EXIT_USER_ERROR = 2
"""A mistake of the user. The line on stderr says what to change; the same command fails
again."""
EXIT_NON_FINITE = 65
"""Losses or gradients were not finite for too many steps in a row (EX_DATAERR of
sysexits.h). The batch is in output_dir."""
EXIT_RANK_LOST = 69
"""Another rank did not answer within `hang_timeout` (EX_UNAVAILABLE). The same command
continues from the last checkpoint."""
EXIT_DISK = 74
"""A checkpoint, or the output of a command, could not be written (EX_IOERR). Once there
is room, the same command continues."""
EXIT_RESUMABLE = 75
"""SIGTERM or SIGUSR1 came, and the run saved at the next step and left (EX_TEMPFAIL). The
same command continues exactly there."""
EXIT_PREFLIGHT = 78
"""`dsvae.parallel.preflight` found a bad node and named it (EX_CONFIG) before the run
began. Leave the node out, or repair it."""
EXIT_INTERRUPTED = 130
"""Ctrl-C: the run saved at the next step and left (128 + SIGINT, as shells count). The
same command continues exactly there."""


class RunStopped(BaseException):
    """The run ends early without a mistake in the command. The entry point prints the
    line and leaves with `code`.

    It is no `Exception`, because a signal raises it anywhere: libraries that catch
    exceptions must not swallow it.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)  # pickling, between ranks, keeps these arguments
        self.code, self.message = code, message


def exit_code(error: BaseException) -> int:
    """The exit code of a process that an exception ends."""
    if isinstance(error, RunStopped):
        return error.code
    if isinstance(error, UserError):
        return EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return EXIT_DEFECT


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one resembles most; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` for an unknown name, or nothing."""
    close = nearest(name, known)
    return f"; did you mean {prefix}{close}?" if close else ""
