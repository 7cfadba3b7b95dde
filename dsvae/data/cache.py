"""The directory of tokenized corpora: what is in it, and what is removed.

An entry is a directory with a key as its name. A run that maps it holds a lock on its
report. What is written or removed has a name that no run looks for.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import datasets

from dsvae.errors import UserError

REPORT = "report.json"
_STALE_SECONDS = 24 * 3600
_DAY = 24 * 3600


class Entry(NamedTuple):
    """A tokenized corpus."""

    path: Path
    source: str
    """Where its sentences come from, in words."""
    sentences: int
    size: int
    """Bytes on the disk."""
    days: float
    """Since a run last began with it."""


def root_of(cache_dir: str | None) -> Path:
    """Returns the cache directory of a configuration (`data.cache_dir`)."""
    default = os.path.join(datasets.config.HF_DATASETS_CACHE, "dsvae")
    return Path(cache_dir or default).expanduser()


def temporary(root: Path, key: str) -> Path:
    """Returns a new name for what is being written or removed."""
    return root / f".{key}.{uuid.uuid4().hex}.tmp"


def use(entry: Path) -> None:
    """Notes that a run begins with an entry."""
    with suppress(OSError):  # it may belong to somebody else
        os.utime(entry)


def hold(entry: Path) -> IO[str]:
    """Opens the report of an entry, which is not removed until it is closed."""
    report = (entry / REPORT).open(encoding="utf-8")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(report, fcntl.LOCK_SH)
    return report


def sweep(root: Path) -> None:
    """Removes what killed runs have left: temporary directories in which nothing was
    written for a day."""
    for leftover in root.glob(".*.tmp"):
        with suppress(OSError):  # its run may be ending at this moment
            newest = max(p.stat().st_mtime for p in (leftover, *leftover.rglob("*")))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def entries(cache_dir: str | None, older_than: float = 0) -> list[Entry]:
    """Returns the entries of a cache that no run began with for `older_than` days, the
    largest first.

    Raises:
        UserError: `cache_dir` is named and is not a directory that can be read, or
            `older_than` is negative.
    """
    if not older_than >= 0:
        raise UserError(f"--older_than is {older_than:g}: give days, 0 or more")
    root = root_of(cache_dir)
    if cache_dir is not None and not root.is_dir():
        raise UserError(f"--cache_dir {cache_dir}: no such directory; check the path")
    try:
        found = [_read(path) for path in _paths(root)]
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}; check its permissions") from None
    return sorted((e for e in found if e.days >= older_than), key=lambda e: (-e.size, e.path))


def clear(found: list[Entry]) -> list[Entry]:
    """Removes entries, and what killed runs have left beside them; returns those that stay
    because a run uses them.

    Raises:
        UserError: one cannot be removed.
    """
    used = []
    for entry in found:
        if not _free(entry.path):
            used.append(entry)
            continue
        try:
            # At once: a run finds the whole entry or none.
            gone = entry.path.rename(temporary(entry.path.parent, entry.path.name))
            shutil.rmtree(gone)
        except OSError as error:
            raise UserError(
                f"{entry.path} cannot be removed: {error.strerror}; check its permissions"
            ) from None
    for root in {entry.path.parent for entry in found}:
        sweep(root)
    return used


def _paths(root: Path) -> Iterator[Path]:
    """Returns the directories that are named like entries."""
    for path in root.iterdir() if root.is_dir() else ():
        if re.fullmatch(r"[0-9a-f]{64}", path.name) and path.is_dir():
            yield path


def _read(path: Path) -> Entry:
    source, sentences = "damaged", 0
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        report = json.loads((path / REPORT).read_bytes())
        sentences = sum(part["sentences"] for part in report["splits"].values())
        source = str(report["source"])
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Entry(path, source, sentences, size, (time.time() - path.stat().st_mtime) / _DAY)


def _free(entry: Path) -> bool:
    """Tells whether no run holds an entry."""
    try:
        with (entry / REPORT).open() as report:
            fcntl.flock(report, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True  # damaged
    except OSError:
        return False
    return True
