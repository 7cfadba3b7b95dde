"""Densities over z that were fitted to draws of the aggregate posterior.

Each has a log-density, and turns standard normal noise into samples, as the families
do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYERS, HIDDEN = 8, 128
"""Couplings of a new `Flow`, and the width of their networks."""

BOUND = 2.0
"""The largest logarithm of a scale in a `Coupling`, so that no step can overflow."""


@dataclass(frozen=True)
class GaussianMixture:
    """K Gaussians with full covariances, in float64. A single Gaussian has K = 1."""

    weights: Tensor
    """(K,), their sum is 1."""
    means: Tensor
    """(K, Z)"""
    factors: Tensor
    """(K, Z, Z), the lower Cholesky factors of the covariances."""

    @property
    def latent_width(self) -> int:
        """Z."""
        return self.means.shape[1]

    @property
    def noise_width(self) -> int:
        """E = 1 + Z: a number for the choice of the Gaussian, and one per dimension."""
        return 1 + self.latent_width

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p(z) in nats, (B,) float64, for z (B, Z)."""
        parts = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors, strict=True):
            white = torch.linalg.solve_triangular(factor, (z.double() - mean).T, upper=False).T
            parts.append(weight.log() + _standard_normal(white) - factor.diagonal().log().sum())
        return torch.stack(parts).logsumexp(0)

    def sample(self, noise: Tensor) -> Tensor:
        """Returns z (B, Z) float32 from standard normal `noise` (B, E)."""
        choice, noise = noise.double().split([1, self.latent_width], dim=1)
        bounds = self.weights.cumsum(0)[:-1]
        chosen = torch.bucketize(torch.special.ndtr(choice[:, 0]), bounds)
        moved = (self.factors[chosen] @ noise[..., None])[..., 0]
        return (self.means[chosen] + moved).float()

    def tensors(self) -> dict[str, Tensor]:
        """Returns what `mixture` takes."""
        return {"weights": self.weights, "means": self.means, "factors": self.factors}


class Coupling(nn.Module):
    """One affine coupling layer: half of the numbers decide how the others are shifted
    and scaled (Dinh et al. 2017).

    Args:
        order: (Z,), how the numbers are rearranged before; the first Z // 2 are kept.
    """

    order: Tensor

    def __init__(self, order: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.kept = len(order) // 2
        last = nn.Linear(hidden, 2 * (len(order) - self.kept))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(self.kept, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result (B, Z), and log |det| of its Jacobian, (B,)."""
        kept, moved = z[:, self.order].tensor_split([self.kept], dim=1)
        shift, log_scale = self._moves(kept)
        return torch.cat([kept, (moved - shift) * (-log_scale).exp()], 1), -log_scale.sum(1)

    def inverse(self, result: Tensor) -> Tensor:
        """Returns the input from which `forward` makes `result` (B, Z)."""
        kept, moved = result.tensor_split([self.kept], dim=1)
        shift, log_scale = self._moves(kept)
        return torch.cat([kept, moved * log_scale.exp() + shift], 1)[:, self.order.argsort()]

    def _moves(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.network(kept).chunk(2, dim=1)
        return shift, BOUND * torch.tanh(raw / BOUND)


class Flow(nn.Module):
    """A real NVP (Dinh et al. 2017): z is whitened with a Gaussian, then goes through
    couplings to standard normal noise. A new one is that Gaussian.

    Args:
        mean: (Z,) of the Gaussian.
        factor: (Z, Z), the lower Cholesky factor of its covariance.
        layers: number of couplings.
        hidden: width of their networks.
    """

    mean: Tensor
    factor: Tensor

    def __init__(
        self, mean: Tensor, factor: Tensor, layers: int = LAYERS, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("factor", factor.float())
        width = len(mean)
        # Every second layer moves what the one before it has kept.
        swap = torch.arange(width).roll(-(width // 2))
        orders = [swap if i % 2 else torch.randperm(width) for i in range(layers)]
        self.couplings = nn.ModuleList(Coupling(order.clone(), hidden) for order in orders)

    @property
    def latent_width(self) -> int:
        """Z."""
        return len(self.mean)

    @property
    def noise_width(self) -> int:
        """E = Z."""
        return self.latent_width

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the noise of z, (B, Z), and log |det| of its Jacobian, (B,)."""
        centred = z.to(self.mean) - self.mean
        noise = torch.linalg.solve_triangular(self.factor, centred.T, upper=False).T
        log_det = -self.factor.diagonal().log().sum().expand(len(z))
        for coupling in self.couplings:
            noise, more = coupling(noise)
            log_det = log_det + more
        return noise, log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p(z) in nats, (B,), for z (B, Z)."""
        noise, log_det = self(z)
        return _standard_normal(noise) + log_det

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Returns z (B, Z) float32 from standard normal `noise` (B, E): the inverse of
        `forward`."""
        z = noise.to(self.mean)
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, Coupling)
            z = coupling.inverse(z)
        return (self.mean + z @ self.factor.T).float()

    def tensors(self) -> dict[str, Tensor]:
        """Returns what `flow_of` takes."""
        return self.state_dict()


Density = GaussianMixture | Flow


def flow_of(tensors: dict[str, Tensor]) -> Flow:
    """Returns the flow that has these `tensors`. Raises KeyError or RuntimeError for
    others."""
    layers = len([name for name in tensors if name.endswith(".order")])
    hidden = len(tensors["couplings.0.network.0.bias"])
    flow = Flow(tensors["mean"], tensors["factor"], layers, hidden)
    flow.load_state_dict(tensors)
    return flow.requires_grad_(False)


def _standard_normal(x: Tensor) -> Tensor:
    """Returns log N(x; 0, I) in nats, (B,), for x (B, Z)."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))
