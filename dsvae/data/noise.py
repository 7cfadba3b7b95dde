"""Random numbers per sentence, and the noise on tokens that is made of them.

Every sentence of every epoch has its own stream, keyed by (seed, purpose, epoch,
sentence). Its draws depend neither on the rank nor on the micro-batch, and a resumed run
draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

DELETION, LATENT, PRIOR, ORDER, MIXTURE, ROOM, MASKING = 1, 2, 3, 4, 5, 16, 17
ADDED, DROPPED = 20, 21
FLOW = 32
"""Purposes: two streams of one sentence never share numbers."""


class Streams:
    """The streams of many sentences, one after the other.

    Args:
        purpose: one of the above.
    """

    def __init__(self, seed: int, purpose: int) -> None:
        # Philox is counter-based: a new key costs no warm-up. To move one object costs a
        # sixth of making another.
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._key, self._counter = [(seed << 8) + purpose, 0], [0, 0, 0, 0]
        inner = {"key": self._key, "counter": self._counter}
        self._state: Any = {**self._bits.state, "state": inner, "buffer": [0] * 4}

    def __call__(self, repetition: int, sentence: int) -> np.random.Generator:
        """Returns the stream of one sentence, at its beginning. The next call moves the
        same object to another stream.

        Args:
            repetition: the epoch in training, the number of the sample in evaluation.
        """
        self._key[1], self._counter[2] = repetition, sentence
        self._bits.state = self._state
        return self._generator


def generator(seed: int, purpose: int, repetition: int, sentence: int) -> np.random.Generator:
    """Returns the stream of one sentence, as of `Streams`."""
    return Streams(seed, purpose)(repetition, sentence)


def normal(
    seed: int, purpose: int, keys: Iterable[tuple[int, int]], *shape: int
) -> NDArray[np.float32]:
    """Draws standard normal numbers (N, *shape) from the streams of N sentences.

    Args:
        keys: (repetition, sentence) of each, as in `Streams`.
    """
    keys, stream = list(keys), Streams(seed, purpose)
    numbers = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in zip(numbers, keys if numbers.size else (), strict=False):
        stream(*key).standard_normal(dtype=np.float32, out=row)
    return numbers


def mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the finalizer of splitmix64, a bijection of uint64: different keys stay
    different and look random."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def delete_tokens(
    ids: NDArray[np.int64], rate: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Deletes each token with probability `rate`, independently. The last one, EOS,
    always stays.

    Args:
        ids: (T,), one sentence without padding, EOS last; or (..., T), more numbers for
            each token, which go with it.

    Returns: (T',) or (..., T') with 1 <= T' <= T; the kept tokens in order.
    """
    if rate == 0:
        return ids
    keep: NDArray[np.bool_] = rng.random((ids.shape[-1],)) >= rate
    keep[-1] = True
    return ids[..., keep]


def mask_tokens(
    ids: NDArray[np.int64], rate: float, mask_id: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Replaces each token by `mask_id` with probability `rate`, independently. The last
    one, EOS, always stays.

    Args:
        ids: (T,) or (..., T), as of `delete_tokens`; of more numbers for each token, the
            first are the tokens.

    Returns: a copy, (T,) or (..., T).
    """
    masked: NDArray[np.bool_] = rng.random((ids.shape[-1],)) < rate
    masked[-1] = False
    found = ids.copy()
    (found[0] if found.ndim > 1 else found)[masked] = mask_id
    return found
