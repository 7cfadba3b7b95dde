"""The standard deviation of z while it trains, and the encoder that z is kept near."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsvae.engine.ds_config import parameter_dtype
from dsvae.modeling.families import present
from dsvae.modeling.t5_vae import T5VAE
from dsvae.modeling.weight_source import Origin, slots
from dsvae.parallel.world import World

DECAY = 0.99
"""Share of the sums of the earlier steps that stays at each step."""


class Spread:
    """The standard deviation of each number of z, (Z,), over the last steps.

    All ranks have the same sums of each optimizer step: how many texts have the number,
    and the sums of it and of its square, in float64. Vectors that a text lacks do not
    count.

    Args:
        width: Z. vectors: K.
        state: of `state` of an earlier one. None: no text was seen.
    """

    def __init__(
        self, width: int, vectors: int, world: World, state: list[list[float]] | None = None
    ) -> None:
        given = torch.zeros(3, width) if state is None else torch.tensor(state, dtype=torch.float64)
        self._sums = given.to(world.device, torch.float64)
        self._step = torch.zeros_like(self._sums)
        self._vectors, self._world = vectors, world

    def state(self) -> list[list[float]]:
        """Returns what a checkpoint keeps."""
        return self._sums.tolist()

    def std(self) -> Tensor:
        """Returns the standard deviations, (Z,) float32; 0 for a number that was not
        seen."""
        count, total, squares = self._sums
        count = count.clamp(min=1e-9)
        return (squares / count - (total / count).square()).clamp(min=0.0).sqrt().float()

    @torch.no_grad()
    def count(self, latent: Tensor, weight: Tensor) -> None:
        """Counts z (B, Z) of texts of these weights (B,), 0 for a filler."""
        z = latent.double()
        valid = torch.ones_like(z)
        if self._vectors > 1:
            valid *= present(z, self._vectors).repeat_interleave(z.shape[1] // self._vectors, 1)
        self._step += torch.einsum("b,nbz->nz", weight.double(), torch.stack([valid, z, z * z]))

    def end_step(self) -> None:
        """Adds the texts of a step to those before, unless some are not finite.
        Collective."""
        step = self._world.sum(self._step)
        self._sums = torch.where(step.isfinite().all(), DECAY * self._sums + step, self._sums)
        self._step = torch.zeros_like(self._sums)


class FrozenEncoder(nn.Module):
    """The encoder of a model as a run starts from it, whole on every rank, outside of
    DeepSpeed. Collective.

    Args:
        origin: the source of its weights, on rank 0.
    """

    def __init__(
        self, config: Any, origin: Origin | None, world: World, ds_config: dict[str, Any]
    ) -> None:
        super().__init__()
        base = config.backbone
        self.config = config
        name = "encoder_embedding" if base.own_embeddings else "shared"
        self.add_module(name, nn.Embedding(base.vocabulary, base.encoder_width))
        stack: Any = base.encoder()
        attention = config._attn_implementation or next(iter(base.attentions))
        stack.config._attn_implementation = base.attentions[attention][0]
        self.encoder = stack
        self.to(world.device, parameter_dtype(ds_config)).eval()
        for name, parameter, put in list(slots(self)):
            value = torch.zeros_like(parameter)
            if origin is not None:
                value.copy_(origin.tensor(name))
            put(nn.Parameter(world.sum(value), requires_grad=False))

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the states, (B, S, d)."""
        encode: Any = T5VAE._encode
        return encode(self, input_ids, attention_mask).last_hidden_state
