"""From encoder states to the parameters of q(z|x): pooling, and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOLINGS = ("mean", "max", "first", "attention")


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of its weights, its
    input or the autocast around it."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class Pooling(nn.Module):
    """Encoder states (B, S, d) to one vector per sentence (B, d), float32, without the
    padding.

    `mean` and `max` go over the tokens of the sentence, `first` takes the first token,
    and `attention` is a learned softmax over the tokens.
    """

    def __init__(self, kind: str, d_model: int) -> None:
        super().__init__()
        if kind not in POOLINGS:
            raise ValueError(f"pooling {kind!r} is not one of {', '.join(POOLINGS)}")
        self.kind = kind
        if kind == "attention":
            self.score = Float32Linear(d_model, 1, bias=False)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        states = states.float()
        mask = attention_mask.bool().unsqueeze(-1)  # (B, S, 1)
        if self.kind == "mean":
            return states.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
        if self.kind == "max":
            return states.masked_fill(~mask, float("-inf")).amax(1)
        if self.kind == "first":
            first = mask.squeeze(-1).to(torch.int8).argmax(1)  # left padding included
            return states[torch.arange(states.shape[0], device=states.device), first]
        weights = self.score(states).masked_fill(~mask, float("-inf")).softmax(1)  # (B, S, 1)
        return (weights * states.masked_fill(~mask, 0.0)).sum(1)


class PosteriorHead(nn.Module):
    """Pools the encoder's states and maps them to the parameters of q(z|x), (B, P)
    float32.

    The output is a plain tensor and not yet a distribution. ZeRO-3 looks for the tensors
    whose backward needs these weights only in tuples, lists and dicts.
    """

    def __init__(self, d_model: int, parameter_width: int, pooling: str) -> None:
        super().__init__()
        self.pooling = Pooling(pooling, d_model)
        self.head = Float32Linear(d_model, parameter_width)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pooling(states, attention_mask))
