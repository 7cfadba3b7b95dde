"""Files of latents: tensors with a row per text, and the texts beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsvae.errors import UserError, first_line
from dsvae.files import whole_path
from dsvae.generation.options import LatentFormat

Strings = dict[str, list[str]]
Tensors = dict[str, Tensor]


def write_tensors(
    place: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, which appears whole or not at all. Raises UserError if
    it cannot."""
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    known = {"format": "pt", "dsvae": version("dsvae"), **(metadata or {})}
    try:
        with whole_path(place) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors leaves the umask aside
            save_file(rows, temporary, metadata=known)
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(place, error) from error


def write_shard(place: Path, tensors: Tensors, strings: Strings, kind: LatentFormat) -> None:
    """Writes a shard, which appears whole or not at all.

    A safetensors file has no strings: a list of them is two tensors, the UTF-8 bytes of
    all, `NAME` uint8, and where each ends, `NAME_end` (N,) int64. In a parquet file a
    tensor (N, ...) is a column of lists of fixed size, a row's numbers one after the
    other.

    Raises:
        UserError: the place cannot be written, or is full.
    """
    if kind == "safetensors":
        packed = dict(part for name, each in strings.items() for part in _packed(name, each))
        return write_tensors(place, tensors | packed)
    columns: dict[str, Any] = {}
    for name, tensor in tensors.items():
        flat = pa.array(tensor.flatten().numpy())
        size = tensor[0].numel()
        columns[name] = flat if tensor.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
    columns |= {name: pa.array(each, pa.string()) for name, each in strings.items()}
    try:
        with whole_path(place) as temporary:
            pq.write_table(pa.table(columns), temporary)
    except OSError as error:
        raise _cannot_write(place, error) from error


def read_shard(
    place: Path, shapes: Mapping[str, Sequence[int]], strings: Sequence[str]
) -> tuple[Tensors, Strings]:
    """Reads a shard.

    Args:
        shapes: those of a row of each tensor. strings: the names of the lists.

    Raises:
        UserError: it is not one, or lacks a tensor.
    """
    try:
        if place.suffix == ".parquet":
            table = pq.read_table(place)
            texts = {name: table[name].to_pylist() for name in strings}
            return {
                name: torch.from_numpy(_flat(table[name])).view(len(table), *shape)
                for name, shape in shapes.items()
            }, texts
        found = load_file(place)
        return {name: found[name] for name in shapes}, {
            name: _unpacked(found[name], found[f"{name}_end"]) for name in strings
        }
    except (OSError, SafetensorError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{place} is damaged or not a file of latents ({first_line(error)}); write it again"
        ) from error


def sha256_of(place: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    total = hashlib.sha256()
    with place.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    values = column.combine_chunks()
    if isinstance(values, pa.FixedSizeListArray):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).copy()


def _packed(name: str, strings: list[str]) -> list[tuple[str, Tensor]]:
    encoded = [each.encode() for each in strings]
    ends = torch.tensor([len(each) for each in encoded]).cumsum(0)
    content = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
    return [(name, content[: int(ends[-1])]), (f"{name}_end", ends)]


def _unpacked(content: Tensor, ends: Tensor) -> list[str]:
    whole, places = content.numpy().tobytes(), [0, *ends.tolist()]
    return [whole[a:b].decode() for a, b in zip(places[:-1], places[1:], strict=True)]


def _cannot_write(place: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot write {place}: {reason}; choose a place that can be written")
