"""Posteriors of any number of sentences in one safetensors file, in constant memory.

safetensors begins with the shapes of all tensors and then holds one tensor behind the
other, but posteriors come batch by batch, from a stream whose length nobody knows. So
each tensor is collected in an unnamed temporary file beside the output, and the output
is put together from them at the end: twice the space on disk for a moment, and no more
memory than a batch.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from dsvae.errors import UserError
from dsvae.modeling.families import Distribution

_DTYPES = {"<i8": "I64", "<f4": "F32"}


class LatentsFile:
    """Writes a safetensors file with N rows: `line` (N,) int64, and the posterior's
    fields, for the Gaussian `mean` and `logvar` (N, Z) float32. A context manager: the
    file appears whole when its block ends, and not at all if that raises.

    Raises:
        UserError: the place cannot be written, or is full.
    """

    def __init__(
        self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None
    ) -> None:
        self.path, self.metadata = Path(path).expanduser(), metadata or {}
        self.rows = 0
        # name -> file, dtype, shape of a row
        self._parts: dict[str, tuple[IO[bytes], str, tuple[int, ...]]] = {}
        self._files = ExitStack()
        if self.path.is_dir():
            raise UserError(f"cannot write {self.path}: it is a directory; name a file in it")
        try:
            # Fails now, and not after an hour, where nothing can be written.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise self._failure(error) from error

    def add(self, lines: Sequence[int], posterior: Distribution) -> None:
        """Appends the posteriors of a batch, and the numbers of their sentences in the
        source."""
        try:
            self._append("line", np.asarray(lines, dtype="<i8"))
            for name, tensor in posterior.tensors().items():
                self._append(name, tensor.cpu().numpy().astype("<f4", copy=False))
        except OSError as error:
            raise self._failure(error) from error
        self.rows += len(lines)

    def __enter__(self) -> LatentsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._files:
            if kind is None:
                try:
                    self._publish()
                except OSError as error:
                    raise self._failure(error) from error

    def _append(self, name: str, rows: np.ndarray) -> None:
        if name not in self._parts:
            # The stack closes it.
            file = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            self._parts[name] = (self._files.enter_context(file), rows.dtype.str, rows.shape[1:])
        self._parts[name][0].write(np.ascontiguousarray(rows).tobytes())

    def _publish(self) -> None:
        header: dict[str, object] = {"__metadata__": self.metadata}
        end = 0
        # `line` is first: 8 bytes a number, aligned like the header
        for name, (file, dtype, shape) in self._parts.items():
            start, end = end, end + file.tell()
            header[name] = {
                "dtype": _DTYPES[dtype],
                "shape": [self.rows, *shape],
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as output:
                output.write(len(text).to_bytes(8, "little") + text)
                for file, _, _ in self._parts.values():
                    file.seek(0)
                    shutil.copyfileobj(file, output, 1 << 20)
                output.flush()
                os.fsync(output.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror}; choose a place that can be written"
        )
