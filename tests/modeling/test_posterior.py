"""Pooling against loops."""

import torch

from dsvae.modeling.posterior import Pooling


def test_pooling_by_hand():
    states, mask = (
        torch.randn(3, 5, 8),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]),
    )
    for b in range(3):
        own = states[b][mask[b].bool()]
        torch.testing.assert_close(Pooling("mean", 8)(states, mask)[b], own.mean(0))
        torch.testing.assert_close(Pooling("max", 8)(states, mask)[b], own.max(0).values)
        torch.testing.assert_close(Pooling("first", 8)(states, mask)[b], own[0])
        attention = Pooling("attention", 8)
        weights = (own @ attention.score.weight[0]).softmax(0)
        torch.testing.assert_close(attention(states, mask)[b], weights @ own)
