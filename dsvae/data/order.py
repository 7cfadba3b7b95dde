"""Which sentences each optimizer step takes. Nothing of it is stored: any step can be
computed at any time.

The sentences of a corpus, or of each file of a mixture, come in epochs. Each epoch has
every sentence once, in a random order that depends only on (seed, epoch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dsvae.data.noise import MIXTURE, ORDER, generator, mix
from dsvae.errors import UserError

_PERMUTED = 1 << 22
"""Sentences of an epoch up to which its order is a permutation in memory (32 MiB). Runs
on such corpora keep the order that they have always had."""
_SLOTS = 1 << 16
_ROUNDS = 8
Places = NDArray[np.int64]


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Places:
    """Returns the order of an epoch's sentences, (count,)."""
    return generator(seed, ORDER, epoch, 0).permutation(count)


def keyed_order(
    places: Places, count: int, seed: int, purpose: int, repetition: int | Places, stream: int = 0
) -> Places:
    """Returns what pseudorandom permutations of 0..count-1 have at `places`, (N,).

    A Feistel network on the pairs (x // s, x % s), with s the root of `count`, rounded
    up. It permutes 0..s*s-1; if it leads outside 0..count-1, it is followed until it
    is back inside (Black & Rogaway 2002).

    Args:
        purpose, repetition, stream: of `generator`, which gives the keys of the rounds.
            Each place may have its own repetition, (N,).
    """
    different, which = np.unique(np.broadcast_to(repetition, places.shape), return_inverse=True)
    keys = np.stack(
        [
            generator(seed, purpose, each, stream).integers(0, 2**64, _ROUNDS, dtype=np.uint64)
            for each in different.tolist()
        ]
    )[which]
    side = np.uint64(math.isqrt(count - 1) + 1)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = np.divmod(found[outside], side)
        for key in keys[outside].T:
            left, right = right, (left + mix(right + key) % side) % side
        found[outside] = left * side + right
        outside = found >= count
    return found.astype(np.int64)


@dataclass(frozen=True)
class Mixture:
    """Several files, each with its share of every step in expectation.

    The places of the endless sequence come in cycles of 65,536. A cycle gives each file
    its share of them, in a random order that depends only on (seed, cycle), and takes the
    next sentences of the file's own epochs.
    """

    counts: tuple[int, ...]
    """Training sentences of each file. They follow each other in the split."""
    bounds: tuple[int, ...]
    """Where the places of each file begin in a cycle, and where the last one's end."""

    @staticmethod
    def of(counts: Sequence[int], weights: Sequence[float]) -> Mixture:
        """Makes shares in proportion to `weights`, to within a 65,536th.

        Raises:
            UserError: a weight is too small for a place per cycle.
        """
        bounds = np.rint(np.cumsum([0.0, *weights]) / math.fsum(weights) * _SLOTS).astype(int)
        if not np.diff(bounds).all():
            raise UserError(
                f"data.weights: {min(weights):g} is less than {1 / _SLOTS:.2g} of their sum; leave "
                f"its file out, or give it more"
            )
        return Mixture(tuple(counts), tuple(bounds.tolist()))

    @property
    def shares(self) -> list[float]:
        """The share of each file in the sentences of a step."""
        shares: list[float] = (np.diff(self.bounds) / _SLOTS).tolist()
        return shares

    def draw(self, places: Places, seed: int) -> tuple[Places, Places]:
        """Returns the sentences at `places` of the sequence, and each one's epoch of
        its file."""
        bounds, counts = np.array(self.bounds), np.array(self.counts)
        cycles, slots = np.divmod(places, _SLOTS)
        slots = keyed_order(slots, _SLOTS, seed, MIXTURE, cycles)
        files = np.searchsorted(bounds, slots, side="right") - 1
        own = cycles * np.diff(bounds)[files] + slots - bounds[files]
        epochs, sentences = np.divmod(own, counts[files])
        starts = np.cumsum([0, *self.counts])
        for file in np.unique(files).tolist():
            here = files == file
            sentences[here] = starts[file] + keyed_order(
                sentences[here], self.counts[file], seed, ORDER, epochs[here], file
            )
        return sentences, epochs


def draw_step(
    count: int, batch_size: int, seed: int, index: int, mixture: Mixture | None = None
) -> tuple[Places, Places]:
    """Returns the sentences of optimizer step `index` and the epoch of each, both
    (batch_size,).

    A sentence may occur twice in a step that two epochs share, and in every step if
    `batch_size` is more than `count`. Its epoch then tells the copies apart.
    """
    places = np.arange(index * batch_size, (index + 1) * batch_size)
    if mixture is not None:
        return mixture.draw(places, seed)
    epochs, sentences = np.divmod(places, count)
    if count > _PERMUTED:
        return keyed_order(sentences, count, seed, ORDER, epochs), epochs
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        sentences[here] = epoch_order(count, seed, epoch)[sentences[here]]
    return sentences, epochs
