"""How z enters the decoder. An injection owns all of it: its weights, and what it adds
to the decoder's call.

`forward(latent, embeddings)` takes z (B, Z) and the decoder's input embeddings (B, T,
d) and returns the embeddings to use and the keyword arguments that the decoder's
attention gets beside them. z is the only way from the sentence to the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import T5Config

INJECTIONS = ("memory", "embedding", "both", "none")


class MemoryInjection(nn.Module):
    """Key/value slots in every decoder self-attention layer, linear in z (memory scheme
    of Optimus, Li et al. 2020)."""

    def __init__(self, t5: T5Config, latent_dim: int, slots: int) -> None:
        super().__init__()
        # d_kv is its own number in T5: it is not d_model / num_heads in t5-3b, t5-11b,
        # flan-t5-small and v1.1-small.
        assert t5.num_decoder_layers is not None  # set by the configuration itself, to num_layers
        # (L, keys and values, M, H, D)
        self.shape = (t5.num_decoder_layers, 2, slots, t5.num_heads, t5.d_kv)
        size = self.shape[0] * 2 * slots * t5.num_heads * t5.d_kv
        self.projection = nn.Linear(latent_dim, size)

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.projection(latent.to(self.projection.weight.dtype))
        # The batch stays the outermost axis: a reshape that moves it mixes the examples
        # of a batch.
        return embeddings, {"latent_memory": memory.view(-1, *self.shape)}


class EmbeddingInjection(nn.Module):
    """A vector linear in z, added to every input embedding of the decoder (embedding
    scheme of Optimus)."""

    def __init__(self, t5: T5Config, latent_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(latent_dim, t5.d_model)

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        added = self.projection(latent.to(self.projection.weight.dtype))
        return embeddings + added.unsqueeze(1).to(embeddings.dtype), {}


class NoInjection(nn.Module):
    """Nothing enters: the decoder is a plain language model, the baseline to read a
    VAE's perplexity against."""

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


def make_injection(kind: str, t5: T5Config, latent_dim: int, memory_slots: int) -> nn.Module:
    """The injection called `kind`: one of `INJECTIONS`."""
    if kind == "memory":
        return MemoryInjection(t5, latent_dim, memory_slots)
    if kind == "embedding":
        return EmbeddingInjection(t5, latent_dim)
    if kind == "both":
        return JointInjection(
            MemoryInjection(t5, latent_dim, memory_slots), EmbeddingInjection(t5, latent_dim)
        )
    if kind == "none":
        return NoInjection()
    raise ValueError(f"injection {kind!r} is not one of {', '.join(INJECTIONS)}")
