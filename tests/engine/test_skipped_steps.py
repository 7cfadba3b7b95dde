"""A number that is not finite, anywhere in the gradients, and what it costs to look for it."""

from collections import Counter

import pytest
import torch
from launch import CONFIGS
from small_models import make_vae
from test_waits import step
from torch.utils._python_dispatch import TorchDispatchMode

from dsvae.config import Phase2Config, RunConfig
from dsvae.engine import ds_config
from dsvae.engine.engine import PhaseEngine
from dsvae.engine.weights import full_weights
from dsvae.objective.elbo import Penalty
from dsvae.phases import Phase

PENALTY = Penalty(0.5)


def make_engine(world, name, precision):
    phase = Phase2Config(lr=1e-3, warmup_steps=4)
    resolved = ds_config.resolve(
        ds_config.load(CONFIGS / f"{name}.json"),
        phase=phase,
        precision=precision,
        batch_size=8,
        micro_batches=2,
        world_size=1,
        bf16_supported=True,
        fp16_supported=False,
    )
    run = Phase(2, RunConfig(phase2=phase), 0)
    return PhaseEngine(make_vae(), world, run, resolved, origin=None)


def weights(engine, world):
    found = full_weights(engine.module, engine.origin, world)
    return {name: tensor.clone() for name, tensor in found}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("zero0", "fp32"),
        ("zero1", "fp32"),
        ("zero1", "bf16"),
        ("zero2", "fp32"),
        ("zero2", "bf16"),
        ("zero2_offload", "fp32"),
        ("zero2_offload", "bf16"),
        ("zero3", "bf16"),
        ("zero3_offload", "bf16"),
    ],
)
def test_one_number_that_is_not_finite_skips_the_step(world, name, precision):
    engine = make_engine(world, name, precision)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    places = [(parameters[0], 0, "inf"), (parameters[-1], -1, "-inf")]
    places += [(parameters[len(parameters) // 2], 0, "nan")]
    engine.train_step(0, step(2), PENALTY)
    for index, (parameter, place, value) in enumerate(places, start=1):
        before, lr = weights(engine, world), engine.lr

        def spoil(gradient, place=place, value=value):
            spoilt = gradient.clone()
            spoilt.flatten()[place] = float(value)
            return spoilt

        hook = parameter.register_hook(spoil)
        assert engine.train_step(index, step(2), PENALTY).skipped
        hook.remove()
        assert engine.skipped_steps == index
        assert engine.lr > lr  # the warm-up continues
        after = weights(engine, world)
        assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not engine.train_step(4, step(2), PENALTY).skipped
    moved = weights(engine, world)
    assert any(not torch.equal(moved[key], value) for key, value in after.items())
    assert all(tensor.isfinite().all() for tensor in moved.values())
    engine.close()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func] += 1
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_looked_at_by_itself(world, monkeypatch):
    """After the backward passes, the norm and the copies of zero2 take 10 operations per
    gradient. DeepSpeed's own look would take 13 more."""
    engine = make_engine(world, "zero2", "bf16")
    gradients = sum(p.requires_grad for p in engine.module.parameters())
    engine.train_step(0, step(2), PENALTY)
    calls, update = Calls(), engine._update

    def counted():
        with calls:
            return update()

    monkeypatch.setattr(engine, "_update", counted)
    engine.train_step(1, step(2), PENALTY)
    engine.close()
    assert calls.found.total() < 12 * gradients


def test_with_offloaded_states_the_host_waits_once_per_gradient(world):
    """For its norm; DeepSpeed's own look would make it wait once more."""
    engine = make_engine(world, "zero2_offload", "bf16")
    gradients = sum(p.requires_grad for p in engine.module.parameters())
    engine.train_step(0, step(2), PENALTY)
    with Calls() as calls:
        engine.train_step(1, step(2), PENALTY)
    engine.close()
    assert calls.found[torch.ops.aten._local_scalar_dense.default] < 1.2 * gradients
