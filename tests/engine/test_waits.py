"""How often a training step makes the host wait for the device."""

import dataclasses
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from launch import CONFIGS
from small_models import make_vae
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

import dsvae
from dsvae.config import Phase2Config, RunConfig
from dsvae.data.batches import MicroBatch, Step
from dsvae.engine import ds_config
from dsvae.engine.engine import PhaseEngine
from dsvae.objective.elbo import Penalty
from dsvae.parallel.stopping import Stopping
from dsvae.parallel.world import TIMEOUT
from dsvae.phases import Phase

OURS, DEEPSPEED = Path(dsvae.__file__).parent, Path(deepspeed.__file__).parent


class Waits(TorchDispatchMode):
    """Counts where the value of a tensor is asked for: `item`, `float`, `bool` of it."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            owners = [f for f in files if f.is_relative_to(OURS) or f.is_relative_to(DEEPSPEED)]
            self.found["dsvae" if owners[-1].is_relative_to(OURS) else "deepspeed"] += 1
        return func(*args, **(kwargs or {}))


def step(micro_batches, draws=1):
    """Sentences of 3 to 6 tokens; one is padded."""
    torch.manual_seed(1)
    made = []
    for width in range(3, 3 + micro_batches):
        ids = torch.randint(3, 60, (4, width + 1))
        ids[-1, -1] = 0
        mask = (ids != 0).long()
        noise = torch.randn(4, draws, 6)
        labels = ids.masked_fill(ids == 0, -100)
        made.append(MicroBatch(ids, mask, labels, noise, torch.ones(4), np.arange(4)))
    return Step(made, 4 * micro_batches, 99)


def make_engine(world, name, precision="fp32", micro_batches=1):
    phase = Phase2Config(lr=1e-3, free_bits=0.5)
    resolved = ds_config.resolve(
        ds_config.load(CONFIGS / f"{name}.json"),
        phase=phase,
        precision=precision,
        batch_size=4 * micro_batches,
        micro_batches=micro_batches,
        world_size=1,
        bf16_supported=True,
        fp16_supported=False,
    )
    return PhaseEngine(
        make_vae(), world, Phase(2, RunConfig(phase2=phase), 0), resolved, origin=None
    )


@pytest.mark.parametrize(
    ("name", "precision", "ours", "theirs"),
    [
        ("zero0", "fp32", 1, 0),  # the norm
        ("zero1", "fp32", 0, 3),
        ("zero1", "bf16", 0, 2),
        ("zero2", "bf16", 0, 3),
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_waits_do_not_grow_with_the_micro_batches(
    world, name, precision, ours, theirs, micro_batches
):
    engine = make_engine(world, name, precision, micro_batches)
    engine.train_step(0, step(micro_batches), Penalty(0.5, 0.5))  # makes AdamW's states
    with Waits() as waits:
        engine.train_step(1, step(micro_batches), Penalty(0.5, 0.5))
        Stopping().agreed(world)
    engine.close()
    assert waits.found["dsvae"] == ours
    assert waits.found["deepspeed"] <= theirs


class Others:
    """A watchdog that knows whether this rank says that it waits for others."""

    waits = False

    @contextmanager
    def waiting(self):
        self.waits = True
        yield
        self.waits = False

    def heartbeat(self, where):
        pass

    suspend_hang_detection = nullcontext


def test_the_norm_at_zero_0_is_known_as_a_wait_for_others(world, monkeypatch):
    """On GPUs it is the first line that needs the all-reduced gradients, and the watchdog
    looks for lost ranks only while this rank waits for them."""
    others, waited = Others(), []
    engine = make_engine(dataclasses.replace(world, watchdog=others), "zero0")
    to_number = torch.Tensor.__float__
    monkeypatch.setattr(
        torch.Tensor, "__float__", lambda self: waited.append(others.waits) or to_number(self)
    )
    engine.train_step(0, step(1), Penalty(0.5, 0.5))
    engine.close()
    assert waited == [True]
    assert not others.waits


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_the_groups_of_deepspeed_have_the_time_limit_of_the_run(world, name):
    engine = make_engine(world, name)
    deepspeed = engine.deepspeed
    groups = [deepspeed.data_parallel_group, deepspeed.seq_data_parallel_group]
    if name != "zero0":
        groups.append(deepspeed.optimizer.dp_process_group)
    limits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    engine.close()
    assert limits == {TIMEOUT}
    # Of a group on GPUs without a limit of its own.
    assert distributed_c10d._get_default_timeout("nccl") == TIMEOUT
