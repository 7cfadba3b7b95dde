"""Results of an evaluation's passes, kept on disk: an evaluation that is cut goes on
where it stood, and ends with the same numbers."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import RunStopped
from dsvae.parallel.world import World


class Kept:
    """What the passes of one evaluation of one model have found so far.

    A pass is known by what it computes, and not by its place among the others. Rank 0
    alone reads and writes. A full disk is no error: all that was kept makes room then,
    and the next start computes it again.

    Args:
        root: the directory, which holds one evaluation at a time.
        identity: equal only where the same weights are evaluated in the same precision.
        stop: what all ranks raise, if any of them was told to stop. Collective.
    """

    def __init__(
        self, root: Path, identity: str, world: World, stop: Callable[[], RunStopped | None]
    ) -> None:
        name = hashlib.sha256(f"{identity} {world.size} {world.device.type}".encode()).hexdigest()
        self._root, self._directory, self._world, self.stop = root, root / name, world, stop

        def make() -> None:
            if not self._directory.is_dir():
                self.remove()  # the evaluation of other weights
                with suppress(OSError):
                    self._directory.mkdir(parents=True)

        world.run_on_rank0(make)

    def key(self, split: TokenizedSplit, latent: Tensor | None, token_budget: int) -> str:
        """The name of a pass over `split`: an encoding pass, or the decoding of `latent`
        (N, Z)."""
        found = hashlib.sha256(f"{token_budget} {latent is None}".encode())
        for array in (split.content_keys, split.lengths):
            found.update(np.ascontiguousarray(array).data)
        if latent is not None:
            found.update(latent.contiguous().numpy().data)
        return found.hexdigest()

    def load(self, key: str, result: Tensor) -> int:
        """How many batches of a pass were done, on every rank. Collective.

        Args:
            result: zeros; on rank 0 it gets what those batches of all ranks found.
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
        """Keeps what the first `batches` batches of a pass found on all ranks.
        Collective."""

        def write() -> None:
            content = io.BytesIO()
            torch.save({"batches": batches, "result": result.cpu()}, content)
            temporary = self._directory / f".{key}.tmp"
            try:
                with temporary.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._directory / key)
            except OSError:
                self.remove()

        self._world.run_on_rank0(write)

    def remove(self) -> None:
        """Takes everything away. On rank 0."""
        shutil.rmtree(self._root, ignore_errors=True)
