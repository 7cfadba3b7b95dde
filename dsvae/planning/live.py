"""Bytes of live tensors, counted as torch makes and drops them: what a caching
allocator would have to hold.

The same counter reads a dry run on fake tensors (the plan) and a real run (its check).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return while the mode is on, until the last
    reference to each is gone.

    Views share their storage and count once. Scratch memory inside an operator is not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Live bytes."""
        self.peak = 0
        """The most since the last `restart`, in bytes."""
        self._seen: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """The peak since the last restart, in bytes; starts a new count."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.add(leaf)
        return result
