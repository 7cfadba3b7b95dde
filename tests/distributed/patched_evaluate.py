"""`dsvae` with a fault of rank 1 built in, which the environment names.

FAULT=load: the rank finds no weights. FAULT=error: in the middle of the measurements it
lacks memory, as torch says it. FAULT=killed: there the kernel ends it. FAULT=gpu: it
has a LOCAL_RANK that its node has no GPU for.
"""

import os
import signal
import sys

import torch

from dsvae import cli, pretrained
from dsvae.errors import UserError
from dsvae.parallel import world
from dsvae.reports import evaluation

fault = os.environ["FAULT"]


def no_weights(*args, **kwargs):
    raise UserError("model: no weights")


def no_memory(*args, **kwargs):
    raise RuntimeError("out of memory")


def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ["RANK"] == "1":
    if fault == "load":
        pretrained.load = no_weights
    elif fault == "error":
        evaluation.fidelity = no_memory
    elif fault == "killed":
        evaluation.fidelity = killed
    elif fault == "gpu":
        world.local_device = lambda local_rank: torch.device("cuda", local_rank)
        torch.accelerator.device_count = lambda: 1
sys.exit(cli.main())
