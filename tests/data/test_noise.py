"""Deletion noise, and the streams of random numbers that it and z are drawn from."""

import itertools

import numpy as np
import pytest

from dsvae.data.noise import (
    DELETION,
    LATENT,
    MASKING,
    ORDER,
    PRIOR,
    Streams,
    delete_tokens,
    generator,
    mask_tokens,
    normal,
)

EOS = 1


def sentence(length):
    """Token ids that tell their position: 100, 101, ..., EOS."""
    return np.append(np.arange(100, 100 + length - 1), EOS)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_deletes_the_stated_share_of_the_tokens(rate):
    """Within 5 standard deviations of the binomial; half the rate, as the paper's code
    deletes, is far outside."""
    lengths = [2 + i % 19 for i in range(3000)]
    kept = sum(
        len(delete_tokens(sentence(n), rate, generator(3, DELETION, 8, i))) - 1
        for i, n in enumerate(lengths)
    )
    tokens = sum(n - 1 for n in lengths)  # EOS is no candidate
    allowed = 5 * np.sqrt(tokens * rate * (1 - rate))
    assert abs((tokens - kept) - tokens * rate) < allowed
    assert tokens * rate / 2 > 2 * allowed


def test_every_position_has_the_same_chance_but_eos_which_has_none():
    counts, runs, rate = np.zeros(8), 4000, 0.4
    for i in range(runs):
        row = delete_tokens(sentence(8), rate, generator(0, DELETION, 0, i))
        assert row[-1] == EOS
        counts[row[:-1] - 100] += 1
    np.testing.assert_allclose(
        counts[:7], runs * (1 - rate), atol=5 * np.sqrt(runs * rate * (1 - rate))
    )


def test_masks_the_stated_share_of_the_tokens_and_never_eos():
    rate, runs = 0.3, 3000
    rows = [mask_tokens(sentence(8), rate, 7, generator(0, MASKING, 0, i)) for i in range(runs)]
    masked = np.array(rows) == 7
    allowed = 5 * np.sqrt(runs * rate * (1 - rate))
    np.testing.assert_allclose(masked.sum(0)[:7], runs * rate, atol=allowed)
    for row, hidden in zip(rows, masked, strict=True):
        np.testing.assert_array_equal(row[~hidden], sentence(8)[~hidden])
        assert row[-1] == EOS


def test_what_belongs_to_a_token_is_not_masked():
    both = np.stack([sentence(50), np.arange(50)])
    found = mask_tokens(both, 0.5, 7, generator(0, MASKING, 0, 0))
    np.testing.assert_array_equal(found[1], np.arange(50))
    assert 10 < (found[0] == 7).sum() < 40
    assert (both[0] != 7).all()


def test_what_is_kept_keeps_its_order():
    row = delete_tokens(sentence(200), 0.5, generator(0, DELETION, 0, 0))
    assert 1 < len(row) < 200
    assert (np.diff(row[:-1]) > 0).all()


def test_rate_0_is_the_identity():
    np.testing.assert_array_equal(
        delete_tokens(sentence(9), 0.0, generator(0, DELETION, 0, 0)), sentence(9)
    )


def test_a_sentence_of_eos_alone_survives():
    assert delete_tokens(sentence(1), 0.999, generator(0, DELETION, 0, 0)).tolist() == [EOS]


def test_the_sentence_that_is_given_stays_as_it_is():
    row = sentence(50)
    delete_tokens(row, 0.5, generator(0, DELETION, 0, 0))
    np.testing.assert_array_equal(row, sentence(50))


def test_a_stream_is_a_function_of_its_key_alone():
    np.random.seed(0)
    first = generator(1, LATENT, 2, 3).standard_normal(5)
    generator(1, LATENT, 2, 4).standard_normal(100)
    np.random.seed(1)
    np.testing.assert_array_equal(generator(1, LATENT, 2, 3).standard_normal(5), first)


def test_streams_that_differ_in_one_part_of_the_key_are_uncorrelated():
    base = (5, LATENT, 7, 11)
    keys = {
        base,
        (0, DELETION, 0, 0),
        (1, DELETION, 0, 0),
        (0, DELETION, 1, 0),
        (0, DELETION, 0, 1),
    }
    for part in range(4):
        keys |= {tuple(v + d * (i == part) for i, v in enumerate(base)) for d in (1, 2)}
    draws = {key: generator(*key).standard_normal(20_000) for key in sorted(keys)}
    for (one, a), (other, b) in itertools.combinations(draws.items(), 2):
        for shift in (0, 1, 4):  # nor is one the other a little later
            correlation = np.corrcoef(a[shift:], b[: len(b) - shift])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(20_000), (one, other, shift)


def test_purposes_are_distinct():
    assert len({DELETION, LATENT, PRIOR, ORDER}) == 4


@pytest.mark.parametrize(
    "key", [0, 2**63, 2**64 - 2, 2**64 - 1, np.uint64(2**64 - 1), np.int64(2**62)]
)
def test_content_keys_may_take_all_64_bits(key):
    assert np.isfinite(generator(0, PRIOR, 0, key).standard_normal(3)).all()


def test_large_content_keys_stay_apart():
    # a float would merge some
    keys = (0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, np.uint64(2**63 + 1))
    assert len({generator(0, PRIOR, 0, key).standard_normal() for key in keys}) == len(keys)


def test_seeds_large_as_a_command_line_gives_them():
    assert (
        generator(2**31, LATENT, 0, 0).standard_normal()
        != generator(0, LATENT, 0, 0).standard_normal()
    )


def test_a_stream_is_numpys_philox_whatever_was_drawn_before():
    """Also after draws that leave half of a 64-bit word, or a part of a block, over."""
    keys = [(0, 5), (2**60, 2**61), (3, 0), (3, 5), (0, 5)]

    def fresh(purpose, repetition, sentence):
        key = np.array([(9 << 8) + purpose, repetition], dtype=np.uint64)
        counter = np.array([0, 0, sentence, 0], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    stream = Streams(9, DELETION)
    for key in keys:
        rng = stream(*key)
        np.testing.assert_array_equal(rng.random(3), fresh(DELETION, *key).random(3))
        rng.integers(10, size=3, dtype=np.int32)
    drawn = [fresh(LATENT, *key).standard_normal((2, 33), np.float32) for key in keys]
    np.testing.assert_array_equal(normal(9, LATENT, keys, 2, 33), drawn)
