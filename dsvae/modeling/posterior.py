"""From encoder states to the parameters of q(z|x): pooling, and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


OWN_WIDTH = 8
"""Numbers that the posterior reads of the sentence itself, past its cluster."""
CLUSTER_WIDTH = 32
"""Numbers that the posterior reads of the cluster."""


class ClusterHead(nn.Module):
    """The parameters of q(z|x), (B, P), and the probabilities of R clusters, (B, R),
    from a vector per sentence h (B, d); both float32 (after Yuan & Eldardiry 2021).

        r = softmax(W h)
        parameters = head([V h ; r E]),    V: d to `OWN_WIDTH`,  E: R to `CLUSTER_WIDTH`

    The cluster has no prior and no KL. If `head` read all of h, z would not need the
    cluster and it would stay noise. So h itself passes through a few numbers alone.
    What else z has to know of the sentence is cheapest to say through its cluster.
    """

    def __init__(self, d_model: int, clusters: int, parameter_width: int) -> None:
        super().__init__()
        self.clusters = Float32Linear(d_model, clusters)
        self.own = Float32Linear(d_model, OWN_WIDTH)
        # A row of E per cluster is a column of this weight.
        self.embedding = Float32Linear(clusters, CLUSTER_WIDTH, bias=False)
        self.head = Float32Linear(OWN_WIDTH + CLUSTER_WIDTH, parameter_width)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.clusters(pooled).softmax(-1)
        read = torch.cat([self.own(pooled), self.embedding(probabilities)], dim=-1)
        return self.head(read), probabilities


class PosteriorHead(nn.Module):
    """The parameters of q(z|x), (B, P) float32, from the encoder's states: pooling, and
    a linear head or a `ClusterHead`.

    The model calls its two parts one after the other, because other heads read what
    `pooling` returns. Outputs are plain tensors and not yet distributions. ZeRO-3 looks
    for the tensors whose backward needs these weights only in tuples, lists and dicts.

    Args:
        clusters: R of the `ClusterHead`; 0: a linear head.
    """

    def __init__(self, d_model: int, parameter_width: int, pooling: str, clusters: int) -> None:
        super().__init__()
        self.pooling = Pooling(pooling, d_model)
        self.head: nn.Module = (
            ClusterHead(d_model, clusters, parameter_width)
            if clusters
            else Float32Linear(d_model, parameter_width)
        )
