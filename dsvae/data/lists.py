"""A column of lists, read without copying the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import numpy as np


class Lists:
    """A column of lists of numbers, memory-mapped."""

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        # Arrow stores the rows in chunks. Their buffers are views of the file: nothing is
        # copied at the start, and a row costs two offsets and one slice.
        chunks = [chunk for chunk in dataset.data.column(column).chunks if len(chunk)]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Returns the lists at `indices`, (T_i,) int64 each; IndexError outside
        0..N-1."""
        return [self._values[chunk][a:b].astype(np.int64) for chunk, a, b in self._bounds(indices)]

    def lengths(self, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Returns (N,) int32, of the lists at `indices`, or of all."""
        if indices is None:
            return np.concatenate(
                [np.zeros(0, np.int32), *(np.diff(offsets) for offsets in self._offsets)]
            )
        return np.array([b - a for _, a, b in self._bounds(indices)], np.int32)

    def _bounds(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Returns the chunk of each list, and where in its values the list begins and
        ends."""
        wanted = np.asarray(indices, dtype=np.int64)
        count = int(self._starts[-1])
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < count:
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of a split of {count}")
        chunks = np.searchsorted(self._starts, wanted, side="right") - 1
        for chunk, row in zip(
            chunks.tolist(), (wanted - self._starts[chunks]).tolist(), strict=True
        ):
            offsets = self._offsets[chunk]
            yield chunk, offsets[row], offsets[row + 1]
