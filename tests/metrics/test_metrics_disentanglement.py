"""Scores of codes that are disentangled, rotated and random."""

import numpy as np
import pytest

from dsvae.metrics.disentanglement import (
    dci_completeness_per_factor,
    dci_disentanglement,
    disentanglement,
    mig_gaps,
    mutual_information_matrix,
    sap_gaps,
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
    """Perfect means times 0.01, of unit variance: 0.0003 nats of KL at most. Draws of
    them are noise, and noise stands at the printed chance level."""
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
    """A little information: two codes of three factors, in noise."""
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
    np.testing.assert_allclose(sap_gaps(np.array([[0.9, 0.2], [0.5, 0.2], [0.1, 0.1]])), [0.4, 0.0])


def test_dci_by_hand():
    assert dci_disentanglement(np.eye(3)) == pytest.approx(1)
    assert dci_disentanglement(np.ones((3, 3))) == pytest.approx(0)
    # Half of the importance in a pure dimension, half in one for both factors.
    assert dci_disentanglement(np.array([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(0.5)
    np.testing.assert_allclose(
        dci_completeness_per_factor(np.array([[1.0, 0.5], [0.0, 0.5]])), [1, 0], atol=1e-12
    )
    assert dci_disentanglement(np.zeros((2, 2))) == 0
