"""A prior over z by flow matching (Lipman et al. 2023; Liu et al. 2023).

Data u are the vectors of z, normalized; n is noise from N(0, I). A path goes from noise
to data along a line, u_t = (1 - t) n + t u, t from 0 to 1. The field v(u_t, t) that is
nearest to u - n in squared error is E[u - n | u_t]. To follow it from n to t = 1 is to
draw from the distribution of the data.

The `Denoiser` is such a field: a transformer over the vectors of a text. A model has it
as a part, and the phase `prior` trains it alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsvae.modeling.families import masked
from dsvae.modeling.settings import DenoiserConfig, convert, declared

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Solver = Literal["euler", "heun"]
"""How a path is followed. euler: the field at the start of each step. heun: the mean of
those at both ends, twice the work per step, and an error that falls with the square of
the steps."""

Field = Callable[[Tensor, float, Tensor | None], Tensor]
"""Maps u_t, t, and the last estimate of u or None, to the velocity."""

HEAD_WIDTH = 64
"""Width of a head of attention, at most."""
FREQUENCIES = 64
"""Sines, and as many cosines, that tell the time."""


CHOICES = 3
"""Numbers of the noise of a step, besides those of n, that become its random choices."""


@dataclass
class DenoiserFields(DenoiserConfig):
    """What a model's config.json says of its denoiser."""

    classes: list[str] = field(default_factory=list)
    """The names of the classes that it can be asked for; empty: none."""
    class_vector_counts: list[list[int]] = field(default_factory=list)
    """How many training texts of each class have 1, 2, .. K vectors. Empty: the texts of
    all classes have all."""
    conditional: bool = False
    """Whether it reads the encoder's states of a condition."""

    @classmethod
    def of(cls, given: dict[str, Any]) -> DenoiserFields:
        """Reads the fields of a config.json.

        Raises:
            ValueError: one is unknown, or does not fit.
        """
        kinds = declared(cls)
        if unknown := sorted(set(given) - set(kinds)):
            raise ValueError(f"denoiser has an unknown field {unknown[0]}")
        return cls(
            **{each: convert(given[each], kinds[each], f"denoiser.{each}") for each in given}
        )


class FlowDraws(NamedTuple):
    """What is random in a step of flow matching, for B texts."""

    noise: Tensor
    """(B, Z), n."""
    times: Tensor
    """(B,), t."""
    estimated: Tensor
    """(B,) boolean: the texts whose field reads an estimate of u."""
    conditioned: Tensor
    """(B,) boolean: the texts whose field reads the condition."""

    @classmethod
    def of(cls, noise: Tensor, *, logit_normal: bool = False, drop: float = 0.0) -> FlowDraws:
        """Makes them of standard normal noise (B, Z + `CHOICES`).

        Args:
            logit_normal: t is the logistic function of a normal number. Otherwise it is
                uniform.
            drop: the chance that a condition is hidden.
        """
        own, more = noise[:, :-CHOICES], noise[:, -CHOICES:]
        share = torch.special.ndtr(more.double())
        times = more[:, 0].sigmoid() if logit_normal else share[:, 0].float()
        return cls(own, times, share[:, 1] < 0.5, share[:, 2] >= drop)


class ZeroLinear(nn.Linear):
    """A linear layer that starts as zero."""


class Block(nn.Module):
    """Attention among the vectors of a text, to its condition, and a feed-forward. Each
    is residual; its scale, shift and gate depend on t and c, and the gate starts at zero
    (AdaLN-zero, Peebles & Xie 2023).

    Args:
        width: w.
        conditional: whether there is attention to a condition.
    """

    def __init__(self, width: int, conditional: bool) -> None:
        super().__init__()
        self.heads = max(n for n in range(1, max(1, width // HEAD_WIDTH) + 1) if width % n == 0)
        self.parts = 3 if conditional else 2
        self.modulation = ZeroLinear(width, 3 * self.parts * width)
        self.mixed = nn.Linear(width, 3 * width)
        self.mixed_output = nn.Linear(width, width)
        if conditional:
            self.query = nn.Linear(width, width)
            self.key_value = nn.Linear(width, 2 * width)
            self.read_output = nn.Linear(width, width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(
        self,
        vectors: Tensor,
        context: Tensor,
        mask: Tensor,
        states: Tensor | None,
        states_mask: Tensor | None,
    ) -> Tensor:
        """Returns vectors (B, n, w).

        Args:
            context: (B, w), made of t and c.
            mask: (B, 1, 1, n) boolean, the vectors that there are.
            states, states_mask: (B, C, w) and (B, 1, 1, C), of the condition.
        """
        chunks = self.modulation(F.silu(context)).unsqueeze(1).chunk(3 * self.parts, dim=-1)
        parts = [chunks[3 * i : 3 * i + 3] for i in range(self.parts)]

        def attended(given: list[Tensor], keys: Tensor | None) -> Tensor:
            query, key, value = (
                each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in given
            )
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=keys)
            return found.transpose(1, 2).flatten(2)

        scale, shift, gate = parts[0]
        mixed = self.mixed(_normalized(vectors) * (1 + scale) + shift)
        read = attended(list(mixed.chunk(3, dim=-1)), mask)
        vectors = vectors + gate * self.mixed_output(read)
        if states is not None:
            scale, shift, gate = parts[1]
            query = self.query(_normalized(vectors) * (1 + scale) + shift)
            read = attended([query, *self.key_value(states).chunk(2, dim=-1)], states_mask)
            vectors = vectors + gate * self.read_output(read)
        scale, shift, gate = parts[-1]
        inner = self.inner(_normalized(vectors) * (1 + scale) + shift)
        return vectors + gate * self.outer(F.gelu(inner, approximate="tanh"))


class Denoiser(nn.Module):
    """The velocity v of the vectors of B texts, (B, n, d) float32, n <= K.

    It knows t, how many vectors a text has, and the condition c: a class, the encoder's
    states of a text, both, or nothing.

    Args:
        config: of the model that it is a part of.
    """

    mean: Tensor
    """(Z,), of z in training."""
    std: Tensor
    """(Z,), its standard deviation."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        fields, vectors, width = config.denoiser, config.latent_vectors, config.denoiser["width"]
        self.classes, self.conditional = len(fields["classes"]), fields["conditional"]
        self.vectors, self.numbers = vectors, config.latent_dim
        # Values, also in a model that is made without them (on the meta device).
        numbers = vectors * config.latent_dim
        self.register_buffer("mean", torch.zeros(numbers, device="cpu"))
        self.register_buffer("std", torch.ones(numbers, device="cpu"))
        # u_t, and the estimate of u
        self.input = nn.Linear(2 * config.latent_dim, width)
        self.positions = nn.Embedding(vectors, width)
        self.counts = nn.Embedding(vectors, width)
        self.clock = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        if self.classes:
            self.labels = nn.Embedding(self.classes + 1, width)  # the last: no class
        if self.conditional:
            self.states = nn.Linear(config.backbone.encoder_width, width)
            self.nothing = nn.Embedding(1, width)  # what is read without a condition
        self.blocks = nn.ModuleList(Block(width, self.conditional) for _ in range(fields["layers"]))
        self.modulation = ZeroLinear(width, 2 * width)
        self.output = ZeroLinear(width, config.latent_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> Denoiser:
        """Moves the normalizer to other devices, and never to another dtype."""
        exact = {name: buffer.clone() for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def set_normalizer(self, values: dict[str, list[float]]) -> None:
        """Takes `mean` and `std`, Z numbers each."""
        for name in ("mean", "std"):
            getattr(self, name).copy_(torch.tensor(values[name]))

    def normalized(self, z: Tensor) -> Tensor:
        """Returns u (B, K, d) of z (B, Z)."""
        return ((z - self.mean) / self.std).unflatten(-1, (self.vectors, self.numbers))

    def raw(self, vectors: Tensor) -> Tensor:
        """Returns z (B, Z) of u (B, K, d), the inverse of `normalized`."""
        return vectors.flatten(1) * self.std + self.mean

    def forward(
        self,
        moved: Tensor,
        times: Tensor,
        valid: Tensor,
        *,
        estimate: Tensor | None = None,
        labels: Tensor | None = None,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
        conditioned: Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity at u_t, (B, n, d) float32; 0 for vectors that there are
        not.

        Args:
            moved: (B, n, d), u_t.
            times: (B,), t.
            valid: (B, n) boolean, the vectors that there are.
            estimate: (B, n, d), of u. None: 0.
            labels: (B,) int64, the class of each text; -100: none.
            states, states_mask: (B, C, encoder's width) and (B, C), of the condition.
            conditioned: (B,) boolean, the texts whose condition is read. None: all.
        """
        dtype, device = self.input.weight.dtype, moved.device
        there = valid.unsqueeze(-1)
        estimate = torch.zeros_like(moved) if estimate is None else estimate
        given = torch.cat([moved, estimate], dim=-1).masked_fill(~there, 0.0)
        places = torch.arange(moved.shape[1], device=device)
        vectors = self.input(given.to(dtype)) + self.positions(places)
        if conditioned is None:
            conditioned = torch.ones(len(moved), dtype=torch.bool, device=device)
        context = self.clock(_waves(times).to(dtype)) + self.counts(valid.sum(1).clamp(min=1) - 1)
        if self.classes:
            none = torch.full_like(valid.sum(1), self.classes)
            known = none if labels is None else torch.where(labels >= 0, labels, none)
            context = context + self.labels(torch.where(conditioned, known, none))
        read = read_mask = None
        if self.conditional:
            nothing = self.nothing(torch.zeros(len(moved), 1, dtype=torch.long, device=device))
            read, read_mask = nothing, torch.ones_like(nothing[..., 0], dtype=torch.bool)
            if states is not None and states_mask is not None:
                shown = states_mask.bool() & conditioned[:, None]
                read = torch.cat([nothing, self.states(states.to(dtype))], dim=1)
                read_mask = torch.cat([read_mask, shown], dim=1)
            read_mask = read_mask[:, None, None]
        mask = valid[:, None, None]
        for block in self.blocks:
            vectors = block(vectors, context, mask, read, read_mask)
        scale, shift = self.modulation(F.silu(context)).unsqueeze(1).chunk(2, dim=-1)
        found = self.output(_normalized(vectors) * (1 + scale) + shift)
        return found.float().masked_fill(~there, 0.0)


def initialize(module: nn.Module) -> None:
    """Draws the weights of one module of a denoiser."""
    if isinstance(module, ZeroLinear):
        module.weight.zero_()
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.zero_()


def flow_errors(
    denoiser: Denoiser, data: Tensor, valid: Tensor, draws: FlowDraws, **condition: Any
) -> Tensor:
    """Returns the squared error of the field, the sum over the numbers of each text, (B,)
    float32.

    A text whose field reads an estimate gets that of the same field without one (Chen et
    al. 2023).

    Args:
        data: u, (B, n, d).
        valid: (B, n) boolean, the vectors that there are.
        condition: arguments of `Denoiser.forward`.
    """
    noise = draws.noise.unflatten(-1, (denoiser.vectors, -1))[:, : data.shape[1]]
    times = draws.times[:, None, None]
    moved = (1 - times) * noise + times * data
    given = (moved, draws.times, valid)
    condition["conditioned"] = draws.conditioned
    with torch.no_grad():
        estimate = moved + (1 - times) * denoiser(*given, **condition)
        estimate = estimate * draws.estimated[:, None, None]
    velocity = denoiser(*given, estimate=estimate, **condition)
    errors = (velocity - (data - noise)).square().sum(-1)
    return errors.masked_fill(~valid, 0.0).sum(-1)


def follow(field: Field, noise: Tensor, steps: int, solver: Solver = "euler") -> Tensor:
    """Follows a field from noise, at t = 0, to t = 1, in equal steps.

    Args:
        noise: (B, ...).
    """
    moved, estimate = noise, None
    for step in range(steps):
        time, length = step / steps, 1 / steps
        velocity = field(moved, time, estimate)
        estimate = moved + (1 - time) * velocity
        if solver == "heun":
            ahead = field(moved + length * velocity, time + length, estimate)
            velocity = (velocity + ahead) / 2
        moved = moved + length * velocity
    return moved


def guided(denoiser: Denoiser, valid: Tensor, guidance: float, **condition: Any) -> Field:
    """Returns the field of B texts, v + (guidance - 1) (v - v_none), in which v_none knows
    no condition (Ho & Salimans 2022). With a guidance of 1 it is v.

    Args:
        valid: (B, n) boolean, the vectors that there are.
        condition: arguments of `Denoiser.forward`. None: v_none for any guidance.
    """

    def field(moved: Tensor, time: float, estimate: Tensor | None) -> Tensor:
        times = torch.full((len(moved),), time, device=moved.device)
        given = (moved, times, valid)
        velocity = denoiser(*given, estimate=estimate, **condition)
        if guidance == 1 or not condition:
            return velocity
        without = denoiser(*given, estimate=estimate)
        return without + guidance * (velocity - without)

    return field


def flow_noise_width(config: PreTrainedConfig) -> int:
    """Returns how many numbers of noise a draw from the prior takes: those of n, and one
    for the number of vectors."""
    return config.latent_vectors * config.latent_dim + 1


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser,
    config: PreTrainedConfig,
    noise: Tensor,
    *,
    steps: int = 50,
    solver: Solver = "euler",
    guidance: float = 1.0,
    label: int | None = None,
    states: Tensor | None = None,
    states_mask: Tensor | None = None,
) -> Tensor:
    """Draws z (B, Z) from the prior.

    Args:
        config: of the model.
        noise: (B, Z + 1), standard normal, on the device of the denoiser.
        steps, solver: how the field is followed.
        guidance: of the class and the condition, as of `guided`.
        label: a class.
        states, states_mask: of the condition of each.
    """
    counts = config.vector_counts
    if label is not None and config.denoiser["class_vector_counts"]:
        counts = config.denoiser["class_vector_counts"][label]
    own, last = noise[:, :-1], noise[:, -1:]
    valid = torch.ones(len(noise), denoiser.vectors, dtype=torch.bool, device=noise.device)
    if counts:
        total, left = sum(counts), itertools.accumulate(reversed(counts))
        chance = torch.tensor(list(left)[::-1], device=noise.device).double() / total
        valid = chance > torch.special.ndtr(last.double())
    condition: dict[str, Tensor] = {}
    if label is not None:
        condition["labels"] = torch.full((len(noise),), label, device=noise.device)
    if states is not None and states_mask is not None:
        condition |= {"states": states, "states_mask": states_mask}
    field = guided(denoiser, valid, guidance, **condition)
    found = follow(field, own.unflatten(-1, (denoiser.vectors, -1)), steps, solver)
    return masked(denoiser.raw(found), valid)


def _normalized(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])


def _waves(times: Tensor) -> Tensor:
    """Returns sines and cosines of t (B,), (B, 2 * `FREQUENCIES`), with periods from 2 pi
    to 0.006."""
    powers = torch.arange(FREQUENCIES, device=times.device) / FREQUENCIES
    angles = times.float()[:, None] * torch.exp(math.log(1000.0) * powers)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
