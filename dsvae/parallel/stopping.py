"""Signals: after one, all ranks leave together between two optimizer steps, with
everything saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dsvae.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE, RunStopped
from dsvae.parallel.world import World

# In rising order: if ranks got different signals, the last one here counts for all.
# (Launchers answer Ctrl-C with a SIGTERM.)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Listens for SIGTERM, SIGUSR1 and SIGINT (Ctrl-C).

    Inside `defer_signals` a signal is only noted, and the loop asks `agreed` after
    every step. Anywhere else everything is saved already, and `RunStopped` is raised at
    once. A second Ctrl-C never waits.
    """

    def __init__(self) -> None:
        self._place = 0  # in SIGNALS, from 1; 0: none came
        self._deferred = False

    def install(self) -> None:
        """Starts listening. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Makes signals in a block wait for `agreed`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agreed(self, world: World) -> RunStopped | None:
        """Returns what all ranks raise once they have saved, if any of them got a
        signal. Collective."""
        place = world.largest(self._place)
        return _stopped(SIGNALS[place - 1], "saved") if place else None

    @property
    def pending(self) -> RunStopped | None:
        """What this rank would raise at once, if it got a signal."""
        return _stopped(SIGNALS[self._place - 1], "left at once") if self._place else None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._place == len(SIGNALS):
            raise KeyboardInterrupt
        self._place = max(self._place, SIGNALS.index(signal.Signals(number)) + 1)
        if not self._deferred:
            raise _stopped(signal.Signals(number), "left at once")


def _stopped(number: signal.Signals, how: str) -> RunStopped:
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
    return RunStopped(code, f"{number.name}: {how}; the same command continues")
