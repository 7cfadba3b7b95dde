"""The processes of a run: how they meet, their ranks, and the few collective operations
that the run needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from traceback import walk_tb
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dsvae.errors import (
    EXIT_RANK_LOST,
    EXIT_USER_ERROR,
    RunStopped,
    UserError,
    exit_code,
    first_line,
)
from dsvae.parallel.device import local_device
from dsvae.parallel.watchdog import Watchdog, advice

T = TypeVar("T")

TIMEOUT = timedelta(hours=24)
"""The longest time that a collective operation waits for the other ranks.

No shorter one would do: rank 0 alone tokenizes a corpus, downloads a model, verifies
checkpoints and writes exports, on a disk that may be slow, while the others wait in a
collective operation. The watchdog tells such work from a hang."""
HANG_TIMEOUT = 600.0
"""Seconds, if nothing else is configured."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    watchdog: Watchdog | None = None
    """None in a run of one process."""
    saved_env: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that `join` has put into the environment, with the values they had
    before; None: it was not set."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        with self._together():
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over all ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Returns the maximum over all ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def largest(self, value: int) -> int:
        """Returns the largest value of any rank. Collective. The host waits once."""
        if self.size == 1:
            return value
        with self.waiting():
            # made there: the host would also wait for a copy of its own number
            tensor = torch.full((), value, device=self.device)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return int(tensor)

    def _reduce(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor, op=how)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Returns the (picklable) values of all ranks, on every rank."""
        values: list = [value] * self.size
        if self.size > 1:
            with self._together():
                dist.all_gather_object(values, value)
        return values

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wraps an operation with the other ranks, which has ended after the block. On
        GPUs it would otherwise only be queued."""
        with self.waiting():
            yield
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)

    def waiting(self) -> AbstractContextManager[None]:
        """Marks a block in which this rank waits for a result that needs the other
        ranks."""
        return self.watchdog.waiting() if self.watchdog else nullcontext()

    def heartbeat(self, where: str) -> None:
        """Tells the watchdog that this rank makes progress."""
        if self.watchdog is not None:
            self.watchdog.heartbeat(where)

    def suspend_hang_detection(self) -> AbstractContextManager[None]:
        """Switches hang detection off in a block."""
        return self.watchdog.suspend_hang_detection() if self.watchdog else nullcontext()

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and returns its (picklable) result on all ranks.

        A `UserError`, `RunStopped` or `OSError` is raised on every rank, so that all
        leave together, and none waits for a rank that has gone.
        """
        box: list = [None, None]
        if self.is_main:
            with self.suspend_hang_detection():
                try:
                    box[0] = function()
                except (UserError, RunStopped, OSError) as error:
                    box[1] = error
        if self.size > 1:
            with self._together():
                dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise shared(box[1])
        return box[0]

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Runs `function`, which must not be collective, on every rank and returns this
        rank's result.

        A `UserError` of any rank is raised on every rank. If not all ranks had it, it
        begins with the number of the first one that had.
        """
        result: T | None = None
        problem: str | None = None
        with self.suspend_hang_detection():
            try:
                result = function()
            except UserError as error:
                problem = str(error)
        problems = self.gather(problem)
        for rank, line in enumerate(problems):
            if line is not None:
                alike = len(set(problems)) == 1
                raise shared(UserError(line if alike else f"rank {rank}: {line}"))
        return cast(T, result)


def join(hang_timeout: float = HANG_TIMEOUT) -> World:
    """Joins the processes that deepspeed, torchrun or srun started, with RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment. If RANK is
    not set, the run has one process, and these variables are set until `leave`.

    Args:
        hang_timeout: seconds after which a rank that makes no progress is given up, and
            the others leave and name it.

    Raises:
        UserError: the variables, the port or the GPU cannot be used.
        RunStopped: not all ranks came in time, or this one has no GPU.
    """
    alone: dict[str, str] = {}
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # DeepSpeed reads them
    saved_env = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        return _join(hang_timeout, saved_env)
    except BaseException:
        restore_env(saved_env)
        raise


def _join(hang_timeout: float, saved_env: dict[str, str | None]) -> World:
    try:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        rank, local_rank, size = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK, LOCAL_RANK and WORLD_SIZE must all be set, as whole numbers: {error}"
        ) from None
    device = local_device(local_rank)
    on_gpu = device.type != "cpu"
    # A run of one process meets nobody, but a port that is taken ends it here in one line.
    store = _meet(hang_timeout) if size > 1 or not dist.is_initialized() else None
    watchdog = None
    if store and size > 1:
        synchronize = partial(torch.accelerator.synchronize, device) if on_gpu else None
        watchdog = Watchdog(store, rank, size, hang_timeout, synchronize)
    # From here on the others learn it if this rank leaves.
    if on_gpu:
        if local_rank >= (count := torch.accelerator.device_count()):
            if watchdog is not None:
                watchdog.close(EXIT_USER_ERROR)
            raise RunStopped(
                EXIT_USER_ERROR,
                f"error: rank {rank} has LOCAL_RANK {local_rank}, but this node has {count} GPUs: "
                "start one process per GPU",
            )
        torch.accelerator.set_device_index(local_rank)
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        # Without the device, torch guesses it at the first barrier, and warns.
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if on_gpu else None)
    return World(rank, local_rank, size, device, watchdog, saved_env)


def leave(world: World, group: bool = True) -> None:
    """Undoes `join`, and with `group` leaves the process group too. Collective."""
    if world.watchdog is not None:
        world.watchdog.close()
    if group:
        dist.destroy_process_group()
    restore_env(world.saved_env)


@contextmanager
def joined() -> Iterator[World]:
    """Runs `join` before and `leave` after a block that all ranks run. If the caller
    has made a process group, it is used and kept.

    If only this rank meets an error, the others leave at once, with its exit code and a
    line that names this rank.

    Raises:
        RunStopped: an operation with the other ranks failed, because one of them has
            gone.
    """
    ours = not dist.is_initialized()
    world = join()
    try:
        yield world
    except BaseException as error:
        if world.watchdog is None or getattr(error, "shared", False):
            leave(world, ours)
            raise
        lost = world.watchdog.lost() if may_come_from_another_rank(error) else None
        world.watchdog.close(lost[1] if lost else exit_code(error))
        if lost is None:
            raise
        line = f"error: rank {world.rank}: {lost[0]}; {advice(lost[1])}"
        raise RunStopped(lost[1], line) from None
    leave(world, ours)


def shared(error: Any) -> Any:
    """Marks an error that every rank raises, so that only rank 0 prints it."""
    error.shared = True
    return error


def may_come_from_another_rank(error: BaseException) -> bool:
    """Returns whether an error comes out of an operation with the other ranks, so that
    one of them may be its cause. An error of this rank's own computation never is."""
    if isinstance(error, dist.DistError):
        return True
    # Errors of gloo and a lack of memory on CPU are plain RuntimeErrors.
    own = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
    if not isinstance(error, RuntimeError) or own:
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith(("torch.distributed.", "deepspeed."))


def _meet(hang_timeout: float) -> dist.Store:
    """Waits until every rank has come; returns a connection to the store where they
    met.

    The wait has a time limit: a rank that died on its way here leaves nothing behind
    that the others could notice.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=hang_timeout)))
    except RuntimeError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        reason = first_line(error)
        if "EADDRINUSE" in reason:
            raise UserError(
                f"port {port} of {address}, where the ranks would meet, is already in use: choose "
                f"another one (--master_port of the launcher, or MASTER_PORT)"
            ) from None
        raise RunStopped(
            EXIT_RANK_LOST,
            f"error: rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} ranks did not "
            f"meet at {address}:{port} within {hang_timeout:g} s ({reason})",
        ) from None
    return dist.PrefixStore("dsvae", store)


def restore_env(values: Mapping[str, str | None]) -> None:
    """Gives environment variables their earlier values; None: not set."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
