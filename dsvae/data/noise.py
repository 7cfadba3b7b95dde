"""Random numbers per sentence, and the noise on tokens that is made of them.

Every sentence of every epoch has its own stream, keyed by (seed, purpose, epoch,
sentence). Its draws depend neither on the rank nor on the micro-batch, and a resumed run
draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

DELETION, LATENT, PRIOR, ORDER, MIXTURE, ROOM, MASKING = 1, 2, 3, 4, 5, 16, 17
ADDED, DROPPED = 20, 21
FLOW = 32
"""Purposes: two streams of one sentence never share numbers."""


def generator(seed: int, purpose: int, repetition: int, sentence: int) -> np.random.Generator:
    """Returns the stream of one sentence.

    Args:
        purpose: one of the above.
        repetition: the epoch in training, the number of the sample in evaluation.
    """
    # Philox is counter-based: a new key costs no warm-up.
    key = np.array([(seed << 8) + purpose, repetition], dtype=np.uint64)
    counter = np.array([0, 0, sentence, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(
    seed: int, purpose: int, keys: Iterable[tuple[int, int]], *shape: int
) -> NDArray[np.float32]:
    """Draws standard normal numbers (N, *shape) from the streams of N sentences.

    Args:
        keys: (repetition, sentence) of each, as in `generator`.
    """
    keys = list(keys)
    numbers = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in zip(numbers, keys if numbers.size else (), strict=False):
        generator(seed, purpose, *key).standard_normal(dtype=np.float32, out=row)
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
