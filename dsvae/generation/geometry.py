"""Paths and directions in the latent space, for the latents of any continuous
family."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvae.generation.options import PathKind
from dsvae.modeling.settings import convert

_PARALLEL = 1e-6  # sine of an angle below which two directions define no great circle


def interpolate(a: Tensor, b: Tensor, steps: int, path: PathKind = "linear") -> Tensor:
    """Computes `steps` points from `a` to `b` (Z,), both included and equally spaced,
    (steps, Z).

    Args:
        steps: at least 2.
        path: linear, the straight line; slerp, see `slerp`.

    Raises:
        ValueError: fewer than 2 steps, or another path.
    """
    if steps < 2:
        raise ValueError(f"a path needs at least 2 steps, not {steps}")
    along = slerp if convert(path, PathKind, "path") == "slerp" else torch.lerp
    return torch.stack([along(a, b, torch.tensor(i / (steps - 1))) for i in range(steps)])


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Computes the point at `t` in [0, 1] on the great circle from `a` to `b` (Z,)
    (Shoemake 1985; White 2016).

    The direction turns at constant speed while the norm changes linearly from |a| to
    |b|. Points between typical draws of a high-dimensional prior thus stay at typical
    distances from its centre, while a straight line passes close to it. If the two
    directions define no great circle (parallel, opposite, or a zero vector), the path is
    the straight line.
    """
    norm_a, norm_b = a.norm(), b.norm()
    if norm_a == 0 or norm_b == 0:
        return torch.lerp(a, b, t)
    unit_a, unit_b = a / norm_a, b / norm_b
    # Half-angle form: the arc cosine of the inner product loses half of its digits for
    # close directions.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(), (unit_a + unit_b).norm())
    sine = torch.sin(angle)
    if sine < _PARALLEL:
        return torch.lerp(a, b, t)
    direction = (torch.sin((1 - t) * angle) * unit_a + torch.sin(t * angle) * unit_b) / sine
    return torch.lerp(norm_a, norm_b, t) * direction


def analogy(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Computes b - a + c: what is to c as b is to a (Mikolov et al. 2013), all (Z,)."""
    return b - a + c
