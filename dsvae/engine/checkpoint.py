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
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dsvae.errors import UserError
from dsvae.files import write_text

if TYPE_CHECKING:  # it imports deepspeed, which who only looks at checkpoints need not wait for
    from dsvae.engine.distributed import World

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
        """What was recorded beside the files: world_size, zero_stage."""
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


def load(engine: Any, checkpoint: Checkpoint, world: World, *, zero_stage: int) -> None:
    """Puts an engine into the state of a checkpoint. Collective.

    Raises:
        UserError: written by another number of ranks or at another ZeRO stage, or nothing was loaded.
    """
    meta = checkpoint.meta
    for name, now in (("world_size", world.size), ("zero_stage", zero_stage)):
        if meta[name] != now:
            what = "ranks" if name == "world_size" else "ZeRO stage"
            raise UserError(
                f"{checkpoint.directory} was written with {what} {meta[name]}, this run has {now}: "
                f"resume with {meta[name]}, or start from its exported weights with --model"
            )
    path, state = engine.load_checkpoint(str(checkpoint.directory.parent), tag=checkpoint.directory.name)
    if path is None or (state["phase"], state["step"]) != (checkpoint.phase, checkpoint.step):
        raise UserError(f"{checkpoint.directory}: DeepSpeed loaded nothing from it")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
