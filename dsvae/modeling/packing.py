"""Sentences one behind the other instead of padded rows.

A packed batch has the shape (N, 1, d): its N tokens are the rows, of one token each. So
the layers of a T5 take it as they are, and only attention has to know which tokens make
a sentence (`dsvae.modeling.attention`). It spreads them over groups of sentences of
similar length, each padded to its own longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RATIO = 0.75
"""A group of sentences ends before those that are shorter than this share of its longest."""


class Group(NamedTuple):
    """Sentences that attention pads to one width, B' of them."""

    rows: int
    """B'."""
    width: int
    """Tokens of the longest."""
    full: bool
    """Whether all have as many."""


@dataclass(frozen=True)
class Packing:
    """Where each of the N tokens of B sentences lies."""

    rows: Tensor
    """(N,) int64, its sentence."""
    places: Tensor
    """(N,) int64, its place in a padded batch (B, T), as a number below B * T."""
    slots: Tensor
    """(N,) int64, its slot in the groups."""
    groups: tuple[Group, ...]
    sentences: int
    """B."""
    longest: int
    """T."""

    @staticmethod
    def of(lengths: NDArray[np.int64]) -> Packing:
        """Packs sentences of these lengths, (B,), each at least 1. Groups are of
        sentences that follow each other, so these should be sorted by length."""
        longest_left = np.maximum.accumulate(lengths[::-1])[::-1]
        groups: list[Group] = []
        offsets = np.empty(len(lengths), dtype=np.int64)  # the first slot of each sentence
        start = slot = 0
        while start < len(lengths):
            width = int(longest_left[start])
            stop = start + int((longest_left[start:] >= RATIO * width).sum())
            full = bool((lengths[start:stop] == width).all())
            offsets[start:stop] = slot + width * np.arange(stop - start)
            groups.append(Group(stop - start, width, full))
            start, slot = stop, slot + width * (stop - start)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        longest = int(lengths.max())
        numbers = (rows, longest * rows + within, offsets[rows] + within)
        found = [torch.from_numpy(each) for each in numbers]
        return Packing(found[0], found[1], found[2], tuple(groups), len(lengths), longest)

    def to(self, device: torch.device) -> Packing:
        """Returns the same on a device."""
        names = ("rows", "places", "slots")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)

    @property
    def full(self) -> bool:
        """Whether the groups have no padding: then the slots are the tokens."""
        return all(group.full for group in self.groups)

    def pack(self, padded: Tensor) -> Tensor:
        """Returns the tokens (N, 1, ...) of a padded batch (B, T, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)[:, None]

    def pad(self, packed: Tensor) -> Tensor:
        """Returns a padded batch (B, T, ...) of tokens (N, ...), 0 at padding."""
        padded = _Spread.apply(packed, self.places, self.sentences * self.longest)
        return padded.unflatten(0, (self.sentences, self.longest))

    def spread(self, packed: Tensor) -> list[Tensor]:
        """Returns what each group has of tokens (N, H, D), (B', H, width, D)."""
        # Slices would each have a gradient of the size of the whole, split has one.
        sizes = [group.rows * group.width for group in self.groups]
        if not self.full:
            packed = _Spread.apply(packed, self.slots, sum(sizes))
        return [
            each.unflatten(0, (-1, group.width)).transpose(1, 2)
            for group, each in zip(self.groups, packed.split(sizes), strict=True)
        ]

    def split(self, rows: Tensor | None) -> Sequence[Tensor | None]:
        """Returns what each group has of numbers of the sentences (B, ...)."""
        if rows is None:
            return [None] * len(self.groups)
        return rows.split([group.rows for group in self.groups])

    def gather(self, groups: list[Tensor]) -> Tensor:
        """Returns the tokens (N, H, D) of the groups, (B', width, H, D) each."""
        flat = [each.flatten(0, 1) for each in groups]
        found = flat[0] if len(flat) == 1 else torch.cat(flat)
        return found if self.full else _Gather.apply(found, self.slots)


class Packed(NamedTuple):
    """What is packed of a batch of `T5VAE.forward`."""

    input: Packing
    """Of what the encoder reads."""
    labels: Packing
    """Of the labels; of K draws of z, each sentence's K times."""
    condition: Packing | None = None

    def to(self, device: torch.device) -> Packed:
        """Returns the same on a device."""
        condition = None if self.condition is None else self.condition.to(device)
        return Packed(self.input.to(device), self.labels.to(device), condition)


class _Spread(torch.autograd.Function):
    """(x (N, ...), places (N,), size) -> (size, ...), 0 at other places. The gradient of an
    index is a sum at each place; here no place has two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """The reverse: (x (size, ...), places (N,)) -> (N, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        zeros = gradient.new_zeros(ctx.size, *gradient.shape[1:])
        return zeros.index_copy_(0, places, gradient), None
