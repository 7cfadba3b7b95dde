"""The optimizer's groups: weight decay, and learning rates by the size of a tensor."""

import pytest
import torch
from small_models import make_vae

from dsvae.engine.weights import measure_lr_scales, parameter_groups
from dsvae.parallel.world import World

WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def model():
    return make_vae("t5 v1.1")


def test_a_tensor_is_scaled_by_its_rms_within_the_width_of_a_group(model):
    model.shared.weight.requires_grad_(False)
    torch.nn.init.zeros_(model.posterior.head.bias)
    scales = measure_lr_scales(model, None, WORLD)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert scales.keys() == trained.keys()
    for name, parameter in trained.items():
        rms = max(1e-3, parameter.detach().square().mean().sqrt().item())
        assert scales[name] == pytest.approx(rms, rel=1.25**0.5 - 1 + 1e-6), name
    # few sizes, as a T5 is drawn, and more than one
    assert 1 < len(set(scales.values())) < len(scales) / 2
    assert scales["posterior.head.bias"] == 1e-3


def test_like_tensors_share_a_group_unless_their_decay_differs(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
        model.lm_head.weight.fill_(0.6)
        model.shared.weight.fill_(0.7)
    groups = parameter_groups(model, 0.1, measure_lr_scales(model, None, WORLD))
    found = {(group.weight_decay, round(group.lr_scale, 6)): group.names for group in groups}
    assert len(found) == len(groups)
    # 0.5 and 0.6 lie within a factor of 1.25, and 0.7 does not
    assert found.keys() == {(0.1, round(0.3**0.5, 6)), (0.0, round(0.3**0.5, 6)), (0.0, 0.7)}
    assert found[0.0, 0.7] == ["shared.weight"]
    assert sorted(sum(found.values(), [])) == sorted(n for n, _ in model.named_parameters())


def test_without_scales_there_are_two_groups(model):
    matrices, others = parameter_groups(model, 0.1)
    assert (matrices.weight_decay, others.weight_decay) == (0.1, 0.0)
    assert matrices.lr_scale == others.lr_scale == 1.0
