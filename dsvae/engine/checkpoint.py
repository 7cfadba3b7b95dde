"""Checkpoints that are either complete or never used.

All ranks write, all ranks check what was written, rank 0 records sizes and checksums in a file called COMPLETE, which appears
at once; only then `latest` moves. (DeepSpeed alone moves `latest` before the other ranks have finished.)
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsvae.engine import universal
from dsvae.engine.distributed import World
from dsvae.errors import UserError
from dsvae.files import write_text

COMPLETE = "COMPLETE"
_TAG = re.compile(r"phase(\d)-step(\d{8})")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A complete checkpoint; they order by age."""

    phase: int
    step: int
    directory: Path

    @property
    def meta(self) -> dict[str, Any]:
        """What was recorded beside the files: the shape that they were written with (`universal.shape_of`)."""
        return json.loads((self.directory / COMPLETE).read_text())["meta"]


def save(engine: Any, world: World, root: Path, *, phase: int, step: int, meta: dict[str, Any], keep: int) -> Checkpoint:
    """Saves the state of a DeepSpeed engine after optimizer step `step` and keeps the newest `keep`. Collective."""
    tag = f"phase{phase}-step{step:08d}"
    directory = root / tag
    world.on_main(lambda: shutil.rmtree(directory, ignore_errors=True))  # what an earlier, cut save may have left
    engine.save_checkpoint(str(root), tag=tag, client_state={"phase": phase, "step": step}, save_latest=False)
    world.barrier()

    # Every rank reads back a part of the files.
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    own = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files[world.rank :: world.size]
    }
    parts: list[dict | None] = [None] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, own)
    else:
        parts = [own]

    def commit() -> None:
        listing = {name: entry for part in parts if part for name, entry in part.items()}
        write_text(directory / COMPLETE, json.dumps({"meta": meta, "files": listing}, indent=1))
        write_text(root / "latest", tag)
        for old in find(root)[:-keep]:
            (old.directory / COMPLETE).unlink()  # incomplete from here on, whatever happens to the rest
            shutil.rmtree(old.directory)

    world.on_main(commit)
    return Checkpoint(phase, step, directory)


def find(root: Path) -> list[Checkpoint]:
    """The complete checkpoints under `root`, the oldest first."""
    found = []
    for directory in root.glob("phase*-step*"):
        if (match := _TAG.fullmatch(directory.name)) and (directory / COMPLETE).is_file():
            found.append(Checkpoint(int(match[1]), int(match[2]), directory))
    return sorted(found)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files of a checkpoint, None if nothing: every size and checksum is compared."""
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
    """The newest complete and undamaged checkpoint; damaged ones are named through `report(line)` and passed over."""
    for checkpoint in reversed(find(root)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        report(f"checkpoint {checkpoint.directory} is damaged ({problem}); trying the one before")
    return None


def load(engine: Any, checkpoint: Checkpoint, world: World, root: Path) -> str | None:
    """Puts an engine into the state of a checkpoint. Collective.

    Args:
        root: where a checkpoint of another shape (ranks, ZeRO stage, precision) may be converted for the time being.

    Returns:
        One line of what was converted; None where the checkpoint was loaded as it is, bit by bit.

    Raises:
        UserError: its shape cannot be converted, or nothing was loaded.
    """
    meta = world.on_main(lambda: checkpoint.meta)
    line = None
    if universal.fits(meta, universal.shape_of(engine, world)):
        path, state = engine.load_checkpoint(str(checkpoint.directory.parent), tag=checkpoint.directory.name)
        loaded = path is not None
    else:
        line, state = universal.load(engine, checkpoint.directory, meta, world, root)
        loaded = True
    if not loaded or (state["phase"], state["step"]) != (checkpoint.phase, checkpoint.step):
        raise UserError(f"{checkpoint.directory}: DeepSpeed loaded nothing from it")
    return line


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
