"""DeepSpeed's view of the process group."""

from __future__ import annotations

import deepspeed
from torch.distributed import distributed_c10d

from dsvae.parallel.world import TIMEOUT, World


def lend_to_deepspeed(world: World) -> None:
    """Lets DeepSpeed use the process group that the ranks have joined.

    Must come before anything of DeepSpeed that is collective. Repeating it changes
    nothing.
    """
    if world.device.type == "cpu":
        # A kernel for tensor-parallel inference. Training never calls it, and loading it
        # would take a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed clones the group of the ranks, for nearly all of its operations, and gives the
    # clone no time limit: it would have torch's, 10 minutes with NCCL.
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, default, TIMEOUT)
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
