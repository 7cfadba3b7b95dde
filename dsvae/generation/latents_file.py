"""The posteriors of sentences in one safetensors file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsvae.errors import UserError
from dsvae.generation.reading import Line
from dsvae.modeling.families import Distribution


def check_place(path: str) -> None:
    """Makes sure, before hours of work, that a file can be written.

    Raises:
        UserError: it cannot.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        raise UserError(f"cannot write {place}: it is a directory; name a file in it")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise _failure(place, error.strerror) from error


def write_latents(path: str, batches: Sequence[tuple[Sequence[Line], Distribution]]) -> None:
    """Writes posteriors to a file, which appears whole or not at all.

    Its tensors have a row per sentence: `line` (N,) int64, the number of the sentence in
    its source, and the parameters of the posterior by their names, float32; for the
    Gaussian `mean` and `logvar` (N, Z).

    Args:
        batches: at least one.

    Raises:
        UserError: the place cannot be written, or is full.
    """
    place = Path(path).expanduser()
    parts = [posterior.tensors() for _, posterior in batches]
    tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    tensors["line"] = torch.tensor([line.line for lines, _ in batches for line in lines])
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "dsvae": version("dsvae")})
        temporary.replace(place)
    except (OSError, SafetensorError) as error:
        raise _failure(place, getattr(error, "strerror", None) or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _failure(place: Path, reason: str | None) -> UserError:
    return UserError(f"cannot write {place}: {reason}; choose a place that can be written")
