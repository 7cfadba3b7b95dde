"""The device of a process."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from dsvae.errors import UserError, first_line

GPU_FILES = "/dev/nvidia[0-9]*"
"""What the driver makes of a machine's GPUs, whether torch can use them or not."""


def local_device(local_rank: int = 0) -> torch.device:
    """Returns the accelerator of this rank, or the CPU on a machine without one.

    `DS_ACCELERATOR=cpu` asks for the CPU, as it does of DeepSpeed.

    Raises:
        UserError: the machine has a GPU that torch cannot use. A run on the CPU in its
            place would take a hundred times as long.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        _refuse_unusable_gpu()
        return torch.device("cpu")
    return prepare(torch.device(accelerator.type, local_rank))


def _refuse_unusable_gpu() -> None:
    # Variables that hide the GPUs: SLURM sets the first one for jobs that asked for none.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    files = sorted(Path("/").glob(GPU_FILES.lstrip("/")))
    if hidden or not files:
        return
    try:
        torch.cuda.init()
        reason = "none is visible"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    raise UserError(
        f"the machine has a GPU ({files[0]}) that torch {torch.__version__} cannot use: {reason}; "
        f"install a newer driver, or a build of torch for this one, or set DS_ACCELERATOR=cpu to "
        f"use the CPU"
    )


def has_fast_bf16(device: torch.device) -> bool:
    """Returns whether products in bf16 are at least as fast as in float32. On a CPU
    without AVX-512 they took 25 times as long."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in (
        "DEFAULT",
        "AVX2",
    )


def prepare(device: torch.device) -> torch.device:
    """Sets what this process needs of torch on a device; returns the device."""
    if device.type == "cuda":
        # On Hopper and Blackwell, attention tries cuDNN first, which makes a plan for every
        # new shape (0.4 s each was reported). Here nearly every batch and every generated
        # token has a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def describe(device: torch.device) -> str:
    """Returns the name of a device: `NVIDIA H200 (cuda:0)`."""
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, threads per rank: {torch.get_num_threads()})"
    module = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else "accelerator"
    return f"{name} ({device})"
