"""Checkpoints that are either complete or never used.

Every rank writes its files, flushes them to the disk and computes their checksums. Rank
0 then records sizes and checksums in a file called COMPLETE, which appears at once.
Only then does `latest` move. (DeepSpeed alone moves `latest` before the other ranks
have finished.)

A checksum is computed from the kernel's copy in memory: it says what should be on the
disk, not what is there. A resume compares the two.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from dsvae.errors import UserError, first_line
from dsvae.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from dsvae.parallel.world import World

COMPLETE = "COMPLETE"
AVERAGES = "averages.safetensors"
"""The averaged weights, in a checkpoint of the phase `prior`."""
_TAG = re.compile(r"phase(\d)-step(\d{8})")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A complete checkpoint. Checkpoints are ordered by age."""

    phase: int
    step: int
    directory: Path

    @property
    def meta(self) -> dict[str, Any]:
        """What was recorded beside the files: their shape
        (`reshape_checkpoint.shape_of`), a digest of the frozen weights, and `valid`
        if it was measured."""
        return json.loads((self.directory / COMPLETE).read_text())["meta"]


def tag(phase: int, step: int) -> str:
    """Returns the name of a checkpoint."""
    return f"phase{phase}-step{step:08d}"


def identity(directory: Path) -> str:
    """Returns a digest that identifies the state in a complete checkpoint: of its list
    of checksums. Random if there is no such checkpoint."""
    try:
        return hashlib.sha256((directory / COMPLETE).read_bytes()).hexdigest()
    except FileNotFoundError:
        return os.urandom(32).hex()


class SaveFailed(Exception):
    """A checkpoint could not be written. Its files are removed, and earlier checkpoints
    are unchanged."""


def save(
    engine: Any,
    world: World,
    root: Path,
    *,
    phase: int,
    step: int,
    meta: dict[str, Any],
    keep: int,
    keep_best: bool,
    report: Callable[[str], Any],
    averages: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Saves the state of a DeepSpeed engine after optimizer step `step`. Collective.

    Args:
        meta: is recorded; `valid` in it is the value on validation text that ranks
            checkpoints, the smaller the better.
        keep: how many of the newest stay.
        keep_best: whether the best of this phase stays too.
        report: gets a warning if older checkpoints could not be removed.
        averages: weights by name that go into a file of their own.

    Raises:
        SaveFailed: on every rank: the disk is full, or cannot be written to for another
            reason.
    """
    name = tag(phase, step)
    directory = root / name

    def begin() -> None:
        with writer.attempt(directory):
            shutil.rmtree(directory, ignore_errors=True)  # left by a save that was cut
            directory.mkdir(parents=True)

    def commit() -> list[str]:
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        with writer.attempt(directory):
            _sync(directory)
            write_text(directory / COMPLETE, json.dumps({"meta": meta, "files": files}, indent=1))
            _sync(directory)
        return writer.failures

    def tidy() -> str | None:
        try:
            write_text(root / "latest", name)
            _sync(root)
            prune(root, keep, keep_best)
        except OSError as error:
            return (
                f"warning: checkpoint {directory} is complete, but older ones could not be "
                f"removed, or `latest` not be moved: {error}"
            )
        return None

    with _failures_of(engine) as writer:
        world.run_on_rank0(begin)
        engine.save_checkpoint(
            str(root), tag=name, client_state={"phase": phase, "step": step}, save_latest=False
        )
        if averages is not None and world.is_main:
            writer.save_tensors(averages, directory / AVERAGES)
    world.heartbeat(f"checkpoint {name}")
    with world.suspend_hang_detection():  # a disk may be slow
        own = writer.checksums(directory)
    parts = world.gather((own, writer.failures))
    failures = [line for _, lines in parts for line in lines] or world.run_on_rank0(commit)
    if failures:
        world.run_on_rank0(lambda: _remove(directory, ignore_errors=True))
        raise SaveFailed(
            f"checkpoint {directory} cannot be written ({failures[0]}); earlier checkpoints are "
            f"unchanged"
        )
    if warning := world.run_on_rank0(tidy):
        report(warning)
    return Checkpoint(phase, step, directory)


def _remove(directory: Path, ignore_errors: bool = False) -> None:
    """Removes a checkpoint. Its COMPLETE goes first, so it is incomplete whatever
    happens to the rest."""
    with suppress(OSError) if ignore_errors else nullcontext():
        (directory / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors)


def prune(root: Path, keep: int, keep_best: bool) -> None:
    """Removes all but the newest `keep` complete checkpoints and, with `keep_best`, the
    best of the newest one's phase.

    Raises:
        OSError: one could not be removed; the others were.
    """
    complete = find(root)
    spared = set(complete[-keep:])
    if keep_best and (best := best_of(complete)):
        spared.add(best)
    problems: list[OSError] = []
    for old in complete:
        if old not in spared:
            try:
                _remove(old.directory)
            except OSError as error:
                problems.append(error)
    if problems:
        raise problems[-1]


def best_of(complete: list[Checkpoint]) -> Checkpoint | None:
    """Returns the checkpoint of the last phase with the smallest value on validation
    text; None if none was measured."""
    measured = [
        each
        for each in complete
        if each.phase == complete[-1].phase and each.meta.get("valid") is not None
    ]
    return min(measured, key=lambda each: each.meta["valid"], default=None)


class _Writer:
    """DeepSpeed's writer of files, which collects errors instead of raising them.

    An error raised inside `save_checkpoint` would leave the other ranks waiting in its
    barriers.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._paths: list[Path] = []
        self.failures: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        with self.attempt(path):
            self._writer.save(state_dict, path)
        self._paths.append(Path(path))

    def save_tensors(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Writes tensors by name."""
        with self.attempt(path):
            save_file(tensors, path)
        self._paths.append(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.attempt(path):
            self._writer.makedirs(path, exist_ok=exist_ok)

    @contextmanager
    def attempt(self, path: str | Path) -> Iterator[None]:
        """Notes an error of the block, which writes `path`."""
        try:
            yield
        # torch raises RuntimeError on a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            room = ""
            with suppress(OSError):
                room = f", {shutil.disk_usage(Path(path).parent).free / 2**20:.0f} MiB free"
            self.failures.append(f"{first_line(error)}: {path}{room}")

    def checksums(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Returns size and checksum of every file that this rank has written, by its
        name in `directory`. The files are then on the disk.

        The rank that wrote a file computes them: on a file system shared by several
        nodes, another node cannot flush the file, and may not see it yet.
        """
        entries: dict[str, dict[str, Any]] = {}
        for path in self._paths:
            if self.failures:
                break
            with self.attempt(path):
                checksum = _sha256(path, sync=True)
                entry = {"bytes": path.stat().st_size, "sha256": checksum}
                entries[str(path.relative_to(directory))] = entry
        return entries


@contextmanager
def _failures_of(engine: Any) -> Iterator[_Writer]:
    """Collects the errors of DeepSpeed's writes on this rank."""
    writer, copy_script = engine.checkpoint_engine, engine._copy_recovery_script
    guarded = _Writer(writer)
    engine.checkpoint_engine = guarded

    def copy(path: str) -> None:
        with guarded.attempt(path):
            copy_script(path)

    engine._copy_recovery_script = copy  # by rank 0, between two barriers
    try:
        yield guarded
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = writer, copy_script


def find(root: Path) -> list[Checkpoint]:
    """Returns the complete checkpoints in `root`, the oldest first."""
    complete = []
    for directory in root.glob("phase*-step*"):
        if (match := _TAG.fullmatch(directory.name)) and (directory / COMPLETE).is_file():
            complete.append(Checkpoint(int(match[1]), int(match[2]), directory))
    return sorted(complete)


def damage(checkpoint: Checkpoint) -> str | None:
    """Returns what is wrong with the files of a checkpoint; None if nothing. Compares
    every size and checksum."""
    try:
        files = json.loads((checkpoint.directory / COMPLETE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{checkpoint.directory / COMPLETE} cannot be read"
    for name, entry in files.items():
        path = checkpoint.directory / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{path} does not match its checksum"
    return None


def newest_sound(root: Path, report: Any) -> Checkpoint | None:
    """Returns the newest complete and undamaged checkpoint; `report` gets a line for
    every damaged one."""
    for checkpoint in reversed(find(root)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        report(f"checkpoint {checkpoint.directory} is damaged ({problem}); trying the one before")
    return None


def load(
    engine: Any,
    checkpoint: Checkpoint,
    world: World,
    root: Path,
    names: list[list[str]],
    frozen: str | None = None,
) -> str | None:
    """Puts an engine into the state of a checkpoint. Collective.

    Args:
        names: of the parameters that train, by the optimizer's groups.
        frozen: the digest of the engine's frozen weights; the checkpoint's must be the
            same.
        root: where a checkpoint of another shape (ranks, ZeRO stage, precision) may be
            converted.

    Returns:
        One line that says what was converted; None if the checkpoint was loaded
        unconverted, bit by bit.

    Raises:
        UserError: its frozen weights differ, its shape cannot be converted, or nothing
            was loaded.
    """
    # Imported here: whoever only looks at checkpoints need not wait for DeepSpeed.
    from dsvae.engine import reshape_checkpoint

    meta = world.run_on_rank0(lambda: checkpoint.meta)
    # A checkpoint of the same shape holds the frozen weights too. A conversion takes them
    # from the model, and so does every export.
    if meta.get("frozen", frozen) != frozen:
        raise UserError(
            f"{checkpoint.directory}: the frozen weights of its phase differ from those of the "
            f"model now: the model has changed since the run began; put it back, and "
            f"repeat the command"
        )
    line = None
    if reshape_checkpoint.fits(meta, reshape_checkpoint.shape_of(engine, world)):
        _, state = engine.load_checkpoint(
            str(checkpoint.directory.parent), tag=checkpoint.directory.name
        )
    else:
        line, state = reshape_checkpoint.load(
            engine, checkpoint.directory, meta, world, root, names
        )
    state = state or {}
    if (state.get("phase"), state.get("step")) != (checkpoint.phase, checkpoint.step):
        raise UserError(f"{checkpoint.directory}: DeepSpeed loaded nothing from it")
    return line


def _sha256(path: Path, sync: bool = False) -> str:
    """Returns the checksum of a file. `sync` flushes the file to the disk first, which
    reveals late errors of the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(directory: Path) -> None:
    """Flushes a directory's entries to the disk."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
