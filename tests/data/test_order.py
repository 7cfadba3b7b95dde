"""The order of the sentences: every epoch whole, random, and computed at any place; and
mixtures that have their shares."""

import numpy as np
import pytest

from dsvae.data import order
from dsvae.data.noise import MIXTURE, ORDER, generator
from dsvae.data.order import Mixture, draw_step, keyed_order
from dsvae.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97, 100, 101, 65_536, 100_003])
def test_a_keyed_order_is_a_permutation(count):
    found = keyed_order(np.arange(count), count, 5, ORDER, 2)
    np.testing.assert_array_equal(np.sort(found), np.arange(count))
    some = np.random.default_rng(0).integers(0, count, 20)
    np.testing.assert_array_equal(keyed_order(some, count, 5, ORDER, 2), found[some])


def test_a_keyed_order_has_a_key_for_all_that_it_belongs_to():
    keys = [(5, ORDER, 2, 0), (6, ORDER, 2, 0), (5, MIXTURE, 2, 0), (5, ORDER, 3, 0)]
    found = [keyed_order(np.arange(50), 50, *key).tolist() for key in [*keys, (5, ORDER, 2, 1)]]
    assert len({tuple(each) for each in found}) == 5


def test_a_keyed_order_is_uniform():
    """Over 3,000 epochs of 11 sentences, each sentence comes at each place equally often, and
    so does each pair of neighbours: chi-squared of 100 and 109 degrees of freedom."""
    orders = np.array([keyed_order(np.arange(11), 11, 0, ORDER, epoch) for epoch in range(3000)])
    places = np.array([np.bincount(orders[:, place], minlength=11) for place in range(11)])
    expected = 3000 / 11
    assert ((places - expected) ** 2 / expected).sum() < 100 + 5 * np.sqrt(200)
    pairs = np.zeros((11, 11))
    np.add.at(pairs, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    expected = 3000 * 10 / 110
    off = ~np.eye(11, dtype=bool)
    assert ((pairs[off] - expected) ** 2 / expected).sum() < 109 + 5 * np.sqrt(218)


def test_a_long_keyed_order_does_not_follow_the_file():
    """Neither the places nor the distances of neighbours say anything."""
    count = 50_000
    found = keyed_order(np.arange(count), count, 1, ORDER, 0)
    bound = 5 / np.sqrt(count)
    assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < bound
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < bound
    assert abs(np.corrcoef(found, keyed_order(np.arange(count), count, 1, ORDER, 1))[0, 1]) < bound
    # a random permutation keeps the distance of two neighbours with a chance of 1 / count
    assert np.bincount(np.abs(np.diff(found)), minlength=count).max() < 20


def test_small_corpora_keep_their_order():
    sentences, epochs = draw_step(40, 16, 3, 4)  # places 64 to 79: the second epoch's last 16
    np.testing.assert_array_equal(sentences, generator(3, ORDER, 1, 0).permutation(40)[24:])
    assert epochs.tolist() == [1] * 16


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_large_corpora_have_every_sentence_once_per_epoch(batch_size, monkeypatch):
    monkeypatch.setattr(order, "_PERMUTED", 40)
    monkeypatch.delattr(order, "epoch_order")
    steps = [draw_step(41, batch_size, 1, i) for i in range(-(-3 * 41 // batch_size))]
    line, of = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    for epoch in range(3):
        here = slice(epoch * 41, (epoch + 1) * 41)
        np.testing.assert_array_equal(np.sort(line[here]), np.arange(41))
        assert (of[here] == epoch).all()
    assert line[:41].tolist() != line[41:82].tolist()


# Mixtures


def mixed(mixture, steps, batch_size=128, seed=0):
    """(sentences, epochs), (steps, batch_size) each."""
    found = [draw_step(sum(mixture.counts), batch_size, seed, i, mixture) for i in range(steps)]
    return tuple(np.array(each) for each in zip(*found, strict=True))


@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 1.0, 2.0], [0.7, 0.05, 0.25]])
def test_a_mixture_has_its_shares(weights):
    """In a cycle of 512 steps of 128 exactly, and in every step as in a sample without
    replacement from the cycle."""
    counts = [1000, 30, 5000][: len(weights)]
    sentences = mixed(Mixture.of(counts, weights), 1, 65_536)[0].reshape(512, 128)
    starts = np.cumsum([0, *counts])
    shares = np.array(weights) / sum(weights)
    for file, share in enumerate(shares):
        own = (sentences >= starts[file]) & (sentences < starts[file + 1])
        assert abs(own.sum() - share * 65_536) <= 1
        variance = 128 * share * (1 - share) * (65_536 - 128) / 65_535
        # the standard error of a variance from 512 values is 6% of it
        assert abs(own.sum(1).var() / variance - 1) < 0.3


def test_every_file_of_a_mixture_has_whole_epochs():
    """In each epoch of a file every sentence comes once, those at the end of the run
    aside."""
    counts = (300, 50)
    sentences, epochs = (each.ravel() for each in mixed(Mixture.of(counts, [1, 3]), 2, 65_536))
    for file, (start, count) in enumerate(zip((0, 300), counts, strict=True)):
        own = (sentences >= start) & (sentences < start + count)
        whole = int(own.sum()) // count
        assert whole == 2 * 65_536 * (1, 3)[file] // 4 // count
        seen = np.zeros((epochs[own].max() + 1, count), int)
        np.add.at(seen, (epochs[own], sentences[own] - start), 1)
        assert (seen[:whole] == 1).all()
        assert seen[whole:].max(initial=0) <= 1
    # Files of one length have orders of their own.
    one, other = (keyed_order(np.arange(50), 50, 0, ORDER, 4, file).tolist() for file in (0, 1))
    assert one != other


def test_a_place_of_a_mixture_is_the_same_in_steps_of_any_size():
    mixture = Mixture.of([37, 90], [1, 2])
    small, large = (mixed(mixture, *shape) for shape in ((40, 24), (10, 96)))
    for one, other in zip(small, large, strict=True):
        np.testing.assert_array_equal(one.ravel(), other.ravel())
    assert mixed(mixture, 4, seed=1)[0].tolist() != mixed(mixture, 4)[0].tolist()
    # Step 1,000,000,000 as soon as any other.
    far, epochs = draw_step(127, 96, 0, 10**9, mixture)
    assert epochs[far < 37].min() == pytest.approx(96 * 10**9 / 3 / 37, rel=1e-3)


def test_a_weight_may_be_too_small():
    with pytest.raises(UserError, match=r"data.weights: 1e-06 is less than"):
        Mixture.of([5, 5], [1, 1e-6])
