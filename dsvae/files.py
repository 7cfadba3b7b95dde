"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from dsvae.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes a text file in place of what was there, at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, at once."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def make_writable(directory: Path, flag: str) -> None:
    """Makes a directory and makes sure that it can be written to, before hours of work;
    `flag` is what chose it.

    Raises:
        UserError: it cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; give another {flag}"
        ) from error


def finite(value: Any) -> Any:
    """The same value with infinities and NaN as None: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
