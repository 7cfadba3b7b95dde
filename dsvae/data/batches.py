"""From a split to the micro-batches of every rank.

The epochs follow each other as one endless sequence of sentences (see
`dsvae.data.order`). Optimizer step i takes sentences i * B to (i + 1) * B of the
sequence, so every step has exactly B sentences and every sentence has the same weight. A
step may begin in one epoch and end in the next.

Inside a step, sentences are sorted by length, cut into micro-batches by a budget of
tokens, and divided among the ranks. Each rank gets the same number of micro-batches.
The number of ranks does not change which sentences a step has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvae.data.noise import (
    ADDED,
    DELETION,
    DROPPED,
    LATENT,
    MASKING,
    Streams,
    delete_tokens,
    mask_tokens,
    normal,
)
from dsvae.data.order import Mixture, draw_step
from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import UserError
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.packing import Packed, Packing
from dsvae.modeling.settings import PosteriorReads

Ids = NDArray[np.int64]


class Texts(Protocol):
    """N texts as token ids, maybe with conditions and tags, as in `TokenizedSplit`."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int32]: ...

    def lengths_of(self, indices: Ids) -> NDArray[np.int32]: ...

    def condition_lengths_of(self, indices: Ids | None = None) -> NDArray[np.int32] | None: ...

    def rows(self, indices: Sequence[int] | Ids) -> list[Ids]: ...

    def conditions(self, indices: Sequence[int] | Ids) -> list[Ids] | None: ...

    def tags(self, indices: Sequence[int] | Ids) -> list[Ids] | None: ...

    def class_labels_of(self, indices: Ids) -> Ids | None: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one rank takes through the model at once."""

    input_ids: Tensor
    """(B, S) int64, what the posterior's encoder reads: padded, after deletion noise. With
    conditions, a row is `c EOS x EOS` or `c EOS` (see `collate_split`)."""
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
    """(B, C) int64, padded; None if the decoder reads no conditions."""
    condition_mask: Tensor | None = None
    """(B, C) int64, 1 = token; None if the decoder reads no conditions."""
    class_labels: Tensor | None = None
    """(B,) int64, -100 if a record has no label; None if no record has one."""
    tag_labels: Tensor | None = None
    """(B, S) int64, the tags of `input_ids`; -100 if a token has no tag: at padding, at
    EOS, at later pieces of a word, at conditions. None if no record has tags."""
    added: Tensor | None = None
    """(B, Z) float32, what is added to z before it is decoded, in standard deviations of
    z. None: nothing."""
    factor: Tensor | None = None
    """(B, Z) float32, by what z is then multiplied: 0 for a number that is dropped, and
    1 / (1 - rate) for the others. None: nothing is dropped."""
    packed: Packed | None = None
    """Where the tokens lie, for a pass without padding. None: padding is computed, too."""
    packed_draws: Packed | None = None
    """The same for a pass that decodes all K draws of z; None if K is 1."""

    def to(self, device: torch.device) -> MicroBatch:
        """Returns the same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            if torch.is_tensor(value)
            else value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | Packed)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    micro_batches: list[MicroBatch]
    sentences: int
    """N, the sentences of the global batch: of all ranks and micro-batches."""
    tokens: int
    """Predicted tokens of the global batch, EOS included."""


def cut_step(
    lengths: NDArray[np.int32],
    world_size: int,
    token_budget: int,
    micro_batches: int | None = None,
    packing: bool = False,
) -> list[slice]:
    """Cuts the sentences of a step, longest first, into micro-batches of all ranks
    together.

    Rank r of W takes every W-th sentence of a slice, starting with the r-th, so that
    shapes are nearly equal on all ranks.

    Args:
        lengths: (N,) in the order of the step, from `row_lengths`.
        token_budget: the limit of padded tokens (rows times longest row) of one rank's share of
            a slice.
        micro_batches: cut into exactly this many slices with equal numbers of sentences
            instead.
        packing: the limit is of real tokens, and slices have about as many each.
    """
    if micro_batches is not None:
        bounds = np.linspace(0, len(lengths), min(micro_batches, len(lengths)) + 1).astype(int)
        return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    if packing:
        return _cut_packed(lengths, world_size, token_budget)
    slices = []
    start = 0
    while start < len(lengths):
        rows = max(1, token_budget // int(lengths[start]))
        slices.append(slice(start, min(start + rows * world_size, len(lengths))))
        start = slices[-1].stop
    return slices


def _cut_packed(lengths: NDArray[np.int32], world_size: int, token_budget: int) -> list[slice]:
    """Cuts a step for `cut_step` by real tokens: as few slices as a budget allows."""

    def cut(budget: float) -> list[slice]:
        slices: list[slice] = []
        start = 0
        while start < len(lengths):
            # The first rank has the most tokens, those of every W-th sentence.
            fits = np.cumsum(lengths[start::world_size], dtype=np.int64) <= budget
            stop = start + max(1, int(fits.sum())) * world_size
            slices.append(slice(start, min(stop, len(lengths))))
            start = slices[-1].stop
        return slices

    slices = cut(token_budget)
    # By a smaller budget, the last slice is not what the others left over.
    share = int(lengths.sum(dtype=np.int64)) / (world_size * len(slices)) + int(lengths[0])
    equal = cut(min(share, token_budget))
    return equal if len(equal) == len(slices) else slices


def most_micro_batches(
    lengths: NDArray[np.int32],
    batch_size: int,
    world_size: int,
    token_budget: int,
    mixed: bool = False,
    packing: bool = False,
) -> int:
    """Returns the largest number of micro-batches that a step can have: that of a step of
    the longest sentences, each as often as it can occur in one step.

    Args:
        lengths: `row_lengths` of all sentences, or of the `batch_size` longest.
        mixed: the sentences are a mixture's, whose smallest file can fill a step with any
            of its sentences.
        packing: as of `cut_step`.
    """
    copies = batch_size if mixed else 1 + math.ceil(batch_size / len(lengths))
    longest = np.repeat(np.sort(lengths)[::-1][:batch_size], copies)[:batch_size]
    return len(cut_step(longest, world_size, token_budget, packing=packing))


def row_lengths(
    split: Texts,
    posterior_reads: PosteriorReads = "both",
    indices: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Returns (N,), the tokens that each sentence takes in the encoder or in the
    decoder, whichever is more; of all sentences, or of `indices`. Budgets of padded
    tokens count these."""
    texts = split.lengths if indices is None else split.lengths_of(indices)
    conditions = split.condition_lengths_of(indices)
    if conditions is None:
        return texts
    if posterior_reads == "both":
        return conditions + texts
    return np.maximum(conditions, texts)


def collate_split(
    split: Texts,
    indices: NDArray[np.int64],
    *,
    pad_id: int,
    noise: NDArray[np.float32],
    weight: NDArray[np.float32],
    posterior_reads: PosteriorReads = "both",
    disturb: Callable[[int, NDArray[np.int64]], NDArray[np.int64]] | None = None,
    packing: bool = False,
) -> MicroBatch:
    """Pads the sentences `indices` of a split to a batch, with all that belongs to them.

    Args:
        posterior_reads: with conditions, what `input_ids` are. both: the condition and
            the sentence without padding between them; the decoder reads `condition_ids`.
            condition: the condition alone; the decoder reads z alone.
        disturb: maps a row of the batch and its tokens (..., T) to those that the encoder
            reads in training, (..., T').
        packing: also say where the tokens lie. Then sentences that follow each other
            should be about as long.
    """
    rows, tags, conditions = split.rows(indices), split.tags(indices), split.conditions(indices)
    condition_ids = condition_mask = None
    read = rows
    if conditions is not None and posterior_reads == "condition":
        read, tags = conditions, None  # the encoder has no token of the text
    if disturb is not None and tags is not None:
        both = [
            disturb(i, np.stack(pair)) for i, pair in enumerate(zip(read, tags, strict=True))
        ]  # (2, T'_i) each
        read, tags = [ids for ids, _ in both], [kept for _, kept in both]
    elif disturb is not None:
        read = [disturb(i, row) for i, row in enumerate(read)]
    if conditions is not None and posterior_reads == "both":
        condition_ids, condition_mask = padded(conditions, pad_id)
        read = [np.concatenate(pair) for pair in zip(conditions, read, strict=True)]
        if tags is not None:
            tags = [
                np.concatenate([np.full(len(condition), IGNORE), row])
                for condition, row in zip(conditions, tags, strict=True)
            ]
    input_ids, attention_mask = padded(read, pad_id)
    class_labels = split.class_labels_of(indices)
    packed = packed_draws = None
    if packing:
        other = None if condition_ids is None or conditions is None else _packing(conditions)
        packed = Packed(_packing(read), _packing(rows), other)
        if (draws := noise.shape[1]) > 1:
            packed_draws = packed._replace(labels=_packing(rows, draws))
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=torch.from_numpy(_pad(rows, IGNORE)),
        noise=torch.from_numpy(noise),
        weight=torch.from_numpy(weight),
        indices=indices,
        condition_ids=condition_ids,
        condition_mask=condition_mask,
        class_labels=None if class_labels is None else torch.from_numpy(class_labels),
        tag_labels=None if tags is None else torch.from_numpy(_pad(tags, IGNORE)),
        packed=packed,
        packed_draws=packed_draws,
    )


def _packing(rows: Sequence[Ids], copies: int = 1) -> Packing:
    return Packing.of(np.repeat([len(row) for row in rows], copies))


def padded(rows: Sequence[Sequence[int] | Ids], pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns padded ids and their mask, (B, T) int64 each."""
    ids = _pad(rows, pad_id)
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _pad(rows: Sequence[Sequence[int] | Ids], value: int) -> NDArray[np.int64]:
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = row
    return padded


@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """The optimizer steps of one rank.

    `step(i)` returns the step at any position. There is no state to save: a resumed run
    asks for the next number.
    """

    split: TokenizedSplit = field(kw_only=False)
    batch_size: int
    token_budget: int
    micro_batches: int | None = None
    noise_width: int
    draws: int = 1
    latent_width: int = 0
    latent_noise: float = 0.0
    latent_dropout: float = 0.0
    deletion: float
    token_mask: float = 0.0
    mask_id: int = 0
    seed: int
    rank: int
    world_size: int
    pad_id: int
    posterior_reads: PosteriorReads = "both"
    packing: bool = False
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        if self.world_size > len(self.split):
            raise UserError(
                f"{self.world_size} ranks for {len(self.split)} training sentences: use at most "
                f"as many ranks as sentences"
            )
        if self.batch_size < self.world_size:
            raise UserError(
                f"data.batch_size {self.batch_size} is less than the {self.world_size} ranks: "
                f"every rank needs a sentence per step"
            )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch, rarely a whole number."""
        return len(self.split) / self.batch_size

    def step(self, index: int) -> Step:
        """Returns the `index`-th optimizer step since the start of the phase, for this
        rank."""
        sentences, epochs = draw_step(
            len(self.split), self.batch_size, self.seed, index, self.mixture
        )
        lengths = row_lengths(self.split, self.posterior_reads, sentences)
        by_length = np.argsort(-lengths, kind="stable")
        sentences, epochs, lengths = sentences[by_length], epochs[by_length], lengths[by_length]
        shares = (self.world_size, self.token_budget, self.micro_batches)
        slices = cut_step(lengths, *shares, packing=self.packing)
        return Step(
            [self._micro_batch(sentences[part], epochs[part]) for part in slices],
            len(sentences),
            int(self.split.lengths_of(sentences).sum()),
        )

    def _micro_batch(self, sentences: NDArray[np.int64], epochs: NDArray[np.int64]) -> MicroBatch:
        own, weight = share(sentences, self.rank, self.world_size)
        keys = list(zip(share(epochs, self.rank, self.world_size)[0].tolist(), own, strict=True))
        # The first draw has the same numbers whatever the number of draws.
        noise = normal(self.seed, LATENT, keys, self.draws, self.noise_width)

        masking, deletion = Streams(self.seed, MASKING), Streams(self.seed, DELETION)

        def disturb(row: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
            if self.token_mask:
                ids = mask_tokens(ids, self.token_mask, self.mask_id, masking(*keys[row]))
            return delete_tokens(ids, self.deletion, deletion(*keys[row]))

        batch = collate_split(
            self.split,
            own,
            pad_id=self.pad_id,
            noise=noise,
            weight=weight,
            posterior_reads=self.posterior_reads,
            disturb=disturb if self.deletion or self.token_mask else None,
            packing=self.packing,
        )
        if self.latent_noise:
            added = self.latent_noise * normal(self.seed, ADDED, keys, self.latent_width)
            batch = replace(batch, added=torch.from_numpy(added))
        if rate := self.latent_dropout:
            width = self.latent_width
            stream = Streams(self.seed, DROPPED)
            drawn = np.stack([stream(*key).random(width) for key in keys])
            factor = (drawn >= rate).astype(np.float32) / np.float32(1 - rate)
            batch = replace(batch, factor=torch.from_numpy(factor))
        return batch


def share(
    sentences: NDArray[np.int64], rank: int, world_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns a rank's share of a slice, and its weights: every `world_size`-th
    sentence, or a filler of weight 0 if none is left."""
    own = sentences[rank::world_size]
    if len(own):
        return own, np.ones(len(own), dtype=np.float32)
    return sentences[-1:], np.zeros(1, dtype=np.float32)


def evaluation_batches(
    lengths: NDArray[np.int32], *, token_budget: int, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Returns (indices, weights) of this rank's batches, which cover every sentence
    once over all ranks. Every rank has the same number of batches."""
    order = np.argsort(-lengths, kind="stable")
    for part in cut_step(lengths[order], world_size, token_budget):
        yield share(order[part], rank, world_size)
