"""From encoder states to a distribution over the latent: pooling, and the Gaussian
family.

A latent family owns its posterior, its prior, its sample and its KL. Everything outside
this module sees only the methods of `Gaussian`, so that another family can stand in its
place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOLINGS = ("mean", "max", "first", "attention")


@dataclass(frozen=True)
class Gaussian:
    """A batch of diagonal Gaussians q(z|x) = N(mean, diag(exp(logvar))) with the prior
    N(0, I). All in float32."""

    mean: Tensor
    """(B, Z)"""
    logvar: Tensor
    """(B, Z), natural logarithm of the variance."""

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> Gaussian:
        """From the head's output (B, 2Z): means, then log-variances."""
        mean, logvar = parameters.float().chunk(2, dim=-1)
        return cls(mean, logvar)

    @staticmethod
    def from_prior(noise: Tensor) -> Tensor:
        """Draws from the prior, (N, Z), of standard normal `noise` (N, Z)."""
        return noise

    @property
    def parameters(self) -> Tensor:
        """(B, 2Z), the inverse of `from_parameters`."""
        return torch.cat([self.mean, self.logvar], dim=-1)

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise, (B, Z), for standard normal `noise` (B, Z) (Kingma &
        Welling 2014)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL(q(z|x) || p(z)) of every dimension, (B, Z), in nats; closed form, never
        negative."""
        # Near the prior exp(logvar) - 1 would cancel, and round the KL below 0.
        return 0.5 * (self.mean.square() + torch.expm1(self.logvar) - self.logvar)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z_i|x_i) in nats, (B,), for z (B, Z)."""
        squared = (z - self.mean).square() * torch.exp(-self.logvar)
        return -0.5 * (squared + self.logvar + math.log(2 * math.pi)).sum(-1)

    def pairwise_log_prob(self, z: Tensor) -> Tensor:
        """log q(z_j|x_i) in nats for every pair, (J, B), for z (J, Z).

        The square is expanded into matrix products, in float64 because its terms
        cancel.
        """
        mean, logvar, z = self.mean.double(), self.logvar.double(), z.double()
        precision = torch.exp(-logvar)  # (B, Z)
        # (B,)
        constant = (mean.square() * precision + logvar).sum(-1) + mean.shape[-1] * math.log(
            2 * math.pi
        )
        squared = z.square() @ precision.T - 2 * (z @ (mean * precision).T)  # (J, B)
        return -0.5 * (squared + constant)

    @staticmethod
    def log_prior(z: Tensor) -> Tensor:
        """log p(z) in nats, (B,), for z (B, Z)."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of its weights, its
    input or the autocast around it."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class Pooling(nn.Module):
    """Encoder states (B, S, d) to one vector a sentence (B, d), float32; padding never
    takes part.

    `mean` and `max` go over the sentence's own tokens, `first` takes the first token,
    `attention` is a learned softmax over the tokens.
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


class GaussianPosterior(nn.Module):
    """Pools the encoder's states and maps them to the parameters of q(z|x), (B, 2Z)
    float32.

    The output is a plain tensor, and not yet a `Gaussian`, because ZeRO-3 finds the
    tensors whose backward needs these weights by walking through tuples, lists and
    dicts only.
    """

    def __init__(self, d_model: int, latent_dim: int, pooling: str) -> None:
        super().__init__()
        self.pooling = Pooling(pooling, d_model)
        self.head = Float32Linear(d_model, 2 * latent_dim)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pooling(states, attention_mask))
