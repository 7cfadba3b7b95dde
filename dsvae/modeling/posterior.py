"""From encoder states to the parameters of q(z|x): pooling, and a linear head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from dsvae.modeling.t5_vae import T5VAEConfig


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of its weights, its
    input or the autocast around it."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class _WholeText(nn.Module):
    """What the poolings have in common whose vectors have no states of their own."""

    aligned = 1
    """How many parts of the text have vectors of their own."""

    def means(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the means of the states (B, S, d) of each part, (B, 1, d) float32."""
        mask = attention_mask.bool().unsqueeze(-1)
        return (states.float().masked_fill(~mask, 0.0).sum(1) / mask.sum(1))[:, None]


class Pooling(_WholeText):
    """Encoder states (B, S, d) to one vector per sentence (B, d), float32, without the
    padding.

    `mean` and `max` go over the tokens of the sentence, `first` takes the first token,
    and `attention` is a learned softmax over the tokens.
    """

    def __init__(self, kind: str, d_model: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.score = Float32Linear(d_model, 1, bias=False)

    def valid(self, attention_mask: Tensor) -> Tensor:
        """Returns which of its K vectors a sentence has, (B, K) boolean."""
        return torch.ones_like(attention_mask[:, :1], dtype=torch.bool)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        states = states.float()
        mask = attention_mask.bool().unsqueeze(-1)  # (B, S, 1)
        if self.kind == "mean":
            return self.means(states, attention_mask)[:, 0]
        if self.kind == "max":
            return states.masked_fill(~mask, float("-inf")).amax(1)
        if self.kind == "first":
            first = mask.squeeze(-1).to(torch.int8).argmax(1)  # left padding included
            return states[torch.arange(states.shape[0], device=states.device), first]
        weights = self.score(states).masked_fill(~mask, float("-inf")).softmax(1)  # (B, S, 1)
        return (weights * states.masked_fill(~mask, 0.0)).sum(1)


class ChunkPooling(nn.Module):
    """Encoder states (B, S, d) to one vector per `chunk` tokens, (B, K, d), float32: the
    concatenation of the states of the chunk through a linear layer, and a residual
    two-layer perceptron.

    Padding does not count, on whichever side it is. Vectors past the end of a sentence are
    0.

    Args:
        d_model: d.
        vectors: K. A sentence has at most K * `chunk` tokens.
    """

    def __init__(self, d_model: int, vectors: int, chunk: int) -> None:
        super().__init__()
        self.vectors = self.aligned = vectors
        self.chunk = chunk
        self.joined = Float32Linear(chunk * d_model, d_model)
        self.inner = Float32Linear(d_model, 2 * d_model)
        self.outer = Float32Linear(2 * d_model, d_model)

    def valid(self, attention_mask: Tensor) -> Tensor:
        """Returns which of its K vectors a sentence has, (B, K) boolean; at least one."""
        tokens = attention_mask.sum(1, keepdim=True).clamp(min=1)
        starts = self.chunk * torch.arange(self.vectors, device=attention_mask.device)
        return starts < tokens

    def check_length(self, attention_mask: Tensor) -> None:
        """Raises ValueError for a sentence with more tokens than K chunks have."""
        room = self.vectors * self.chunk
        # The number of tokens is looked at only if it matters: a GPU would have to wait.
        if attention_mask.shape[1] > room and (longest := int(attention_mask.sum(1).max())) > room:
            raise ValueError(
                f"a text has {longest} tokens, and {self.vectors} chunks of {self.chunk} hold "
                f"{room}"
            )

    def means(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the means of the states (B, S, d) of each chunk, (B, K, d) float32; 0
        where there is none."""
        tokens = self._chunks(attention_mask[..., None], attention_mask).sum(2)
        found = self._chunks(states, attention_mask).sum(2) / tokens.clamp(min=1)
        return F.pad(found, (0, 0, 0, self.vectors - found.shape[1]))

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        joined = self._chunks(states, attention_mask).flatten(2)
        found = self.joined(joined)
        found = found + self.outer(F.gelu(self.inner(found)))
        count = found.shape[1]
        valid = self.valid(attention_mask)[:, :count, None]
        return F.pad(found.masked_fill(~valid, 0.0), (0, 0, 0, self.vectors - count))

    def _chunks(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the states (B, S, d) by chunks, (B, K', chunk, d) float32 with K' <= K,
        and 0 where there are none."""
        self.check_length(attention_mask)
        length = states.shape[1]
        mask = attention_mask.bool()
        first = mask.int().argmax(1, keepdim=True)  # left padding goes to the right
        places = (first + torch.arange(length, device=states.device)) % length
        states = states.float().masked_fill(~mask[..., None], 0.0)
        states = states.gather(1, places[..., None].expand_as(states))
        # What is cut past the last chunk is padding.
        count = min(-(-length // self.chunk), self.vectors)
        states = F.pad(states, (0, 0, 0, max(0, count * self.chunk - length)))
        return states[:, : count * self.chunk].unflatten(1, (count, self.chunk))


HEAD_WIDTH = 64
"""Width of a head of `QueryPooling`, at most."""


class QueryLayer(nn.Module):
    """Attention of vectors (B, K, d) to encoder states, and a feed-forward, both
    residual; float32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.heads = next(
            n for n in range(max(1, d_model // HEAD_WIDTH), 0, -1) if d_model % n == 0
        )
        self.query, self.key, self.value, self.output = (
            Float32Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.inner = Float32Linear(d_model, 4 * d_model)
        self.outer = Float32Linear(4 * d_model, d_model)

    def forward(self, vectors: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.query(_normalized(vectors)), self.key(states), self.value(states))
        )
        with torch.autocast(query.device.type, enabled=False):
            read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        vectors = vectors + self.output(read.transpose(1, 2).flatten(2))
        return vectors + self.outer(F.gelu(self.inner(_normalized(vectors))))


class QueryPooling(_WholeText):
    """Encoder states (B, S, d) to K vectors (B, K, d), float32: K learned queries attend
    to all states in `query_layers` layers (a resampler, Jaegle et al. 2021).

    Every sentence has all K vectors.
    """

    def __init__(self, d_model: int, vectors: int, query_layers: int) -> None:
        super().__init__()
        self.queries = nn.Embedding(vectors, d_model)
        self.layers = nn.ModuleList(QueryLayer(d_model) for _ in range(query_layers))

    def valid(self, attention_mask: Tensor) -> Tensor:
        """Returns which of its K vectors a sentence has, (B, K) boolean."""
        one = torch.ones_like(attention_mask[:, :1], dtype=torch.bool)
        return one.expand(-1, self.queries.num_embeddings)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        numbers = torch.arange(self.queries.num_embeddings, device=states.device)
        vectors = self.queries(numbers).float().expand(len(states), -1, -1)
        mask = attention_mask.bool()
        states = states.float().masked_fill(~mask[..., None], 0.0)
        for layer in self.layers:
            vectors = layer(vectors, _normalized(states), mask[:, None, None])
        return _normalized(vectors)


def _normalized(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])


AnyPooling = Pooling | ChunkPooling | QueryPooling


def make_pooling(config: T5VAEConfig) -> AnyPooling:
    """Returns the pooling that a model's configuration names."""
    width, vectors = config.backbone.encoder_width, config.latent_vectors
    if config.pooling == "chunks":
        return ChunkPooling(width, vectors, config.chunk)
    if config.pooling == "queries":
        return QueryPooling(width, vectors, config.query_layers)
    return Pooling(config.pooling, width)


OWN_WIDTH = 8
"""Numbers that the posterior reads of the sentence itself, past its cluster."""
CLUSTER_WIDTH = 32
"""Numbers that the posterior reads of the cluster."""


class ClusterHead(nn.Module):
    """The parameters of q(z|x), (B, P), and the probabilities of R clusters, (B, R),
    from a vector per sentence h (B, d); both float32 (after Yuan & Eldardiry 2021).

        r = softmax(W h)
        parameters = head([V h ; r E]),    V: d to `OWN_WIDTH`,  E: R to `CLUSTER_WIDTH`

    The cluster has no prior and no KL. If `head` read all of h, z would not need the
    cluster and it would stay noise. So h itself passes through a few numbers alone.
    What else z has to know of the sentence is cheapest to say through its cluster.
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


class PosteriorHead(nn.Module):
    """The parameters of q(z|x), (B, P) float32, from the encoder's states: pooling, and
    a linear head or a `ClusterHead`. Those of several vectors are (B, K, P).

    The model calls its two parts one after the other, because other heads read what
    `pooling` returns. Outputs are plain tensors and not yet distributions. ZeRO-3 looks
    for the tensors whose backward needs these weights only in tuples, lists and dicts.

    Args:
        parameter_width: P, of a vector.
        clusters: R of the `ClusterHead`; 0: a linear head.
    """

    def __init__(
        self, d_model: int, parameter_width: int, pooling: AnyPooling, clusters: int
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.head: nn.Module = (
            ClusterHead(d_model, clusters, parameter_width)
            if clusters
            else Float32Linear(d_model, parameter_width)
        )
