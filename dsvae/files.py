"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any

from dsvae.errors import UserError


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Yields the path of a file that takes the place of `path` if the block ends without an
    error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Opens a text file that takes the place of `path` if the block ends without an
    error."""
    with (
        whole_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yields an empty directory that takes the place of `directory` if the block ends
    without an error."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file at once."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file of indented JSON at once."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def replace_directory(temporary: Path, directory: Path) -> None:
    """Moves a finished directory to its place, and removes what was there."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def no_output() -> Iterator[None]:
    """Drops what the block prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def make_writable(directory: Path, flag: str) -> None:
    """Makes a directory and tries to write to it, before hours of work; raises UserError
    that names `flag`, the option of the directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; give another {flag}"
        ) from error


def make_place(directory: Path) -> None:
    """Makes the parent of a directory that a command is going to write. Raises
    UserError if there already are files, or no right to write."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} already exists; choose another --output, or remove it")
    make_writable(directory.absolute().parent, "--output")


def finite(value: Any) -> Any:
    """Returns the same value with None for infinities and NaN, which JSON does not
    have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
