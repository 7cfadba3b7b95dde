"""What to change where nothing fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsvae.planning.plan import Machine, Option, Plan

GB = 10**9
MOST_GPUS = 64


@dataclass
class Advice:
    """What is needed at least, and single changes that suffice."""

    gpu_memory: int
    """Bytes of a GPU, margin included, with which something would fit its GPUs."""
    host_memory: int
    """Bytes of a node that the option with the least of them needs, margin included."""
    changes: list[str]
    """Flags that would make something fit, each alone."""

    @property
    def text(self) -> str:
        """The same in words."""
        needs = (
            f"The smallest need of any option is {self.gpu_memory / GB:.1f} GB per GPU and "
            f"{self.host_memory / GB:.1f} GB per node, margin included."
        )
        if not self.changes:
            return (
                f"{needs} Neither smaller micro-batches nor up to {MOST_GPUS} GPUs would suffice."
            )
        return f"{needs} It would fit with {', or with '.join(self.changes)}."


def advise(plan: Plan, change: Callable[[Machine, dict[str, Any], Option], Plan]) -> Advice:
    """Halves the tokens, then doubles the GPUs, with the option that needs the least of
    a GPU.

    Args:
        change: plans one option for another machine and with other flags of the run.
    """
    machine = plan.machine
    keep = 1 - machine.margin
    changes = []
    on_host = [o for o in plan.options if o.host <= keep * machine.host_memory]
    least = min(on_host or plan.options, key=lambda option: option.gpu)
    tokens = plan.config.data.micro_batch_tokens
    while (tokens := tokens // 2) >= plan.config.data.max_tokens:
        evaluation = min(tokens, plan.config.eval.batch_tokens)
        fewer = {"data.micro_batch_tokens": tokens, "eval.batch_tokens": evaluation}
        if change(machine, fewer, least).chosen is not None:
            changes.append(f"--batch_tokens {tokens} --eval_batch_tokens {evaluation}")
            break
    gpus = machine.gpus
    while (gpus := gpus * 2) <= min(MOST_GPUS, plan.config.data.batch_size):
        if change(dataclasses.replace(machine, gpus=gpus), {}, least).chosen is not None:
            changes.append(f"--gpus {gpus}")
            break
    # With more of one memory alone, rounded up as it is printed.
    if on_host:
        changes.append(f"--gpu_memory {_up(least.gpu / keep)}GB")
    if on_gpu := [o.host for o in plan.options if o.gpu <= keep * machine.gpu_memory]:
        changes.append(f"--host_memory {_up(min(on_gpu) / keep)}GB")
    return Advice(
        int(min(o.gpu for o in plan.options) / keep),
        int(min(o.host for o in plan.options) / keep),
        changes,
    )


def _up(size: float) -> float:
    return math.ceil(size / GB * 10) / 10
