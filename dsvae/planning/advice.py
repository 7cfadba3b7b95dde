"""What to change where nothing fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from dsvae.planning.plan import Machine, Plan

GB = 10**9
MOST_GPUS = 64


@dataclass
class Advice:
    """The least that would be needed, and single changes that would do."""

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
            f"The least of any option is {self.gpu_memory / GB:.1f} GB a GPU and {self.host_memory / GB:.1f} GB a node, "
            "margin included."
        )
        if not self.changes:
            return f"{needs} Neither smaller micro-batches nor up to {MOST_GPUS} GPUs would do."
        return f"{needs} It would fit with {', or with '.join(self.changes)}."


def advise(plan: Plan, again: Callable[[Machine, int | None], Plan]) -> Advice:
    """Tries fewer tokens, then more GPUs, by halves and doubles.

    Args:
        again: the same plan for another machine, and other `data.micro_batch_tokens` where they are given.
    """
    machine = plan.machine
    keep = 1 - machine.margin
    changes = []
    tokens = plan.config.data.micro_batch_tokens
    while (tokens := tokens // 2) >= plan.config.data.max_tokens:
        if again(machine, tokens).chosen is not None:
            changes.append(f"--batch_tokens {tokens}")
            break
    gpus = machine.gpus
    while (gpus := gpus * 2) <= min(MOST_GPUS, plan.config.data.batch_size):
        if again(dataclasses.replace(machine, gpus=gpus), None).chosen is not None:
            changes.append(f"--gpus {gpus}")
            break
    # With more of one memory alone: the least GPU among options whose node is large enough, and the other way round.
    within_host = [o.gpu for o in plan.options if o.host <= keep * machine.host_memory]
    if within_host:
        changes.append(f"--gpu_memory {min(within_host) / keep / GB:.1f}GB")
    within_gpu = [o.host for o in plan.options if o.gpu <= keep * machine.gpu_memory]
    if within_gpu:
        changes.append(f"--host_memory {min(within_gpu) / keep / GB:.1f}GB")
    least = (min(o.gpu for o in plan.options), min(o.host for o in plan.options))
    return Advice(int(least[0] / keep), int(least[1] / keep), changes)
