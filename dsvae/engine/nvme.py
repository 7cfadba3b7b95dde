"""States on a disk (`"device": "nvme"`, ZeRO-Infinity): guards against what DeepSpeed
0.19 silently gets wrong.

DeepSpeed reads and writes its files past the page cache (O_DIRECT). That works only for
aligned addresses and lengths, and DeepSpeed does not check the kernel's answer.
Therefore

- gradients are cut at aligned addresses of the flat buffer that DeepSpeed reads them
  into; otherwise AdamW steps on what the buffer held before;
- weights are neither fetched ahead nor kept between their uses: DeepSpeed does not
  update those that are in memory when the optimizer steps;
- the disk is tried, and its room counted, before anything depends on it;
- checkpoints hold the states themselves. DeepSpeed would copy its files instead, and
  forget AdamW's moments and steps when it loads them;
- every run has its own directory: two runs with the same `nvme_path` would write into
  each other's files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, LOSS_SCALER, OPTIMIZER_STATE_DICT
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from deepspeed.runtime.swap_tensor.utils import AIO_ALIGNED_BYTES
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor, nn
from torch.utils.cpp_extension import CUDA_HOME

from dsvae.engine.ds_config import parameter_dtype, zero_stage
from dsvae.errors import EXIT_DISK, RunStopped, UserError, first_line
from dsvae.parallel.world import World

SECTIONS = ("offload_optimizer", "offload_param")
STATES = 16
"""Bytes per trained weight: its float32 copy, its gradient and two moments."""


@contextmanager
def place(resolved: dict[str, Any], output_dir: str, world: World) -> Iterator[None]:
    """Makes an empty directory for this run under each `nvme_path`, tries it, puts it
    into `resolved`, and removes it at the end.

    Does nothing if no state goes to a disk. Collective, except for the end, at which no
    rank waits for the others.

    Raises:
        UserError: on every rank: no such directory, or one that cannot be written to; no
            compiler or libaio; a disk that does not return what direct I/O wrote; a
            ZeRO stage below 3; or an option that DeepSpeed gets wrong.
    """
    on_disk = sections(resolved)
    for name, section in on_disk.items():
        where = f"ds_config: zero_optimization.{name}"
        if zero_stage(resolved) != 3:
            raise UserError(
                f'{where}.device "nvme" needs stage 3: use --ds_config zero3_nvme, or "cpu"'
            )
        if not section.get("nvme_path"):
            raise UserError(f"{where}.nvme_path must name a directory on a local disk")
        if section.get("fast_init"):
            raise UserError(
                f"{where}.fast_init reads weights to addresses that direct I/O refuses: remove it"
            )
    if "offload_param" in on_disk:
        # Of a weight that is in memory when the optimizer steps, the disk keeps the old
        # value, or its buffer is never freed.
        zero = DeepSpeedZeroConfig(**resolved["zero_optimization"])
        for name in ("prefetch_bucket_size", "max_reuse_distance"):
            if (value := getattr(zero, name)) != 0:
                raise UserError(
                    f"ds_config: zero_optimization.stage3_{name} must be 0 with weights on a "
                    f"disk, not {value:g}"
                )
    # With the node's name: nodes may share the directory, and must not share these.
    host = socket.gethostname()
    run = f"{Path(output_dir).resolve()} {host}"
    own = "dsvae-" + hashlib.sha256(run.encode()).hexdigest()[:12]
    for section in on_disk.values():
        section["nvme_path"] = str(Path(section["nvme_path"]) / own)
    places = sorted({Path(section["nvme_path"]) for section in on_disk.values()})
    # Not by LOCAL_RANK: it is 0 on all ranks of a node if each sees one GPU.
    first = bool(places) and world.gather(host).index(host) == world.rank

    def prepare() -> None:
        if first:
            _compile()
            for directory in places:
                _make(directory)

    def try_all() -> None:
        for directory in places:
            _try(directory, resolved, world.rank)

    try:
        if places:
            # One rank per node makes the directories, and compiles DeepSpeed's I/O if
            # needed; then every rank tries them.
            world.run_on_all(prepare)
            world.run_on_all(try_all)
        yield
    finally:
        if first:
            for directory in places:
                shutil.rmtree(directory, ignore_errors=True)


def make_room(resolved: dict[str, Any], model: nn.Module, world: World) -> None:
    """Sizes the buffers that weights pass through, unless the ds_config does, and
    checks that the disk has room for everything.

    Args:
        model: may be on the meta device.

    Raises:
        RunStopped: on every rank: too little room on a disk.
    """
    parts = [-(-parameter.numel() // world.size) for parameter in model.parameters()]
    needed: dict[str, int] = {}
    for name, section in sections(resolved).items():
        size = STATES if name == "offload_optimizer" else parameter_dtype(resolved).itemsize
        needed[section["nvme_path"]] = needed.get(section["nvme_path"], 0) + size * sum(parts)
        if name == "offload_param":
            section.setdefault("buffer_size", max(parts))
    if not needed:
        return
    host = socket.gethostname()
    disks = [
        ((host, os.stat(place).st_dev), place, size, shutil.disk_usage(place).free)
        for place, size in needed.items()
    ]
    everywhere = [disk for rank in world.gather(disks) for disk in rank]
    for disk, place, _, free in everywhere:
        total = sum(size for other, _, size, _ in everywhere if other == disk)
        if total > free:
            raise RunStopped(
                EXIT_DISK,
                f"error: {Path(place).parent} on {disk[0]}: weights and optimizer states take up "
                f"to {total / 1e9:.1f} GB there, and {free / 1e9:.1f} GB are free: make room, set "
                f"another nvme_path, or use more ranks",
            )


def patch_engine(engine: Any) -> None:
    """Makes a DeepSpeed engine cut gradients at aligned addresses, and save and load
    its states themselves."""
    if not sections(engine.config):
        return
    optimizer = engine.optimizer
    optimizer._rigid_load_state_dict = partial(_load, optimizer)
    # Loads states from a mapped file: they may be larger than the memory of a node.
    engine.checkpoint_engine.load = lambda path, map_location=None: torch.load(
        path, map_location=map_location, weights_only=False, mmap=True
    )
    if optimizer.optimizer_swapper is not None:
        optimizer.optimizer_swapper._adjust_for_misaligned_lengths = partial(
            _aligned_parts, optimizer.optimizer_swapper
        )
        optimizer.state_dict = partial(_states, optimizer)
        # DeepSpeed asks this when it saves and loads, to copy its files.
        engine.zero_nvme_offload_optimizer = lambda: False


def sections(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sections of a ds_config that put something on a disk, by name."""
    zero = config.get("zero_optimization", {})
    offload = {name: zero[name] for name in SECTIONS if isinstance(zero.get(name), dict)}
    return {name: section for name, section in offload.items() if section.get("device") == "nvme"}


def _compile() -> None:
    """Compiles DeepSpeed's disk I/O, which takes minutes, once per machine."""
    if torch.version.cuda and torch.cuda.is_available() and CUDA_HOME is None:
        raise UserError(
            "offload to a disk: DeepSpeed compiles its I/O against the CUDA toolkit, and there is "
            f"none on {socket.gethostname()}: install CUDA {torch.version.cuda} with nvcc and set "
            "CUDA_HOME, or use --ds_config zero3_offload"
        )
    builder = AsyncIOBuilder()
    try:
        compatible = builder.is_compatible(verbose=False)
        if compatible:
            builder.load(verbose=False)
    except Exception as error:  # its builders raise their own, and TypeErrors
        raise UserError(
            f"offload to a disk: DeepSpeed's I/O does not compile: {first_line(error)}"
        ) from error
    if not compatible:
        raise UserError(
            "offload to a disk needs a C++ compiler and libaio's headers (apt-get install g++ "
            "libaio-dev)"
        )


def _make(directory: Path) -> None:
    parent, host = directory.parent, socket.gethostname()
    # Not made if it is missing: a misspelt path would fill the system's disk.
    if not parent.is_dir():
        raise UserError(
            f"ds_config: nvme_path {parent} is not a directory on {host}: make it on a local disk, "
            f"or set another path"
        )
    try:
        shutil.rmtree(directory, ignore_errors=True)  # what a killed run left
        directory.mkdir()
    except OSError as error:
        raise UserError(f"ds_config: nvme_path {parent} on {host}: {error.strerror}") from error


def _try(directory: Path, resolved: dict[str, Any], rank: int) -> None:
    """Writes and reads back as DeepSpeed will, with the smallest alignment."""
    aio = get_aio_config(resolved)
    names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
    handle = AsyncIOBuilder().load(verbose=False).aio_handle(**{name: aio[name] for name in names})
    unit = AIO_ALIGNED_BYTES * aio["intra_op_parallelism"]
    length = max(1 << 20, aio["block_size"]) // unit * unit + unit
    buffers = [
        handle.new_cpu_locked_tensor(unit + length, torch.empty(0, dtype=torch.uint8))
        for _ in range(2)
    ]
    written, read = (buffer[unit:] for buffer in buffers)
    written.random_(generator=torch.Generator().manual_seed(rank))
    read.zero_()
    path = directory / f"try{rank}"
    try:
        returned = (
            handle.sync_pwrite(written, str(path), 0) == 1
            and path.exists()
            and handle.sync_pread(read, str(path), 0) == 1
            and torch.equal(read, written)
        )
    finally:
        path.unlink(missing_ok=True)
        for buffer in buffers:
            handle.free_cpu_locked_tensor(buffer)
    if not returned:
        raise UserError(
            f"ds_config: nvme_path {directory.parent} on {socket.gethostname()} does not return "
            f"what direct I/O wrote in pieces of {unit} bytes: choose a directory on a local disk "
            f"(ext4 or xfs, sectors of 512 bytes)"
        )


def _aligned_parts(
    swapper: Any, tensors: list[Tensor], offsets: list[int]
) -> tuple[list[Tensor], list[int]]:
    """Cuts gradients so that each large part begins and ends at an aligned element of
    the flat buffer; small ones stay in memory.

    Args:
        offsets: where each gradient begins in the flat buffer, in elements.
    """
    unit = swapper.numel_alignment
    parts, places = [], []
    for tensor, offset in zip(tensors, offsets, strict=True):
        begin = -offset % unit
        end = begin + (tensor.numel() - begin) // unit * unit
        cuts = (
            (0, begin, end, tensor.numel())
            if swapper.is_swappable_tensor(numel=end - begin)
            else (0, tensor.numel())
        )
        for start, stop in pairwise(cuts):
            if stop > start:
                part = tensor[start:stop]
                # a view would keep the whole gradient in memory
                parts.append(part.clone() if stop - start < unit else part)
                places.append(offset + start)
    return parts, places


def _states(optimizer: Any) -> dict[str, Any]:
    """Returns a rank's states in the form in which DeepSpeed saves those in memory.
    What is on the disk is mapped, and takes no memory until it is read."""
    saved: dict[str, Any] = optimizer._rigid_state_dict()
    flat = saved[FP32_FLAT_GROUPS] = list(saved[FP32_FLAT_GROUPS])  # else the optimizer's own
    states = saved[OPTIMIZER_STATE_DICT]["state"]
    for index, (number, weights) in enumerate(_in_order(optimizer)):
        if not optimizer._swappable_optimizer_subgroup(number):
            continue
        info = optimizer.optimizer_swapper.swap_params_info[weights.ds_id]
        on_disk = {
            id(each.compute_tensor): torch.from_file(
                each.swap_path, shared=False, size=info.numel(), dtype=info.dtype()
            )
            for each in info.tensors
        }
        flat[number] = on_disk[id(weights)]
        if index in states:
            states[index] = {
                name: on_disk.get(id(value), value) for name, value in states[index].items()
            }
    return saved


def _in_order(optimizer: Any) -> list[tuple[int, Any]]:
    """Returns pairs (sub-group, float32 weights), in the order of the numbers in the
    state of torch's optimizer."""
    optimizer._set_fp32_optimizer_param_groups()
    order = [weights for group in optimizer.optimizer.param_groups for weights in group["params"]]
    optimizer._clear_fp32_optimizer_param_groups()
    numbers = {
        id(weights): number for number, weights in enumerate(optimizer.fp32_partitioned_groups_flat)
    }
    return [(numbers[id(weights)], weights) for weights in order]


def _load(optimizer: Any, saved: dict[str, Any], load_optimizer_states: bool = True) -> None:
    """Loads a rank's states from a checkpoint, in place of DeepSpeed's ZeRO-3 loader:
    each may have been, and may go, in memory or on a disk."""
    assert load_optimizer_states  # nothing here asks for less
    optimizer.loss_scaler, optimizer.overflow = saved[LOSS_SCALER], saved["overflow"]
    optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    optimizer._set_fp32_optimizer_param_groups()
    optimizer.optimizer.load_state_dict(saved[OPTIMIZER_STATE_DICT])
    optimizer._clear_fp32_optimizer_param_groups()
    for number, (weights, value) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, saved[FP32_FLAT_GROUPS], strict=True)
    ):
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            state = optimizer.optimizer.state.get(weights, {})
            _put(optimizer.optimizer_swapper, state, weights, value)
            optimizer._prepare_sub_group(number, set())
        else:
            weights.data.copy_(value.data)
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._release_sub_group(number, set())


def _put(swapper: Any, state: dict[str, Any], weights: Any, value: Tensor) -> None:
    """Moves a sub-group's float32 weights and moments into the swapper's files."""
    info = swapper.swap_params_info[weights.ds_id]
    moments = {
        name: each
        for name, each in state.items()
        if torch.is_tensor(each) and each.numel() == info.numel()
    }
    info.tensors, info.has_state_tensors = info.tensors[:1], False
    for name, each in moments.items():
        state[name] = torch.empty(0, dtype=each.dtype)
        state[name].ds_id = f"{name}-{weights.ds_id}"
    if moments:
        info.add_state_tensors([state[name] for name in moments])
    length = swapper._io_aligned_numel(info.numel()) * value.element_size()
    for context, tensor in zip(info.tensors, (value, *moments.values()), strict=True):
        with open(context.swap_path, "wb") as file:
            tensor.detach().contiguous().view(torch.uint8).numpy().tofile(file)
            file.truncate(length)
