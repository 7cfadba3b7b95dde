"""Scores of codes that are disentangled, rotated, random and categorical."""

import numpy as np
import pytest

from dsvae.metrics.disentanglement import (
    _differences,
    dci_completeness_per_factor,
    dci_disentanglement,
    disentanglement,
    gaps,
    mig_gaps,
    mutual_information_matrix,
    scores,
    z_diff,
)

NAMES = ["a", "b", "c"]
SCORES = ("mig", "dci_disentanglement", "dci_completeness", "sap")


@pytest.fixture(scope="module")
def factors():
    rng = np.random.default_rng(0)
    return np.stack(
        [rng.integers(2, size=2000), rng.integers(3, size=2000), rng.integers(5, size=2000)], 1
    )


def test_one_dimension_a_factor(factors):
    rng = np.random.default_rng(1)
    codes = np.concatenate([-2.0 * factors[:, ::-1], rng.normal(size=(2000, 2))], 1)
    codes += 0.02 * rng.normal(size=codes.shape)
    found = scores(codes, factors, NAMES, seed=0)
    for name in (*SCORES, "dci_informativeness", "z_diff"):
        assert found[name] > 0.9, name
    assert found["per_factor"].keys() == set(NAMES)
    assert np.argmax(found["information"], axis=0).tolist() == [2, 1, 0]


def test_draws_of_a_collapsed_latent_are_at_chance(factors):
    """Perfect means times 0.01 with unit variance have at most 0.0003 nats of KL. Their
    draws are noise, which scores the printed chance level."""
    rng = np.random.default_rng(2)
    means = 0.01 * (factors - factors.mean(0)) + 1e-4 * rng.normal(size=(2000, 3))
    draws = means + rng.normal(size=means.shape)
    found = disentanglement(means, draws, factors, NAMES, seed=0)
    for name in (*SCORES, "dci_informativeness", "z_diff"):
        assert found[name] > 0.9, name
        assert found["draws"][name] == pytest.approx(found["chance"][name], abs=0.06), name
        assert found["draws"][name] < 0.45, name
    chance = {"z_diff": 1 / 3, "dci_informativeness": np.mean([1 / 2, 1 / 3, 1 / 5])}
    for name, expected in chance.items():
        assert found["chance"][name] == pytest.approx(expected, abs=0.05), name
    for name in SCORES:
        assert found["chance"][name] < 0.1, name


def test_z_diff_states_how_much_it_varies_with_its_seed(factors):
    """With a little information: two noisy codes of three factors."""
    rng = np.random.default_rng(3)
    codes = 0.5 * factors[:, :2] + rng.normal(size=(2000, 2))
    values, errors = zip(*(z_diff(codes, factors, seed) for seed in range(8)), strict=True)
    assert 0.4 < np.mean(values) < 0.9
    assert np.ptp(values) < 0.05
    # eight values estimate a deviation to about a quarter of it
    assert 0.3 < np.std(values, ddof=1) / np.mean(errors) < 2.5


def test_rotated_codes_are_informative_and_entangled(factors):
    rng = np.random.default_rng(3)
    standard = (factors - factors.mean(0)) / factors.std(0)
    codes = standard @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    found = scores(codes, factors, NAMES, seed=0)
    assert found["dci_informativeness"] > 0.9
    for name in SCORES:
        assert found[name] < 0.5, name


def test_the_same_seed_gives_the_same_scores(factors):
    codes = np.random.default_rng(4).normal(size=(120, 2))
    found = [disentanglement(codes, codes, factors[:120], NAMES, 5) for _ in range(2)]
    assert found[0] == found[1]


def test_gaps_by_hand():
    factors = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 50)
    codes = factors[:, [0, 0]].astype(float)  # both dimensions hold the first factor
    information = mutual_information_matrix(codes, factors)
    np.testing.assert_allclose(information, [[np.log(2), 0], [np.log(2), 0]], atol=1e-12)
    np.testing.assert_allclose(mig_gaps(information, factors), [0, 0], atol=1e-12)
    np.testing.assert_allclose(mig_gaps(information[:1], factors), [1, 0], atol=1e-12)
    np.testing.assert_allclose(gaps(np.array([[0.9, 0.2], [0.5, 0.2], [0.1, 0.1]])), [0.4, 0.0])


def test_dci_by_hand():
    assert dci_disentanglement(np.eye(3)) == pytest.approx(1)
    assert dci_disentanglement(np.ones((3, 3))) == pytest.approx(0)
    # Half of the importance in a pure dimension, half in one for both factors.
    assert dci_disentanglement(np.array([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(0.5)
    np.testing.assert_allclose(
        dci_completeness_per_factor(np.array([[1.0, 0.5], [0.0, 0.5]])), [1, 0], atol=1e-12
    )
    assert dci_disentanglement(np.zeros((2, 2))) == 0


# Categories: one-hot vectors side by side


def one_hot(codes, categories):
    return np.eye(categories)[codes].reshape(len(codes), -1)


@pytest.fixture(scope="module")
def channel():
    """Two factors of 4 and 3 values, each pair 100 times, and two variables of 5
    categories. The first renames the first factor. The second is the second factor
    through a channel that is right 80 times in 100 and else one of the other two."""
    factors = np.array([[a, b] for a in range(4) for b in range(3) for _ in range(100)])
    through = np.array([0] * 80 + [1] * 10 + [2] * 10)
    first = np.array([3, 0, 4, 1])[factors[:, 0]]
    second = (factors[:, 1] + np.tile(through, 12)) % 3
    return factors, np.stack([first, second], 1)


INFORMATION = np.log(3) + 0.8 * np.log(0.8) + 0.2 * np.log(0.1)
"""I(second variable; second factor) in nats: H of the output minus H of the channel."""


def test_information_of_categories_in_closed_form(channel):
    factors, codes = channel
    expected = [[np.log(4), 0], [0, INFORMATION]]
    found = mutual_information_matrix(one_hot(codes, 5), factors, columns=5)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(mig_gaps(found, factors), [1, INFORMATION / np.log(3)], atol=1e-12)


def test_the_columns_of_a_variable_do_not_compete():
    """The two columns of a variable with two categories say the same."""
    factors = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (100, 1))
    codes = one_hot(factors, 2)
    found = scores(codes, factors, ["a", "b"], seed=0, columns=2)
    assert (found["mig"], found["sap"], found["dci_completeness"]) == pytest.approx((1, 1, 1))
    apart = scores(codes, factors, ["a", "b"], seed=0)
    assert (apart["mig"], apart["sap"]) == pytest.approx((0, 0))


def test_scores_of_categories(channel):
    factors, codes = channel
    found = scores(one_hot(codes, 5), factors, ["a", "b"], seed=0, columns=5)
    assert found["mig"] == pytest.approx((1 + INFORMATION / np.log(3)) / 2)
    a, b = found["per_factor"]["a"], found["per_factor"]["b"]
    # The best guess of the second factor is right 4 times in 5; chance is 1 in 3.
    assert (a["informativeness"], a["sap_gap"]) == pytest.approx((1, 1), abs=0.08)
    assert b["informativeness"] == pytest.approx(0.8, abs=0.06)
    assert b["sap_gap"] == pytest.approx((0.8 - 1 / 3) / (1 - 1 / 3), abs=0.12)
    assert found["dci_disentanglement"] > 0.8
    assert np.shape(found["importance"]) == np.shape(found["information"]) == (2, 2)
    assert np.argmax(found["importance"], axis=0).tolist() == [0, 1]
    assert found["z_diff"] > 0.95


def test_names_of_categories_do_not_matter(channel):
    factors, codes = channel
    rng = np.random.default_rng(0)
    renamed = np.stack([rng.permutation(5)[code] for code in codes.T], 1)
    one, other = (
        mutual_information_matrix(one_hot(each, 5), factors, 5) for each in (codes, renamed)
    )
    np.testing.assert_allclose(one, other, atol=1e-12)


def test_pairs_of_categories_differ_or_do_not(channel):
    """Pairs that share the first factor agree in the first variable; in the second, with
    three values equally often, they differ two times in three."""
    factors, codes = channel
    rng = np.random.default_rng(0)
    found = _differences(one_hot(codes, 5), factors[:, 0], 400, rng, 5)
    assert found.shape == (400, 2)
    np.testing.assert_allclose(found.mean(0), [0, 2 / 3], atol=0.02)
    assert (found[:, 0] == 0).all()
