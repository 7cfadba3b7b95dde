"""From an epoch of sentences to the micro-batches of every rank.

The plan of an epoch is a function of (seed, epoch) alone. Sentences are shuffled,
sorted by length inside windows of many steps, cut into optimizer steps, and the steps
are shuffled: a step holds sentences of similar length, so padding is small, and the
same sentences whatever the number of ranks. Inside a step, micro-batches are cut by a
budget of padded tokens and dealt out to the ranks, the same number of micro-batches to
each. Nothing is dropped, nothing comes twice in an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
    """(B, T) int64, the clean sentence, -100 behind EOS."""
    noise: Tensor
    """(B, Z) float32, standard normal."""
    weight: Tensor
    """(B,) float32, 1 for a sentence, 0 for a filler (a rank that got no sentence must
    still take part)."""
    indices: NDArray[np.int64]
    """(B,), which sentences of the split."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "attention_mask", "labels", "noise", "weight")
        }
        return MicroBatch(**moved, indices=self.indices)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    micro_batches: list[MicroBatch]
    sentences: int
    """N of the global batch: the sentences of all ranks and micro-batches."""
    tokens: int
    """Predicted tokens of the global batch, EOS included."""


def plan_epoch(
    lengths: NDArray[np.int32], batch_size: int, bucket_steps: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The sentences of every optimizer step of an epoch, each step sorted by length,
    the longest first.

    Args:
        lengths: (N,) tokens of every sentence.
        batch_size: most sentences of a step; the steps of a window differ by at most
            one sentence, so that there is no small last step whose few sentences would
            weigh more than others.
        bucket_steps: steps of a window.
    """
    rng = generator(seed, ORDER, epoch, 0)
    order = rng.permutation(len(lengths))
    windows = np.array_split(order, math.ceil(len(order) / (batch_size * bucket_steps)))
    plan: list[NDArray[np.int64]] = []
    for window in windows:
        by_length = window[np.argsort(-lengths[window], kind="stable")]
        plan += np.array_split(by_length, math.ceil(len(window) / batch_size))
    return [plan[i] for i in rng.permutation(len(plan))]


def cut_step(
    lengths: NDArray[np.int32], world_size: int, token_budget: int, micro_batches: int | None = None
) -> list[slice]:
    """Cuts a step's sentences, sorted by falling length, into micro-batches of all
    ranks together.

    Rank r of W takes every W-th sentence of a slice, from the r-th on: equal shapes on
    all ranks.

    Args:
        lengths: (N,) in the step's order.
        token_budget: most padded tokens (rows times longest row) of one rank's share of
            a slice.
        micro_batches: cut into exactly so many slices of equal numbers of sentences
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
    """The most micro-batches that any step can take: that of a step of the longest
    sentences."""
    longest = np.sort(lengths)[::-1][:batch_size]
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
    """Pads sentences (each (T_i,), EOS last) to a batch; `encoder_rows` are the noised
    ones, where they differ."""
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
    """The optimizer steps of one rank, one after the other, epoch after epoch.

    `step(i)` gives the step of any position: there is no state to save, a resumed run
    asks for the next number.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        *,
        batch_size: int,
        token_budget: int,
        latent_dim: int,
        deletion: float,
        bucket_steps: int,
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
                f"needs a sentence a step"
            )
        self.split, self.lengths = split, split.lengths
        self.batch_size, self.token_budget, self.micro_batches = (
            batch_size,
            token_budget,
            micro_batches,
        )
        self.latent_dim, self.deletion, self.seed, self.pad_id = latent_dim, deletion, seed, pad_id
        self.rank, self.world_size, self.bucket_steps = rank, world_size, bucket_steps
        # Windows are cut to whole steps of their own, so the plan itself says how many
        # steps an epoch has.
        self._epoch = 0
        self._plan = plan_epoch(self.lengths, batch_size, bucket_steps, seed, 0)
        self.steps_per_epoch = len(self._plan)

    def step(self, index: int) -> Step:
        """The `index`-th optimizer step since the start of the phase, for this rank."""
        epoch, position = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = (
                epoch,
                plan_epoch(self.lengths, self.batch_size, self.bucket_steps, self.seed, epoch),
            )
        sentences = self._plan[position]
        tokens = int(self.lengths[sentences].sum())
        slices = cut_step(
            self.lengths[sentences], self.world_size, self.token_budget, self.micro_batches
        )
        return Step(
            [self._micro_batch(sentences[part], index) for part in slices], len(sentences), tokens
        )

    def _micro_batch(self, sentences: NDArray[np.int64], index: int) -> MicroBatch:
        own, weight = share(sentences, self.rank, self.world_size)
        rows = self.split.rows(own)
        noise = np.stack(
            [
                generator(self.seed, LATENT, index, i).standard_normal(
                    self.latent_dim, dtype=np.float32
                )
                for i in own
            ]
        )
        noised = None
        if self.deletion:
            streams = (generator(self.seed, DELETION, index, i) for i in own)
            noised = [
                delete_tokens(row, self.deletion, rng)
                for row, rng in zip(rows, streams, strict=True)
            ]
        return collate(
            rows, pad_id=self.pad_id, noise=noise, weight=weight, indices=own, encoder_rows=noised
        )


def share(
    sentences: NDArray[np.int64], rank: int, world_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A rank's part of a slice, and its weights: every `world_size`-th sentence; a
    filler of weight 0 where none is left."""
    own = sentences[rank::world_size]
    if len(own):
        return own, np.ones(len(own), dtype=np.float32)
    return sentences[-1:], np.zeros(1, dtype=np.float32)


def evaluation_batches(
    lengths: NDArray[np.int32], *, token_budget: int, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Every sentence once, over all ranks: (indices, weights) of this rank's batches,
    the same number on every rank."""
    order = np.argsort(-lengths, kind="stable")
    for part in cut_step(lengths[order], world_size, token_budget):
        yield share(order[part], rank, world_size)
