"""The processes of a run: start, rank, and the few collective operations that the run
needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from traceback import walk_tb
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dsvae.engine.watchdog import Watchdog, advice
from dsvae.errors import EXIT_RANK_LOST, EXIT_USER_ERROR, RunStopped, UserError, exit_code

T = TypeVar("T")

TIMEOUT = timedelta(hours=24)
"""Longest that a collective operation waits for the other ranks: rank 0 tokenizes large
corpora meanwhile. Hangs are the watchdog's matter, which knows the one from the
other."""
HANG_TIMEOUT = 600.0
"""Seconds, where nothing else is configured."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    watchdog: Watchdog | None = None
    """None in a run of one process."""
    lent: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that `start` has put into the environment, with their values before;
    None: it was not set."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        with self._together():
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over all ranks, in place."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, on every rank."""
        values: list = [value] * self.size
        if self.size > 1:
            with self._together():
                dist.all_gather_object(values, value)
        return values

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around an operation with the other ranks, which has ended behind it: on GPUs
        it would only be queued."""
        with self.watchdog.waiting() if self.watchdog is not None else nullcontext():
            yield
            if self.device.type != "cpu":
                get_accelerator().synchronize(self.device.index)

    def beat(self, where: str) -> None:
        """Tells the watchdog that this rank gets on."""
        if self.watchdog is not None:
            self.watchdog.beat(where)

    def patient(self) -> AbstractContextManager[None]:
        """Whatever takes long in here is no hang."""
        return self.watchdog.patient() if self.watchdog is not None else nullcontext()

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and gives its (picklable) result to all ranks.

        A `UserError`, `RunStopped` or `OSError` is raised on every rank: all leave
        together, and none waits for a rank that has gone.
        """
        box: list = [None, None]
        if self.is_main:
            with self.patient():
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

    def on_all(self, function: Callable[[], T]) -> T:
        """Runs `function`, which must not be collective, on every rank; its result
        stays where it was made.

        A `UserError` of any rank is raised on every rank, with the number of a rank
        that had it where not all had.
        """
        result: list[T] = []
        problem: str | None = None
        with self.patient():
            try:
                result.append(function())
            except UserError as error:
                problem = str(error)
        problems = self.gather(problem)
        found = {rank: line for rank, line in enumerate(problems) if line is not None}
        if not found:
            return result[0]
        if len(found) == self.size and len(set(found.values())) == 1:
            raise shared(UserError(found[0]))
        first = min(found)
        raise shared(UserError(f"rank {first}: {found[first]}"))


def start(hang_timeout: float = HANG_TIMEOUT) -> World:
    """Joins the processes that the launcher started: deepspeed, torchrun or srun (RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment), or a run of
    one process where RANK is not set. That one has these variables from here to `stop`.

    Args:
        hang_timeout: seconds after which a rank that gets nowhere is given up, and the
            others leave with its number.
    """
    lent = {} if "RANK" in os.environ else _lend_environment()
    try:
        return _join(hang_timeout, lent)
    except BaseException:
        _set_environment(lent)
        raise


def _join(hang_timeout: float, lent: dict[str, str | None]) -> World:
    try:
        rank, local_rank, size = (
            int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK, LOCAL_RANK and WORLD_SIZE must all be set, as whole numbers: {error}"
        ) from None
    accelerator = get_accelerator()
    synchronize = None
    if accelerator.device_name() == "cpu":
        # A kernel for tensor-parallel inference that training never calls; loading it
        # would need a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        device = torch.device(accelerator.device_name(local_rank))
        synchronize = partial(accelerator.synchronize, local_rank)
    watchdog = (
        Watchdog(_meet(hang_timeout), rank, size, hang_timeout, synchronize) if size > 1 else None
    )
    # From here on the others notice if this rank leaves.
    if device.type != "cpu":
        if local_rank >= (count := accelerator.device_count()):
            if watchdog is not None:
                watchdog.close(EXIT_USER_ERROR)
            raise RunStopped(
                EXIT_USER_ERROR,
                f"error: rank {rank} has LOCAL_RANK {local_rank}, but this node has {count} GPUs: "
                "start one process per GPU",
            )
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    return World(rank, local_rank, size, device, watchdog, lent)


def stop(world: World, group: bool = True) -> None:
    """Undoes `start`; with `group` leaves the process group, too. All ranks together."""
    if world.watchdog is not None:
        world.watchdog.close()
    if group:
        dist.destroy_process_group()
    _set_environment(world.lent)


@contextmanager
def joined() -> Iterator[World]:
    """`start` before and `stop` after a block that all ranks run. A process group that
    the caller has made is used and kept.

    If this rank alone meets an error, the others leave at once, with its exit code and
    a line that names this rank.

    Raises:
        RunStopped: an operation with the other ranks failed, because one of them has
            gone.
    """
    ours = not dist.is_initialized()
    world = start()
    try:
        yield world
    except BaseException as error:
        if world.watchdog is None or getattr(error, "shared", False):
            stop(world, ours)
            raise
        lost = world.watchdog.lost() if is_of_the_others(error) else None
        world.watchdog.close(lost[1] if lost else exit_code(error))
        if lost is None:
            raise
        line = f"error: rank {world.rank}: {lost[0]}; {advice(lost[1])}"
        raise RunStopped(lost[1], line) from None
    stop(world, ours)


def shared(error: Any) -> Any:
    """Says of an error that every rank raises it, and rank 0 alone prints it."""
    error.shared = True
    return error


def is_of_the_others(error: BaseException) -> bool:
    """Whether an error comes out of an operation with the other ranks. One of them may
    be its cause, which is never so where this rank's own computation has failed."""
    if isinstance(error, dist.DistError):
        return True
    # gloo has no type of its own; nor has the CPU's lack of memory
    own = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
    if not isinstance(error, RuntimeError) or own:
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith(("torch.distributed.", "deepspeed."))


def _meet(hang_timeout: float) -> dist.Store:
    """Waits until every rank has come; a connection to the store over which they met.

    With a time limit of its own: a rank that died on its way here leaves nothing behind
    that the others could notice.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=hang_timeout)))
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        raise RunStopped(
            EXIT_RANK_LOST,
            f"error: rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} ranks did not "
            f"meet at {where} "
            f"within {hang_timeout:g} s ({reason})",
        ) from None
    return dist.PrefixStore("dsvae", store)


def _lend_environment() -> dict[str, str | None]:
    """Sets the variables of a run of one process, which DeepSpeed reads; what they were
    before."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    before = {name: os.environ.get(name) for name in alone}
    _set_environment(alone)
    return before


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
