"""Several draws of z per sentence: which one is chosen, and what ZeRO 3 remembers."""

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from small_models import make_vae
from test_waits import make_engine, step
from torch.nn import functional as F

from dsvae.modeling.families import Gaussian
from dsvae.objective.elbo import Penalty


@pytest.mark.parametrize("family", ["gaussian", "spike_slab", "categorical"])
def test_draws_of_a_sentence_are_decoded_like_single_ones(family):
    model = make_vae(family=family).eval()
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
    labels = ids.masked_fill(ids == 0, -100)
    noise = torch.randn(2, 3, model.family.noise_width, generator=torch.Generator().manual_seed(1))
    given = {"labels": labels, "sentence_weights": torch.ones(2)}
    together = model(ids, (ids > 0).long(), noise=noise, **given)
    for draw in range(3):
        alone = model(ids, (ids > 0).long(), noise=noise[:, draw], labels=labels)
        nats = F.cross_entropy(alone.logits.transpose(1, 2), labels, reduction="none").sum(1)
        assert torch.allclose(together.nats.view(2, 3)[:, draw], nats, atol=1e-4)
        assert torch.allclose(together.latent.view(2, 3, -1)[:, draw], alone.latent, atol=1e-6)


def test_repeated_rows_stay_together():
    rows = Gaussian(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])).repeat(2)
    assert rows.mean[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert rows.logvar[:, 0].tolist() == [3.0, 3.0, 4.0, 4.0]


def test_zero_3_keeps_its_trace_of_the_modules(world, monkeypatch):
    """DeepSpeed fetches weights ahead by a trace of the modules of a step. A pass in
    another order makes it throw the trace away."""
    engine = make_engine(world, "zero3")
    thrown_away = []
    forget = PartitionedParameterCoordinator._invalidate_trace
    monkeypatch.setattr(
        PartitionedParameterCoordinator,
        "_invalidate_trace",
        lambda self: thrown_away.append(1) or forget(self),
    )
    for index in range(4):
        if index == 2:  # by then the trace is learned
            thrown_away.clear()
        engine.train_step(index, step(1, draws=3), Penalty(0.5, 0.5))
    coordinator = engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()
    assert coordinator.is_complete_trace()
    engine.close()
    assert thrown_away == []
