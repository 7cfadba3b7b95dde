"""Heads on the encoder besides the posterior's: a class, tags of words, clusters.

As in posterior.py, they compute in float32 and their outputs are plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsvae.modeling.crf import CRF
from dsvae.modeling.posterior import Float32Linear

OWN_WIDTH = 8
"""Numbers that the posterior reads of the sentence itself, past its cluster."""
CLUSTER_WIDTH = 32
"""Numbers that the posterior reads of the cluster."""


class ClassHead(nn.Module):
    """The logits of C classes, (B, C) float32, from a vector per sentence (B, d).

    `reconstruction_nats` of objective/elbo.py gives the nats of a label, with one position
    per sentence.
    """

    def __init__(self, d_model: int, classes: int) -> None:
        super().__init__()
        self.head = Float32Linear(d_model, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)


class TagHead(nn.Module):
    """The emissions of K tags, (B, S, K) float32, from the encoder's states (B, S, d).

    `crf` makes nats or tags of them. It is called from outside, and at ZeRO 3 its weights
    are there during its own calls alone.

    Args:
        tags: the K names, in IOB2.
    """

    def __init__(self, d_model: int, tags: Sequence[str]) -> None:
        super().__init__()
        self.head = Float32Linear(d_model, len(tags))
        self.crf = CRF(tags)

    def forward(self, states: Tensor) -> Tensor:
        return self.head(states)


class ClusterHead(nn.Module):
    """The parameters of q(z|x), (B, P), and the probabilities of R clusters, (B, R), from
    a vector per sentence h (B, d); both float32 (after Yuan & Eldardiry 2021).

        r = softmax(W h)
        parameters = head([V h ; r E]),    V: d to `OWN_WIDTH`,  E: R to `CLUSTER_WIDTH`

    The cluster has no prior and no KL. If `head` read all of h, z would not need the
    cluster and it would stay noise. So h itself passes through a few numbers alone, and
    what more z has to know of the sentence is cheapest to say by its cluster.
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
