"""From a split to the micro-batches of every rank.

The epochs follow each other as one endless sequence of sentences. Each epoch has every
sentence once, in a random order that depends only on (seed, epoch). Optimizer step i
takes sentences i * B to (i + 1) * B of the sequence, so every step has exactly B
sentences and every sentence has the same weight. A step may begin in one epoch and end
in the next.

Inside a step, sentences are sorted by length, cut into micro-batches by a budget of
padded tokens, and divided among the ranks. Each rank gets the same number of
micro-batches. The number of ranks does not change which sentences a step has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvae.data.noise import DELETION, LATENT, ORDER, delete_tokens, generator
from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import UserError
from dsvae.objective.elbo import IGNORE


@dataclass(frozen=True)
class MicroBatch:
    """What one rank takes through the model at once."""

    input_ids: Tensor
    """(B, S) int64, what the encoder sees: padded, after deletion noise."""
    attention_mask: Tensor
    """(B, S) int64, 1 = token."""
    labels: Tensor
    """(B, T) int64, the clean sentence, -100 after EOS."""
    noise: Tensor
    """(B, K, E) float32, standard normal: the noise of K draws of z."""
    weight: Tensor
    """(B,) float32, 1 for a sentence, 0 for a filler: a rank without a sentence must
    still take part."""
    indices: NDArray[np.int64]
    """(B,), which sentences of the split."""
    condition_ids: Tensor | None = None
    """(B, C) int64, the conditions, padded; None if sentences have none."""
    condition_mask: Tensor | None = None
    """(B, C) int64, 1 = token."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (
                "input_ids",
                "attention_mask",
                "labels",
                "noise",
                "weight",
                "condition_ids",
                "condition_mask",
            )
            if getattr(self, name) is not None
        }
        return MicroBatch(**moved, indices=self.indices)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    micro_batches: list[MicroBatch]
    sentences: int
    """N, the sentences of the global batch: of all ranks and micro-batches."""
    tokens: int
    """Predicted tokens of the global batch, EOS included."""


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch's sentences, (count,)."""
    return generator(seed, ORDER, epoch, 0).permutation(count)


def draw_step(
    count: int, batch_size: int, seed: int, index: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sentences of optimizer step `index` and the epoch of each, both (batch_size,).

    A sentence may occur twice in a step that two epochs share, and in every step if
    `batch_size` is more than `count`. Its epoch then tells the copies apart.
    """
    places = np.arange(index * batch_size, (index + 1) * batch_size)
    epochs = places // count
    drawn = [
        epoch_order(count, seed, epoch)[places[epochs == epoch] % count]
        for epoch in np.unique(epochs).tolist()
    ]
    return np.concatenate(drawn), epochs


def cut_step(
    lengths: NDArray[np.int32], world_size: int, token_budget: int, micro_batches: int | None = None
) -> list[slice]:
    """Cuts the sentences of a step, longest first, into micro-batches of all ranks
    together.

    Rank r of W takes every W-th sentence of a slice, starting with the r-th, so that
    shapes are nearly equal on all ranks.

    Args:
        lengths: (N,) in the order of the step.
        token_budget: most padded tokens (rows times longest row) of one rank's share of
            a slice.
        micro_batches: cut into exactly this many slices with equal numbers of sentences
            instead.
    """
    if micro_batches is not None:
        bounds = np.linspace(0, len(lengths), min(micro_batches, len(lengths)) + 1).astype(int)
        return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    slices = []
    start = 0
    while start < len(lengths):
        rows = max(1, token_budget // int(lengths[start]))
        slices.append(slice(start, min(start + rows * world_size, len(lengths))))
        start = slices[-1].stop
    return slices


def most_micro_batches(
    lengths: NDArray[np.int32], batch_size: int, world_size: int, token_budget: int
) -> int:
    """The most micro-batches that any step can have: those of a step of the longest
    sentences, each as often as it can occur in one step."""
    epochs = 1 + math.ceil(batch_size / len(lengths))
    longest = np.repeat(np.sort(lengths)[::-1][:batch_size], epochs)[:batch_size]
    return len(cut_step(longest, world_size, token_budget))


def collate(
    rows: list[NDArray[np.int64]],
    *,
    pad_id: int,
    noise: NDArray[np.float32],
    weight: NDArray[np.float32],
    indices: NDArray[np.int64],
    encoder_rows: list[NDArray[np.int64]] | None = None,
) -> MicroBatch:
    """Pads sentences to a batch.

    Args:
        rows: (T_i,) each, EOS last.
        encoder_rows: the same with noise, where the encoder's input differs.
    """
    encoder_rows = rows if encoder_rows is None else encoder_rows
    input_ids = _pad(encoder_rows, pad_id)
    lengths = np.array([len(row) for row in encoder_rows])
    mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(_pad(rows, IGNORE)),
        noise=torch.from_numpy(noise),
        weight=torch.from_numpy(weight),
        indices=indices,
    )


def _pad(rows: list[NDArray[np.int64]], value: int) -> NDArray[np.int64]:
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = row
    return padded


class TrainingBatches:
    """The optimizer steps of one rank.

    `step(i)` returns the step at any position. There is no state to save: a resumed run
    asks for the next number.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        *,
        batch_size: int,
        token_budget: int,
        noise_width: int,
        draws: int = 1,
        deletion: float,
        seed: int,
        rank: int,
        world_size: int,
        pad_id: int,
        micro_batches: int | None = None,
    ) -> None:
        if world_size > len(split):
            raise UserError(
                f"{world_size} ranks for {len(split)} training sentences: use at most as many "
                f"ranks as sentences"
            )
        if batch_size < world_size:
            raise UserError(
                f"data.batch_size {batch_size} is less than the {world_size} ranks: every rank "
                f"needs a sentence per step"
            )
        self.split, self.lengths = split, split.lengths
        self.batch_size, self.token_budget, self.micro_batches = (
            batch_size,
            token_budget,
            micro_batches,
        )
        self.noise_shape, self.deletion = (draws, noise_width), deletion
        self.seed, self.pad_id = seed, pad_id
        self.rank, self.world_size = rank, world_size

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch, rarely a whole number."""
        return len(self.split) / self.batch_size

    def step(self, index: int) -> Step:
        """The `index`-th optimizer step since the start of the phase, for this rank."""
        sentences, epochs = draw_step(len(self.split), self.batch_size, self.seed, index)
        by_length = np.argsort(-self.lengths[sentences], kind="stable")
        sentences, epochs = sentences[by_length], epochs[by_length]
        lengths = self.lengths[sentences]
        slices = cut_step(lengths, self.world_size, self.token_budget, self.micro_batches)
        return Step(
            [self._micro_batch(sentences[part], epochs[part]) for part in slices],
            len(sentences),
            int(lengths.sum()),
        )

    def _micro_batch(self, sentences: NDArray[np.int64], epochs: NDArray[np.int64]) -> MicroBatch:
        own, weight = share(sentences, self.rank, self.world_size)
        keys = list(zip(share(epochs, self.rank, self.world_size)[0].tolist(), own, strict=True))
        rows = self.split.rows(own)
        # The first draw has the same numbers whatever the number of draws.
        noise = np.stack(
            [
                generator(self.seed, LATENT, epoch, sentence).standard_normal(
                    self.noise_shape, dtype=np.float32
                )
                for epoch, sentence in keys
            ]
        )
        noised = None
        if self.deletion:
            noised = [
                delete_tokens(row, self.deletion, generator(self.seed, DELETION, epoch, sentence))
                for row, (epoch, sentence) in zip(rows, keys, strict=True)
            ]
        return collate(
            rows, pad_id=self.pad_id, noise=noise, weight=weight, indices=own, encoder_rows=noised
        )


def share(
    sentences: NDArray[np.int64], rank: int, world_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A rank's share of a slice, and its weights: every `world_size`-th sentence, or a
    filler of weight 0 if none is left."""
    own = sentences[rank::world_size]
    if len(own):
        return own, np.ones(len(own), dtype=np.float32)
    return sentences[-1:], np.zeros(1, dtype=np.float32)


def evaluation_batches(
    lengths: NDArray[np.int32], *, token_budget: int, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """(indices, weights) of this rank's batches, which cover every sentence once over
    all ranks. Every rank has the same number of batches."""
    order = np.argsort(-lengths, kind="stable")
    for part in cut_step(lengths[order], world_size, token_budget):
        yield share(order[part], rank, world_size)
