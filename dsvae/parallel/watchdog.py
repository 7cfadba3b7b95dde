"""Which rank no longer answers: the others would wait for it until the time-out of the
process group, without its name.

Every rank tells the others through a store of their own, from a thread, that it lives
and how long ago its main thread last got anywhere. A rank that has waited for `timeout`
looks who is to blame: a process that tells nothing any more (killed, stopped, its node
gone), or one that lives but whose main thread neither gets anywhere nor waits for
others. One that leaves before the others says so, and those that wait for it need no
time limit: patience is for ranks that are slow, not for those that have gone.
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
"""Seconds within which the store gives an answer while rank 0 lives."""
_DEVICE_ANSWERS = 1.0
"""Seconds within which an idle device says that it is."""
_LEFT = "left"
"""The key in the store that is there once a rank has left before the others."""
_ADVICE = {
    EXIT_USER_ERROR: "that rank's own line says what to change",
    EXIT_DEFECT: "that rank's stack says why",
}
"""What to do after a rank has left with a code, where repeating would be no help."""


class Watchdog:
    """Of one rank among `size`, which all make one at the same time.

    Args:
        store: its own connection, used by nothing else.
        timeout: seconds that the main thread may go without `heartbeat` while it neither
            waits for others nor is `suspend_hang_detection`.
        synchronize: returns once the device of this rank has nothing left to do; None
            where operations block the host itself.
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
        self._interval = min(2.0, timeout / 5)
        self._seen: tuple[float, str] = (time.monotonic(), "start")
        self._patient = 0
        self._waiting = 0
        self._synchronize = synchronize
        self._probe: threading.Thread | None = None
        self._count = 0
        self._exit_code: int | None = None
        self._complaint: str | None = None
        self._heard: dict[int, tuple[int, float]] = {}
        self._lost: list[int] = []
        self._leaving = False
        self._closed = threading.Event()
        self._store.set_timeout(timedelta(seconds=_STORE_ANSWERS))
        self._lock = threading.Lock()  # one question at a time: both threads ask
        self._asking: threading.Thread | None = None
        self._thread = threading.Thread(target=self._watch, name="dsvae-watchdog", daemon=True)
        self._tell()  # at once: a rank that dies early has said something, too
        self._thread.start()

    def heartbeat(self, where: str) -> None:
        """The main thread gets on: `where` it is now."""
        self._seen = (time.monotonic(), where)

    @contextmanager
    def suspend_hang_detection(self) -> Iterator[None]:
        """Hang detection is suspended in this block: one rank works while the others
        wait."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            self.heartbeat(self._seen[1])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In here the main thread waits for the other ranks, wherever the host stands
        meanwhile."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def close(self, code: int | None = None) -> None:
        """Ends the thread. With an exit code: this rank leaves before the others, which
        are told why."""
        self._closed.set()
        self._thread.join()
        if code is not None:
            self._exit_code = code
            self._tell()
            self._ask(lambda: self._store.set(_LEFT, str(self._rank)))
            if self._rank == 0:
                self._linger()

    def _linger(self) -> None:
        """Until the others are leaving too, or have had the time to see why: the store
        goes with this process."""
        first: list[dict[str, Any]] | None = None
        for attempt in range(16):
            said = self._others()
            if said is None:
                return
            first = first or said
            late = attempt >= 6  # who has told nothing since is not on its way
            if all(
                state["leaving"]
                or rank in self._lost
                or (late and state["count"] == first[rank]["count"])
                for rank, state in enumerate(said)
            ):
                return
            time.sleep(self._interval / 2)

    def complain(self, line: str) -> None:
        """Rank 0 has printed this line, which other ranks need not repeat."""
        self._complaint = line
        self._tell()

    def complained(self, line: str) -> bool:
        """Whether rank 0 has printed this line, or does so within a few seconds."""
        for attempt in range(4):
            if attempt:
                time.sleep(self._interval / 2)
            said = self._others()
            if said is None:
                return False
            if said[0]["complaint"] == line:
                return True
        return False

    def lost(self) -> tuple[str, int] | None:
        """Who is gone, after an operation with the others has failed: a line, and the
        exit code that fits; None if nobody.

        Takes a few seconds: whoever says nothing during them is gone.
        """
        said = self._others()
        found = (said and self._with_code(said)) or self._gone(*self._two_readings())
        if self._leaving:
            self._thread.join()  # has told why, and ends the process
        return found

    # The thread.

    def _watch(self) -> None:
        # where the main thread was when it waited for a rank that has left
        doomed: tuple[float, str] | None = None
        while not self._closed.wait(self._interval):
            self._tell()
            found: tuple[str, int] | None
            seen, waits = self._seen, self._waits()
            age = time.monotonic() - seen[0]
            if waits and age >= 2 * self._interval and (found := self._left()):
                # Not at once: an operation with a rank that has left just behind it
                # still ends.
                if doomed is seen and not self._closed.is_set() and self._waits():
                    self._leave(*found)
                doomed = seen
                continue
            doomed = None
            if self._patient and waits:
                if (found := self._silent()) and not self._closed.is_set():
                    self._leave(*found)
                continue
            self._heard.clear()
            if self._patient or age < self._timeout:
                continue
            # it is this rank itself, whatever becomes of the others, which first shall
            # see it hang
            if not waits:
                for _ in range(8):
                    self._closed.wait(self._interval)
                    self._tell()
                age = time.monotonic() - self._seen[0]
                found = (
                    f"rank {self._rank} (on {socket.gethostname()}) has hung for {age:.0f} s "
                    f"({self._seen[1]})",
                    EXIT_RANK_LOST,
                )
            else:
                before, now = self._two_readings()
                found = self._gone(before, now) or (None if now is None else self._stuck(now))
            # A rank that got on meanwhile, or is leaving, says nothing.
            if (
                found
                and not self._closed.is_set()
                and time.monotonic() - self._seen[0] >= self._timeout
            ):
                self._leave(*found)

    def _two_readings(self) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
        """What the ranks said last, twice; whoever lives says something in between,
        this rank too."""
        before = self._others()
        for _ in range(4 if before is not None else 0):
            self._closed.wait(self._interval)
            self._tell()
        return before, self._others()

    def _tell(self) -> None:
        self._count += 1
        since, where = self._seen
        state = {
            "count": self._count,
            "host": socket.gethostname(),
            "age": time.monotonic() - since,
            "where": where,
            "waits": self._waits(),
            "patient": bool(self._patient),
            "code": self._exit_code,
            "leaving": self._leaving or self._exit_code is not None,
            "complaint": self._complaint,
        }
        self._ask(lambda: self._store.set(str(self._rank), json.dumps(state)))

    def _others(self) -> list[dict[str, Any]] | None:
        """What every rank said last; None if rank 0, where the store lives, gives no
        answer."""
        said = self._ask(lambda: self._store.multi_get([str(rank) for rank in range(self._size)]))
        return None if said is None else [json.loads(text) for text in said]

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer; None if it gives none in time.

        In a thread of its own: while the process of rank 0 stands still, the store's
        client waits without any time-out.
        """
        answer: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone with rank 0
                answer.append(question())

        with self._lock:
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(
                    target=ask, name="dsvae-watchdog-store", daemon=True
                )
                self._asking.start()
                self._asking.join(_STORE_ANSWERS)
        return answer[0] if answer else None

    def _waits(self) -> bool:
        """Whether a thread of this process is inside an operation with the other
        ranks."""
        if self._waiting:
            return True
        for number, frame in sys._current_frames().items():
            module = f"{frame.f_globals.get('__name__')}."
            if number != threading.get_ident() and module.startswith(_COLLECTIVE):
                return True
        return self._device_waits()

    def _device_waits(self) -> bool:
        """Whether the device has been busy for as long as this rank got nowhere.

        Operations on a GPU are only queued: the host goes on, and stands still in
        whatever line needs a result first. No kernel of a model computes for `timeout`
        seconds; what is under way that long waits for other ranks, and a rank that
        hangs by itself leaves its device idle.
        """
        if self._synchronize is None or time.monotonic() - self._seen[0] < self._timeout:
            return False
        if self._probe is None or not self._probe.is_alive():
            self._probe = threading.Thread(
                target=self._ask_device, name="dsvae-watchdog-device", daemon=True
            )
            self._probe.start()
        self._probe.join(_DEVICE_ANSWERS)
        return self._probe.is_alive()

    def _ask_device(self) -> None:
        with suppress(RuntimeError):  # a device that has failed does not wait
            if self._synchronize is not None:
                self._synchronize()

    def _gone(
        self, before: list[dict[str, Any]] | None, now: list[dict[str, Any]] | None
    ) -> tuple[str, int] | None:
        """Ranks that have left, or said nothing between two readings."""
        if before is None or now is None:
            return _silence("rank 0")
        if found := self._with_code(now):
            return found
        silent = [
            rank
            for rank in range(self._size)
            if rank != self._rank and now[rank]["count"] == before[rank]["count"]
        ]
        self._lost = silent
        if not silent:
            return None
        return _silence(_name(silent, now), now[silent[0]]["where"])

    def _with_code(self, now: list[dict[str, Any]]) -> tuple[str, int] | None:
        """Ranks that have left and said so. What ended the first of them ends the job:
        its code goes on."""
        for rank, state in enumerate(now):
            if state["code"] is not None and rank != self._rank:
                return (
                    f"rank {rank} (on {state['host']}) left with exit code {state['code']}",
                    state["code"],
                )
        return None

    def _left(self) -> tuple[str, int] | None:
        """The same; asks for one key only, as it is asked often."""
        if not self._ask(lambda: self._store.check([_LEFT])):
            return None
        now = self._others()
        return None if now is None else self._with_code(now)

    def _silent(self) -> tuple[str, int] | None:
        """Ranks that have said nothing since `timeout`; asked while this rank waits in
        patience, where time alone is no sign.

        Longer than between two readings: what takes long may keep the other process's
        threads from running for a while.
        """
        now, moment = self._others(), time.monotonic()
        if now is None:
            since = self._heard.setdefault(0, (-1, moment))[1]
            return _silence("rank 0") if moment - since >= self._timeout else None
        for rank, state in enumerate(now):
            if self._heard.get(rank, (-1, 0.0))[0] != state["count"]:
                self._heard[rank] = (state["count"], moment)
        silent = [
            rank
            for rank, (_, since) in self._heard.items()
            if moment - since >= self._timeout and rank != self._rank
        ]
        return _silence(_name(sorted(silent), now), now[min(silent)]["where"]) if silent else None

    def _stuck(self, now: list[dict[str, Any]]) -> tuple[str, int] | None:
        """Ranks that live but hang; None while any rank still works."""
        working = [rank for rank, state in enumerate(now) if not state["waits"]]
        if any(now[rank]["patient"] or now[rank]["age"] < self._timeout for rank in working):
            return None
        if any(state["age"] < self._timeout for state in now):
            return None  # it came out of its operation a moment ago
        if not working:
            return f"all ranks wait for each other ({now[self._rank]['where']})", EXIT_RANK_LOST
        age, where = now[working[0]]["age"], now[working[0]]["where"]
        return f"{_name(working, now)} has hung for {age:.0f} s ({where})", EXIT_RANK_LOST

    def _leave(self, line: str, code: int) -> None:
        """Ends the process: the main thread is inside an operation that nothing can
        interrupt."""
        self._leaving = True
        self._tell()
        with suppress(OSError, ValueError):
            if not self._waits():
                faulthandler.dump_traceback(sys.stderr)
            print(
                f"dsvae: error: rank {self._rank}: {line}; {advice(code)}",
                file=sys.stderr,
                flush=True,
            )
        if self._rank == 0:
            time.sleep(4 * self._interval)  # the store lives here, and the others are reading
        os._exit(code)


def advice(code: int) -> str:
    """What to do where another rank has left with a code, or is lost."""
    return _ADVICE.get(
        code, "repeat the command: a training run goes on from the last complete checkpoint"
    )


def _silence(who: str, where: str | None = None) -> tuple[str, int]:
    return f"{who} no longer answers" + (f" (last seen: {where})" if where else ""), EXIT_RANK_LOST


def _name(ranks: list[int], states: list[dict[str, Any]]) -> str:
    """`rank 3 (on node7)`, `ranks 2, 3 (on node7)`."""
    hosts = sorted({states[rank]["host"] for rank in ranks})
    return (
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} (on {', '.join(hosts)})"
    )
