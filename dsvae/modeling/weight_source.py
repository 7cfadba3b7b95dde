"""Where the weights of a model come from at its start: read from safetensors files, or
drawn.

A model may be too large for one process. So it is filled from here tensor by tensor, in
the same way at all ZeRO stages and for any number of ranks, which thus start from the
same values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from dsvae.modeling.lora import draw, is_adapter

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of weight files that can run code when they are loaded."""

COMPARED_ROWS = 4096
"""How many rows of two matrices are compared at a time."""


class SafetensorsFiles:
    """Reads the weights of a model directory or a hub model in safetensors, tensor by
    tensor.

    Args:
        hub: what transformers' `cached_file` takes: revision, cache_dir and so on.

    Raises:
        OSError: no such model, or no safetensors in it.
        SafetensorError: a damaged file.
    """

    def __init__(self, name_or_path: str, **hub: Any) -> None:
        self.name = name_or_path
        self._files: dict[str, Path] = {}  # the file of each tensor
        self._stamps: dict[Path, tuple[int, int]] = {}
        for file in map(Path, _weight_files(name_or_path, hub)):
            with safe_open(file, framework="pt") as reader:
                self._files |= dict.fromkeys(reader.keys(), file)
            self._stamps[file] = _stamp(file)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def digest(self, without: tuple[str, ...]) -> str:
        """Returns the SHA-256 of all tensors and their names, but for those whose names
        begin with one of `without`."""
        total = hashlib.sha256()
        for key in sorted(self._files):
            if not key.startswith(without):
                with safe_open(self._files[key], framework="pt") as reader:
                    value = reader.get_tensor(key).contiguous()
                total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                total.update(value.flatten().view(torch.uint8).numpy())
        return total.hexdigest()

    def shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self._files[key], framework="pt") as reader:
            return tuple(reader.get_slice(key).get_shape())

    def copy(self, key: str, out: Tensor) -> None:
        """Copies a tensor into `out`, of any dtype, from the mapped file.

        The file is opened for each tensor. When it is closed, the pages that were read
        no longer count as memory of the process.
        """
        with safe_open(self._files[key], framework="pt") as reader:
            out.copy_(reader.get_tensor(key))

    def equal(self, one: str, other: str) -> bool:
        """Returns whether two tensors are equal; only a few rows are in memory at a
        time."""
        if self.shape(one) != self.shape(other):
            return False
        with (
            safe_open(self._files[one], framework="pt") as first,
            safe_open(self._files[other], framework="pt") as second,
        ):
            a, b = first.get_slice(one), second.get_slice(other)
            starts = range(0, self.shape(one)[0], COMPARED_ROWS)
            return all(
                torch.equal(a[i : i + COMPARED_ROWS], b[i : i + COMPARED_ROWS]) for i in starts
            )

    def check_unchanged(self) -> None:
        """Raises OSError if a file is missing or has changed since it was first
        opened."""
        for file, stamp in self._stamps.items():
            if not file.is_file():
                raise OSError(f"{file} no longer exists")
            if _stamp(file) != stamp:
                raise OSError(f"{file} has changed since it was loaded")


class Origin:
    """The initial values of the parameters of a model.

    Args:
        make: makes the model. It is called on the meta device, where a model of any
            size takes no memory.
        seed: of the parameters that are drawn, by the rules of transformers. Each
            module has its own generator, so that the values depend only on seed and
            name.
        files: of the parameters that are read. None: all are drawn.
        key_of: the name in `files` of a parameter, None for one that is drawn.

    Raises:
        ValueError: the files lack a key, or a tensor has another shape.
    """

    def __init__(
        self,
        make: Callable[[], PreTrainedModel],
        seed: int,
        files: SafetensorsFiles | None = None,
        key_of: Callable[[str], str | None] = str,
    ) -> None:
        with torch.device("meta"):
            self._skeleton = make()
        self._make, self._seed, self._files = make, seed, files
        self._keys: dict[str, str] = {}
        self._drawn: dict[str, Tensor] = {}
        self._shapes = {name: tuple(p.shape) for name, p in self._skeleton.named_parameters()}
        if files is None:
            return
        self._keys = {name: key for name in self._shapes if (key := key_of(name)) is not None}
        if missing := [key for key in self._keys.values() if key not in files]:
            raise ValueError(
                f"{files.name} lacks weights: {', '.join(sorted(missing)[:3])} ({len(missing)} "
                f"in all)"
            )
        for name, key in self._keys.items():
            if (shape := files.shape(key)) != self._shapes[name]:
                raise ValueError(
                    f"{files.name}: {key} has the shape {shape}, but by its config.json it is "
                    f"{self._shapes[name]}"
                )

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self._skeleton.config

    def skeleton(self) -> PreTrainedModel:
        """Makes the model on the meta device, without values and memory."""
        with torch.device("meta"):
            return self._make()

    @torch.no_grad()
    def copy(self, name: str, out: Tensor) -> Tensor:
        """Copies the value of a parameter into `out`, in the dtype of `out`, and
        returns `out`."""
        if name in self._keys:
            cast(SafetensorsFiles, self._files).copy(self._keys[name], out)
            return out
        if is_adapter(name):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_derived(self._seed, name))
                return out.copy_(draw(name, torch.empty(self._shapes[name])))
        if name not in self._drawn:
            self._drawn = self._draw(name)
        return out.copy_(self._drawn.pop(name))

    def tensor(self, name: str) -> Tensor:
        """Returns the value of a parameter, float32 on CPU."""
        return self.copy(name, torch.empty(self._shapes[name], dtype=torch.float32))

    def check_unchanged(self) -> None:
        """Raises OSError if the files have changed since the model was loaded."""
        if self._files is not None:
            self._files.check_unchanged()

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Returns the whole model on CPU, in `dtype` but for the modules that stay in
        float32."""
        model = self.skeleton()
        model.config.dtype = dtype
        exact = model._keep_in_fp32_modules_strict or ()
        for name, parameter, put in slots(model):
            value = self.tensor(name)
            if not any(part in exact for part in name.split(".")):
                value = value.to(dtype)
            put(nn.Parameter(value, requires_grad=parameter.requires_grad))
        return model

    @torch.no_grad()
    def _draw(self, name: str) -> dict[str, Tensor]:
        """Draws the values of all parameters of the module that initializes this one.

        In T5, an attention or a feed-forward initializes the matrices inside it, and is
        therefore drawn as a whole. Stacks and models leave it to their children.
        """
        owner = name.rpartition(".")[0]
        around = owner.rpartition(".")[0]
        inside = isinstance(self._skeleton.get_submodule(around), PreTrainedModel)
        root = owner if inside else around
        module = self._skeleton.get_submodule(root)
        modules = {root: module} | (
            {} if inside else {f"{root}.{n}": child for n, child in module.named_children()}
        )
        empty = {prefix: dict(m.named_parameters(recurse=False)) for prefix, m in modules.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_derived(self._seed, root))
            for prefix, m in modules.items():
                for key, p in empty[prefix].items():
                    setattr(m, key, nn.Parameter(torch.empty(p.shape, dtype=torch.float32)))
            for prefix, m in reversed(modules.items()):  # children first, as in transformers
                _model_of(self._skeleton, prefix)._init_weights(m)
        drawn = {}
        for prefix, m in modules.items():
            for key, p in empty[prefix].items():
                drawn[f"{prefix}.{key}"] = getattr(m, key).data
                setattr(m, key, p)
        return drawn


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Callable[[nn.Parameter], None]]]:
    """Yields every parameter of a model with its name, and a function that replaces it
    in all modules that it is tied to."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, key))

    def put(where: list[tuple[nn.Module, str]], new: nn.Parameter) -> None:
        for module, key in where:
            setattr(module, key, new)

    for name, parameter in list(model.named_parameters()):
        yield name, parameter, partial(put, places[parameter])


def no_safetensors(name: str) -> OSError:
    """Returns the error for a model without safetensors."""
    return OSError(
        f"no file named {SAFE_WEIGHTS_NAME} in {name}, and pickles (pytorch_model.bin) are not "
        f"read, because they can run code: on a machine that you trust, load the model with its "
        f"class in transformers (for example UMT5ForConditionalGeneration), save it and its "
        f"tokenizer with save_pretrained, and name that directory"
    )


def refuse_pickles(directory: Path) -> None:
    """Raises OSError for a directory that has pickles and no safetensors."""
    files = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if not any(name.endswith(".safetensors") for name in files) and any(
        name.endswith(PICKLES) for name in files
    ):
        raise no_safetensors(str(directory))


def _weight_files(name_or_path: str, hub: dict[str, Any]) -> list[str]:
    """Returns the safetensors files of a model; those of a hub model are downloaded."""

    def cached(file: str) -> str | None:
        return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub)

    if single := cached(SAFE_WEIGHTS_NAME):
        return [single]
    index = cached(SAFE_WEIGHTS_INDEX_NAME)
    offline = constants.HF_HUB_OFFLINE or hub.get("local_files_only")
    online = not offline and not os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    if index is None and online and not Path(name_or_path).is_dir():
        # Many older hub models have their safetensors in a pull request by the converter
        # of the hub.
        try:
            index, revision, sharded = auto_conversion(name_or_path, **hub)
            hub = {**hub, "revision": revision}
        except Exception as error:  # the hub, the network and the converter each raise their own
            raise no_safetensors(name_or_path) from error
        if index and not sharded:
            return [index]
    if index is None:
        raise no_safetensors(name_or_path)
    files, _ = get_checkpoint_shard_files(name_or_path, index, **hub)
    return files


def _model_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Returns the innermost transformers model around a submodule, whose rules apply
    there."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def _derived(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
