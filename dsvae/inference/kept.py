"""Results of an evaluation's passes, kept on disk, so that an interrupted evaluation
continues and ends with the same numbers."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsvae.errors import RunStopped
from dsvae.files import whole_path
from dsvae.parallel.world import World


class Kept:
    """The results of the passes of one evaluation of one model.

    A pass is identified by what it computes, not by its place among the others. Only
    rank 0 reads and writes. A full disk is not an error: everything kept is then deleted to
    make room, and the next start computes it again.

    Args:
        root: the directory, which holds one evaluation at a time.
        identity: equal only if the same weights are evaluated in the same precision.
        stop: returns what all ranks raise if one of them was asked to stop, else None.
            Collective.
    """

    def __init__(
        self, root: Path, identity: str, world: World, stop: Callable[[], RunStopped | None]
    ) -> None:
        name = hashlib.sha256(f"{identity} {world.size} {world.device.type}".encode()).hexdigest()
        self._root, self._directory, self._world, self.stop = root, root / name, world, stop

        def make() -> None:
            if not self._directory.is_dir():
                self.remove()  # it holds the evaluation of other weights
                with suppress(OSError):
                    self._directory.mkdir(parents=True)

        world.run_on_rank0(make)

    def key(self, split: Any, name: str, token_budget: int) -> str:
        """Returns the key of a pass over `split`, whose name says what it computes."""
        digest = hashlib.sha256(f"{token_budget} {name}".encode())
        for array in (split.content_keys, split.lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def load(self, key: str, result: Tensor) -> int:
        """Returns the number of batches of a pass that are done, on every rank.
        Collective.

        Args:
            result: zeros; on rank 0 it receives the results of those batches, of all
                ranks.
        """

        def read() -> int:
            path = self._directory / key
            if not path.is_file():
                return 0
            stored = torch.load(path, weights_only=True)
            result.copy_(stored["result"])
            return int(stored["batches"])

        return self._world.run_on_rank0(read)

    def save(self, key: str, batches: int, result: Tensor) -> None:
        """Keeps the results of the first `batches` batches of a pass on all ranks.
        Collective."""

        def write() -> None:
            content = io.BytesIO()
            torch.save({"batches": batches, "result": result.cpu()}, content)
            try:
                with whole_path(self._directory / key) as temporary, temporary.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                self.remove()

        self._world.run_on_rank0(write)

    def remove(self) -> None:
        """Deletes everything. Only rank 0 calls it."""
        shutil.rmtree(self._root, ignore_errors=True)
