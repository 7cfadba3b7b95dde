"""A model written as a transformers directory, shard by shard."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsvae.files import replace_directory
from dsvae.modeling.t5_vae import T5VAE

MAX_SHARD_BYTES = 10**9
"""Largest safetensors file of an exported model, unless one tensor alone is larger. A
file is held in memory while it is written."""


class ModelDirectory:
    """Writes a model: `begin`, `add` every weight once, `finish`. The directory appears
    whole or not at all.

    Args:
        max_shard_bytes: the largest file, unless one tensor alone is larger.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._temporary = directory.with_name(f".{directory.name}.tmp")
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._failure: OSError | None = None
        self._total = 0

    def begin(self) -> None:
        """Makes a temporary directory beside the final one, and removes what a cut
        export left."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a weight on CPU, and holds it until its shard is full. Errors are
        raised in `finish`."""
        size = tensor.numel() * tensor.element_size()
        held = sum(t.numel() * t.element_size() for t in self._pending.values())
        if self._pending and held + size > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._total += size

    def _flush(self) -> None:
        # An error raised here would leave the other ranks waiting in the next gathering.
        if self._failure is None:
            try:
                save_file(
                    self._pending,
                    self._temporary / f"{len(self._shards)}.safetensors",
                    metadata={"format": "pt", "dsvae": version("dsvae")},
                )
            except SafetensorError as error:
                free = shutil.disk_usage(self._temporary).free
                number = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
                self._failure = OSError(
                    number, f"{error}, {free / 2**20:.0f} MiB free", str(self._temporary)
                )
        self._shards.append(list(self._pending))
        self._pending.clear()

    def finish(self, model: T5VAE, extras: Callable[[Path], None], *, merge: bool = True) -> None:
        """Adds the normalizer and the configurations of `model`, calls `extras` with the
        directory, and moves it to its place.

        Args:
            merge: the weights are without adapters, which were added to their matrices.

        Raises:
            OSError: the disk is full; nothing is left.
        """
        if model.config.denoiser:
            for name, buffer in model.denoiser.named_buffers(prefix="denoiser"):
                self.add(name, buffer.to("cpu", copy=True))
        self._flush()
        if self._failure is not None:
            self.abandon()
            raise self._failure
        names = ["model.safetensors"]
        if len(self._shards) > 1:
            names = [
                f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
                for i in range(len(self._shards))
            ]
            index = {
                name: file
                for file, shard in zip(names, self._shards, strict=True)
                for name in shard
            }
            text = json.dumps(
                {"metadata": {"total_size": self._total}, "weight_map": index}, indent=2
            )
            (self._temporary / "model.safetensors.index.json").write_text(text + "\n")
        for i, name in enumerate(names):
            (self._temporary / f"{i}.safetensors").rename(self._temporary / name)
        # The file's own class name and dtype, not those of the running model.
        config = type(model.config).from_dict(model.config.to_dict())
        config.lora = None if merge else config.lora
        config.architectures = [type(model).__name__]
        config.dtype = config.t5.dtype = torch.float32
        config.save_pretrained(self._temporary)
        model.generation_config.save_pretrained(self._temporary)
        extras(self._temporary)
        replace_directory(self._temporary, self.directory)

    def abandon(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self._temporary, ignore_errors=True)
