"""Finds out which rank no longer answers. Without it, the others would wait for that
rank until the time-out of the process group, and never learn its name.

Every rank tells the others through a store, from a thread, that it lives and how long
ago its main thread last made progress. A rank that has waited for `timeout` looks for
the cause: a process that says nothing any more (killed, stopped, its node gone), or one
that lives but whose main thread neither makes progress nor waits for others. A rank
that leaves before the others says so with its exit code.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsvae.errors import EXIT_DEFECT, EXIT_RANK_LOST, EXIT_USER_ERROR

_COLLECTIVE = ("torch.distributed.", "deepspeed.")
"""Packages whose code a thread is in while it waits for other ranks. Names of modules:
a path can lead through a folder of any name."""
_STORE_ANSWERS = 5.0
"""Seconds within which the store answers while rank 0 lives."""
_DEVICE_ANSWERS = 1.0
"""Seconds within which an idle device says that it is idle."""
_SILENCE = 4
"""Intervals without a word after which a rank is gone."""
_LEFT = "left"
"""The key in the store with the number of the first rank that left before the others. The
ranks after it only follow."""
_ADVICE = {
    EXIT_USER_ERROR: "that rank's own line says what to change",
    EXIT_DEFECT: "that rank's stack says why",
}
"""What to do after a rank has left with a code, if repeating would not help."""

Verdict = tuple[str, int]
"""A line that names a rank, and the exit code that fits."""
LastSeen = dict[int, tuple[int, float]]
"""Rank -> the number of its last report, and when this rank first read it."""


class Watchdog:
    """The watchdog of one rank among `size`, which all make one at the same time.

    Args:
        store: a connection that nothing else uses.
        timeout: seconds that the main thread may go without `heartbeat`, outside of
            `waiting` and `suspend_hang_detection`.
        synchronize: returns once the device of this rank has nothing left to do; None
            if operations block the host itself.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: float,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._synchronize = synchronize
        self.before_leaving: Callable[[int, str], Any] = lambda code, reason: None
        """Called with the exit code and the line before the thread ends the process."""
        self._interval = min(2.0, timeout / 5)
        self._progress: tuple[float, str] = (time.monotonic(), "start")
        self._patient = self._waiting = 0
        self._lost: list[int] = []
        self._last_report: dict[str, Any] = {"host": socket.gethostname(), "count": 0}
        self._closed = threading.Event()
        self._store.set_timeout(timedelta(seconds=_STORE_ANSWERS))
        self._store_asker, self._device_asker = _Asker(_STORE_ANSWERS), _Asker(_DEVICE_ANSWERS)
        self._thread = threading.Thread(target=self._watch, name="dsvae-watchdog", daemon=True)
        self._publish()  # at once, so that a rank that dies early has said something
        self._thread.start()

    def heartbeat(self, where: str) -> None:
        """Notes that the main thread makes progress; `where` says what it does now."""
        self._progress = (time.monotonic(), where)

    @contextmanager
    def suspend_hang_detection(self) -> Iterator[None]:
        """Switches hang detection off in a block in which one rank works and the
        others wait."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            self.heartbeat(self._progress[1])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a block in which the main thread waits for the other ranks."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def close(self, code: int | None = None) -> None:
        """Ends the thread. With an exit code, this rank leaves before the others, and
        they learn the code."""
        self._closed.set()
        self._thread.join()
        if code is not None:
            self._publish(code=code, leaving=True)
            # sets the key only if nobody has
            self._ask(lambda: self._store.compare_set(_LEFT, "", str(self._rank)))
            if self._rank == 0:
                self._linger()

    def _linger(self) -> None:
        """Lets the others read the exit code before the store ends with this
        process."""
        for _ in range(16):
            states = enumerate(self._all())
            if all("leaving" in state or rank in self._lost for rank, state in states):
                return
            time.sleep(self._interval / 2)

    def report(self, line: str) -> None:
        """Tells the others that rank 0 has printed a line, which they need not
        repeat."""
        self._publish(line=line)

    def reported(self, line: str) -> bool:
        """Returns whether rank 0 has printed a line, or does so within a few
        seconds."""
        for wait in (0, 1, 1, 1):
            time.sleep(wait * self._interval / 2)
            if (states := self._all()) and states[0].get("line") == line:
                return True
        return False

    def lost(self) -> Verdict | None:
        """Returns which rank is gone, after an operation with the others has failed;
        None if none is.

        Takes a few seconds: a rank that says nothing during them is gone.
        """
        last_seen: LastSeen = {}
        verdict = None
        for _ in range(_SILENCE + 1):
            if verdict := self._left() or self._silent(last_seen, patient=False):
                break
            self._closed.wait(self._interval)
            self._publish()  # whoever lives says something meanwhile, this rank too
        if "leaving" in self._last_report:
            self._thread.join()  # has said why, and ends the process
        return verdict

    # The thread.

    def _watch(self) -> None:
        # what the main thread did when it waited for a rank that has left
        failed: tuple[float, str] | None = None
        last_seen: LastSeen = {}
        since = 0.0  # when `last_seen` began
        while not self._closed.wait(self._interval):
            self._publish()
            progress, waits, patient = self._progress, self._waits(), bool(self._patient)
            age = time.monotonic() - progress[0]
            if waits and age >= 2 * self._interval and (verdict := self._left()):
                # Not at once: an operation that the other rank has finished still ends.
                if failed is progress and self._waits():
                    self._leave(*verdict)
                failed = progress
                continue
            failed = None
            if not (waits if patient else age >= self._timeout):
                last_seen.clear()
                continue
            if waits:
                since = since if last_seen else time.monotonic()
                verdict = self._silent(last_seen, patient)
                # once it is known that all live
                if not patient and time.monotonic() - since >= _SILENCE * self._interval:
                    verdict = verdict or self._stuck()
            else:
                verdict = self._hangs()
            # A rank that made progress meanwhile says nothing.
            if verdict and (patient or time.monotonic() - self._progress[0] >= self._timeout):
                self._leave(*verdict)

    def _hangs(self) -> Verdict:
        """Returns a verdict that names this rank itself, once the others have had the
        time to see it first."""
        for _ in range(2 * _SILENCE):
            self._closed.wait(self._interval)
            self._publish()
        return _hung([self._rank], {self._rank: self._last_report})

    def _publish(self, **news: Any) -> None:
        """Tells the others how this rank is, with `news` from now on."""
        since, where = self._progress
        self._last_report |= {
            **news,
            "count": self._last_report["count"] + 1,
            "age": time.monotonic() - since,
            "where": where,
            "waits": self._waits(),
            "patient": bool(self._patient),
        }
        state = json.dumps(self._last_report)
        self._ask(lambda: self._store.set(str(self._rank), state))

    def _all(self) -> list[dict[str, Any]]:
        """Returns the last report of every rank; nothing if the store does not
        answer."""
        keys = [str(rank) for rank in range(self._size)]
        return [json.loads(text) for text in self._ask(lambda: self._store.multi_get(keys)) or []]

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Returns the store's answer; None if there is none in time."""
        return self._store_asker.ask(question)[1]

    def _waits(self) -> bool:
        """Returns whether a thread of this process is inside an operation with other
        ranks."""
        return (
            self._waiting > 0
            or any(
                f"{frame.f_globals.get('__name__')}.".startswith(_COLLECTIVE)
                for number, frame in sys._current_frames().items()
                if number != threading.get_ident()
            )
            or self._device_waits()
        )

    def _device_waits(self) -> bool:
        """Returns whether the device has been busy for as long as this rank made no
        progress.

        Operations on a GPU are only queued. The host continues, and stands still in the
        first line that needs a result. No kernel of a model computes for `timeout`
        seconds: one that runs that long waits for other ranks. A rank that hangs by
        itself leaves its device idle.
        """
        if self._synchronize is None or time.monotonic() - self._progress[0] < self._timeout:
            return False
        return not self._device_asker.ask(self._synchronize)[0]

    def _left(self) -> Verdict | None:
        """Returns the first rank that has left and said so, unless it is this one. Its
        code becomes that of the job. Asks for one key only if nobody has left."""
        if not self._ask(lambda: self._store.check([_LEFT])):
            return None
        first, states = self._ask(lambda: int(self._store.get(_LEFT))), self._all()
        if first is None or first == self._rank or not states or "code" not in states[first]:
            return None
        code = states[first]["code"]
        return f"{_name([first], states)} left with exit code {code}", code

    def _silent(self, last_seen: LastSeen, patient: bool) -> Verdict | None:
        """Returns a verdict on ranks that have said nothing new for a while. With
        `patient` the while is `timeout`: what takes long there may keep the threads of
        a process from running."""
        limit = self._timeout if patient else _SILENCE * self._interval
        states, now = self._all(), time.monotonic()
        if not states:
            since = last_seen.setdefault(0, (-1, now))[1]
            return None if patient and now - since < limit else _silence("rank 0")
        for rank, state in enumerate(states):
            if last_seen.get(rank, (-1, 0.0))[0] != state["count"]:
                last_seen[rank] = (state["count"], now)
        silent = (rank for rank, (_, since) in sorted(last_seen.items()) if now - since >= limit)
        self._lost = lost = [rank for rank in silent if rank != self._rank]
        return _silence(_name(lost, states), states[lost[0]]["where"]) if lost else None

    def _stuck(self) -> Verdict | None:
        """Returns a verdict on ranks that live but hang; None while any rank still
        works."""
        states = self._all()
        working = [rank for rank, state in enumerate(states) if not state["waits"]]
        # One that is not late came out of its operation a moment ago.
        late = all(state["age"] >= self._timeout for state in states)
        if not states or not late or any(states[rank]["patient"] for rank in working):
            return None
        if working:
            return _hung(working, states)
        return f"all ranks wait for each other ({states[self._rank]['where']})", EXIT_RANK_LOST

    def _leave(self, line: str, code: int) -> None:
        """Ends the process, whose main thread nothing can interrupt."""
        if self._closed.is_set():  # the main thread leaves by itself
            return
        self._publish(leaving=True)
        # In a thread: the main thread may hang because the disk does.
        _Asker(_STORE_ANSWERS).ask(lambda: self.before_leaving(code, line))
        with suppress(OSError, ValueError):
            if not self._waits():
                faulthandler.dump_traceback(sys.stderr)
            line = f"dsvae: error: rank {self._rank}: {line}; {advice(code)}"
            print(line, file=sys.stderr, flush=True)
        if self._rank == 0:
            # The store lives here, and the others are reading.
            time.sleep(_SILENCE * self._interval)
        os._exit(code)


class _Asker:
    """Asks in a thread, one question at a time.

    While the process of rank 0 stands still, the store's client waits without any
    time-out, and so does the host for its device: the thread is then left running.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._lock = seconds, threading.Lock()
        self._thread = threading.Thread()

    def ask(self, question: Callable[[], Any]) -> tuple[bool, Any]:
        """Returns whether it ended in time, and the answer; None if it failed."""
        answer: list[Any] = []

        def run() -> None:
            with suppress(RuntimeError):  # the store is gone with rank 0; a device has failed
                answer.append(question())

        with self._lock:
            if not self._thread.is_alive():
                self._thread = threading.Thread(target=run, name="dsvae-watchdog-asks", daemon=True)
                self._thread.start()
                self._thread.join(self._seconds)
            return not self._thread.is_alive(), answer[0] if answer else None


def advice(code: int) -> str:
    """Says what to do if another rank has left with a code, or is lost."""
    return _ADVICE.get(
        code, "repeat the command: a training run continues from the last complete checkpoint"
    )


def _silence(who: str, where: str | None = None) -> Verdict:
    return f"{who} no longer answers" + (f" (last seen: {where})" if where else ""), EXIT_RANK_LOST


def _hung(ranks: list[int], states: Any) -> Verdict:
    age, where = states[ranks[0]]["age"], states[ranks[0]]["where"]
    return f"{_name(ranks, states)} has hung for {age:.0f} s ({where})", EXIT_RANK_LOST


def _name(ranks: list[int], states: Any) -> str:
    """Returns `rank 3 (on node7)`, or `ranks 2, 3 (on node7)`."""
    hosts = ", ".join(sorted({states[rank]["host"] for rank in ranks}))
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} (on {hosts})"
