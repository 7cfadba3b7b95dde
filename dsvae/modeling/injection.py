"""How z enters the decoder. z is the only way from the sentence to the decoder.

An injection owns its weights, what it adds to the decoder's call, and the answers to
all questions about it. A new one is a subclass of `Injection`, its entry in
`INJECTIONS`, and its name in `dsvae.modeling.settings`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from dsvae.modeling.backbone import T5Backbone
from dsvae.modeling.settings import read_by

if TYPE_CHECKING:
    from dsvae.modeling.t5_vae import T5VAEConfig


class Injection(nn.Module):
    """Nothing enters: the decoder is a plain language model, the baseline for the
    perplexity of a VAE.

    Args:
        backbone: the T5.
        latent_width: Z, the numbers of z.
        settings: the fields of `LatentConfig` that only this injection reads.
    """

    slots: int = 0
    """The keys per decoder layer that are made of z."""
    in_cross_attention: ClassVar[bool] = False
    """Whether they are vectors for cross-attention, which makes keys and values of them.
    Otherwise the injection itself makes these, for self-attention."""

    def __init__(self, backbone: T5Backbone, latent_width: int, **settings: Any) -> None:
        super().__init__()

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the decoder's input embeddings, and keyword arguments for its
        attention.

        Args:
            latent: z, (B, Z).
            embeddings: (B, T, d), of the decoder's input.
        """
        return embeddings, {}

    @staticmethod
    def of_layer(arguments: dict[str, Any], layer: int) -> dict[str, Any]:
        """Returns what one decoder layer needs of the keyword arguments for all.

        A compiled block gets its own part alone: if it chose it by its number, every
        layer would be compiled.
        """
        return arguments


class MemoryInjection(Injection):
    """Key/value slots in every decoder self-attention layer, linear in z.

    This is the memory scheme of Optimus (Li et al. 2020).
    """

    def __init__(self, backbone: T5Backbone, latent_width: int, memory_slots: int) -> None:
        super().__init__(backbone, latent_width)
        heads, width = backbone.key_value_heads, backbone.head_width
        self.slots = memory_slots
        # (L, keys and values, M, H, D)
        self.shape = (backbone.decoder_layers, 2, memory_slots, heads, width)
        self.projection = nn.Linear(latent_width, math.prod(self.shape))

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.projection(latent.to(self.projection.weight.dtype))
        # The batch stays the outermost axis. A reshape that moves it would mix the
        # sentences of a batch.
        return embeddings, {"latent_memory": memory.view(-1, *self.shape)}

    @staticmethod
    def of_layer(arguments: dict[str, Any], layer: int) -> dict[str, Any]:
        return arguments | {"latent_memory": arguments["latent_memory"][:, layer : layer + 1]}


class EmbeddingInjection(Injection):
    """A vector linear in z, added to every input embedding of the decoder.

    This is the embedding scheme of Optimus.
    """

    def __init__(self, backbone: T5Backbone, latent_width: int) -> None:
        super().__init__(backbone, latent_width)
        self.projection = nn.Linear(latent_width, backbone.decoder_width)

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        added = self.projection(latent.to(self.projection.weight.dtype))
        return embeddings + added.unsqueeze(1).to(embeddings.dtype), {}


class CrossInjection(Injection):
    """M vectors linear in z, for the cross-attention that the decoder was pretrained
    with.

    They are normalized as the encoder normalizes its states, which they stand for.
    """

    in_cross_attention: ClassVar[bool] = True

    def __init__(self, backbone: T5Backbone, latent_width: int, memory_slots: int) -> None:
        super().__init__(backbone, latent_width)
        self.slots = memory_slots
        self.shape = (memory_slots, backbone.encoder_width)  # (M, d)
        self.projection = nn.Linear(latent_width, math.prod(self.shape))
        self.layer_norm = backbone.norm()

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self.projection(latent.to(self.projection.weight.dtype))
        normalized = self.layer_norm(vectors.view(-1, *self.shape))
        return embeddings, {"encoder_hidden_states": normalized.to(embeddings.dtype)}


class MemoryAndEmbedding(Injection):
    """Memory slots and an added vector, of the same z."""

    def __init__(self, backbone: T5Backbone, latent_width: int, memory_slots: int) -> None:
        super().__init__(backbone, latent_width)
        self.slots = memory_slots
        memory = MemoryInjection(backbone, latent_width, memory_slots)
        self.injections = nn.ModuleList([memory, EmbeddingInjection(backbone, latent_width)])

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memory, embedding = self.injections
        return embedding(latent, embeddings)[0], memory(latent, embeddings)[1]

    of_layer = MemoryInjection.of_layer


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
    kind = INJECTIONS[config.injection]
    return kind(config.backbone, latent_width, **read_by(config, "injection"))
