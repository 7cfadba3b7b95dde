"""How z enters the decoder. z is the only way from the sentence to the decoder.

An injection owns its weights, what it adds to the decoder's call, and the answers to
all questions about it. A new one is a subclass of `Injection`, its entry in
`INJECTIONS`, and its name in `dsvae.modeling.settings`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dsvae.modeling.backbone import T5Backbone
from dsvae.modeling.families import present
from dsvae.modeling.settings import read_by

if TYPE_CHECKING:
    from dsvae.modeling.t5_vae import T5VAEConfig


class Injection(nn.Module):
    """Nothing enters: the decoder is a plain language model, the baseline for the
    perplexity of a VAE.

    Args:
        backbone: the T5.
        latent_width: the numbers of a vector of z.
        vectors: K, the vectors of z, at most.
        settings: the fields of `LatentConfig` that only this injection reads.
    """

    slots: int = 0
    """The keys per decoder layer that are made of z."""
    in_cross_attention: ClassVar[bool] = False
    """Whether they are vectors for cross-attention, which makes keys and values of them.
    Otherwise the injection itself makes these, for self-attention."""

    def __init__(
        self, backbone: T5Backbone, latent_width: int, vectors: int = 1, **settings: Any
    ) -> None:
        super().__init__()

    def forward(
        self, latent: Tensor, embeddings: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the decoder's input embeddings, and keyword arguments for its
        attention.

        Args:
            latent: z, (B, Z): K vectors side by side, 0 where a text has none.
            embeddings: (B, T, d), of the decoder's input; or (N, 1, d), packed.
            rows: (N,), the sentence of each token if they are packed.
        """
        return embeddings, {}

    @staticmethod
    def of_layer(arguments: dict[str, Any], layer: int) -> dict[str, Any]:
        """Returns what one decoder layer needs of the keyword arguments for all.

        A compiled block gets its own part alone: if it chose it by its number, every
        layer would be compiled.
        """
        return arguments


class SlotInjection(Injection):
    """Base of the injections that make keys of z: M of each of its K vectors, with
    weights that the vectors share. If K > 1, a learned position is added to each.

    Args:
        memory_slots: M.
        numbers: of a key, or of the keys of all layers.
    """

    def __init__(
        self,
        backbone: T5Backbone,
        latent_width: int,
        vectors: int,
        memory_slots: int,
        numbers: int,
    ) -> None:
        super().__init__(backbone, latent_width)
        self.vectors, self.slots = vectors, vectors * memory_slots
        self.projection = nn.Linear(latent_width, memory_slots * numbers)
        if vectors > 1:
            self.positions = nn.Embedding(vectors, memory_slots * numbers)

    def projected(self, latent: Tensor) -> Tensor:
        """Returns what z (B, Z) becomes, (B, K, M * numbers)."""
        rows = latent.to(self.projection.weight.dtype).view(len(latent) * self.vectors, -1)
        found = self.projection(rows).view(len(latent), self.vectors, -1)
        if self.vectors == 1:
            return found
        return found + self.positions(torch.arange(self.vectors, device=latent.device))

    def masked(self, latent: Tensor, name: str) -> dict[str, Tensor]:
        """Returns the mask of the keys of z (B, Z), (B, K * M) boolean, as a keyword
        argument; empty if K is 1.

        The first vector always counts: attention needs a key.
        """
        if self.vectors == 1:
            return {}
        valid = present(latent, self.vectors)
        valid[:, 0] = True
        return {name: valid.repeat_interleave(self.slots // self.vectors, 1)}


class MemoryInjection(SlotInjection):
    """Key/value slots in every decoder self-attention layer, linear in z.

    This is the memory scheme of Optimus (Li et al. 2020).
    """

    def __init__(
        self, backbone: T5Backbone, latent_width: int, vectors: int, memory_slots: int
    ) -> None:
        # (L, keys and values, M, H, D)
        heads, width = backbone.key_value_heads, backbone.head_width
        self.shape = (backbone.decoder_layers, 2, memory_slots, heads, width)
        numbers = math.prod(self.shape) // memory_slots
        super().__init__(backbone, latent_width, vectors, memory_slots, numbers)

    def forward(
        self, latent: Tensor, embeddings: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.projected(latent).view(len(latent), self.vectors, *self.shape)
        # The batch stays the outermost axis. A reshape that moves it would mix the
        # sentences of a batch.
        memory = memory.permute(0, 2, 3, 1, 4, 5, 6).flatten(3, 4)
        return embeddings, {"latent_memory": memory, **self.masked(latent, "latent_mask")}

    @staticmethod
    def of_layer(arguments: dict[str, Any], layer: int) -> dict[str, Any]:
        return arguments | {"latent_memory": arguments["latent_memory"][:, layer : layer + 1]}


class EmbeddingInjection(Injection):
    """A vector linear in z, added to every input embedding of the decoder.

    This is the embedding scheme of Optimus.
    """

    def __init__(self, backbone: T5Backbone, latent_width: int, vectors: int = 1) -> None:
        super().__init__(backbone, latent_width)
        self.projection = nn.Linear(latent_width, backbone.decoder_width)

    def forward(
        self, latent: Tensor, embeddings: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        added = self.projection(latent.to(self.projection.weight.dtype))
        added = added if rows is None else added.index_select(0, rows)
        return embeddings + added.unsqueeze(1).to(embeddings.dtype), {}


class CrossInjection(SlotInjection):
    """Vectors linear in z, for the cross-attention that the decoder was pretrained with.

    They are normalized as the encoder normalizes its states, which they stand for.
    """

    in_cross_attention: ClassVar[bool] = True

    def __init__(
        self, backbone: T5Backbone, latent_width: int, vectors: int, memory_slots: int
    ) -> None:
        width = backbone.encoder_width
        super().__init__(backbone, latent_width, vectors, memory_slots, width)
        self.layer_norm = backbone.norm()

    def forward(
        self, latent: Tensor, embeddings: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self.projected(latent).view(len(latent), self.slots, -1)  # (B, K * M, d)
        states = self.layer_norm(vectors).to(embeddings.dtype)
        mask = self.masked(latent, "encoder_attention_mask")
        return embeddings, {"encoder_hidden_states": states, **mask}


class MemoryAndEmbedding(Injection):
    """Memory slots and an added vector, of the same z."""

    def __init__(
        self, backbone: T5Backbone, latent_width: int, vectors: int, memory_slots: int
    ) -> None:
        super().__init__(backbone, latent_width)
        self.slots = memory_slots
        memory = MemoryInjection(backbone, latent_width, vectors, memory_slots)
        self.injections = nn.ModuleList([memory, EmbeddingInjection(backbone, latent_width)])

    def forward(
        self, latent: Tensor, embeddings: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        memory, embedding = self.injections
        return embedding(latent, embeddings, rows)[0], memory(latent, embeddings)[1]

    of_layer = staticmethod(MemoryInjection.of_layer)


INJECTIONS: dict[str, type[Injection]] = {
    "memory": MemoryInjection,
    "embedding": EmbeddingInjection,
    "both": MemoryAndEmbedding,
    "cross": CrossInjection,
    "none": Injection,
}
"""The injections by their names in `LatentConfig.injection`."""


def make_injection(config: T5VAEConfig, latent_width: int) -> Injection:
    """Returns the injection that a model's configuration names, for z of Z numbers."""
    kind, vectors = INJECTIONS[config.injection], config.latent_vectors
    settings = read_by(config, "injection")
    return kind(config.backbone, latent_width // vectors, vectors, **settings)
