"""How z enters the decoder. An injection owns its weights and what it adds to the
decoder's call.

`forward(latent, embeddings)` takes z (B, Z) and the decoder's input embeddings (B, T,
d). It returns the embeddings to use, and the keyword arguments that the decoder's
attention gets with them. z is the only way from the sentence to the decoder.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from dsvae.modeling.backbone import T5Backbone

INJECTIONS = ("memory", "embedding", "both", "cross", "none")


class MemoryInjection(nn.Module):
    """Key/value slots in every decoder self-attention layer, linear in z.

    This is the memory scheme of Optimus (Li et al. 2020).
    """

    def __init__(self, backbone: T5Backbone, latent_width: int, slots: int) -> None:
        super().__init__()
        heads, width = backbone.key_value_heads, backbone.head_width
        # (L, keys and values, M, H, D)
        self.shape = (backbone.decoder_layers, 2, slots, heads, width)
        self.projection = nn.Linear(latent_width, math.prod(self.shape))

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.projection(latent.to(self.projection.weight.dtype))
        # The batch stays the outermost axis. A reshape that moves it would mix the
        # sentences of a batch.
        return embeddings, {"latent_memory": memory.view(-1, *self.shape)}


class EmbeddingInjection(nn.Module):
    """A vector linear in z, added to every input embedding of the decoder.

    This is the embedding scheme of Optimus.
    """

    def __init__(self, backbone: T5Backbone, latent_width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(latent_width, backbone.decoder_width)

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        added = self.projection(latent.to(self.projection.weight.dtype))
        return embeddings + added.unsqueeze(1).to(embeddings.dtype), {}


class CrossInjection(nn.Module):
    """M vectors linear in z, for the cross-attention that the decoder was pretrained
    with.

    They are normalized as the encoder normalizes its states, which they stand for.
    """

    def __init__(self, backbone: T5Backbone, latent_width: int, vectors: int) -> None:
        super().__init__()
        self.shape = (vectors, backbone.encoder_width)  # (M, d)
        self.projection = nn.Linear(latent_width, math.prod(self.shape))
        self.layer_norm = backbone.norm()

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self.projection(latent.to(self.projection.weight.dtype))
        normalized = self.layer_norm(vectors.view(-1, *self.shape))
        return embeddings, {"encoder_hidden_states": normalized.to(embeddings.dtype)}


class NoInjection(nn.Module):
    """Nothing enters. The decoder is a plain language model, the baseline for the
    perplexity of a VAE."""

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return embeddings, {}


class JointInjection(nn.Module):
    """Several injections of the same z, one after the other."""

    def __init__(self, *injections: nn.Module) -> None:
        super().__init__()
        self.injections = nn.ModuleList(injections)

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kwargs: dict[str, Tensor] = {}
        for injection in self.injections:
            embeddings, more = injection(latent, embeddings)
            kwargs |= more
        return embeddings, kwargs


def make_injection(
    kind: str, backbone: T5Backbone, latent_width: int, memory_slots: int
) -> nn.Module:
    """The injection called `kind`, one of `INJECTIONS`.

    Args:
        latent_width: Z, the numbers of z.
        memory_slots: M, for injection by memory or cross.

    Raises:
        ValueError: another kind.
    """
    if kind == "memory":
        return MemoryInjection(backbone, latent_width, memory_slots)
    if kind == "embedding":
        return EmbeddingInjection(backbone, latent_width)
    if kind == "both":
        return JointInjection(
            MemoryInjection(backbone, latent_width, memory_slots),
            EmbeddingInjection(backbone, latent_width),
        )
    if kind == "cross":
        return CrossInjection(backbone, latent_width, memory_slots)
    if kind == "none":
        return NoInjection()
    raise ValueError(f"injection {kind!r} is not one of {', '.join(INJECTIONS)}")
