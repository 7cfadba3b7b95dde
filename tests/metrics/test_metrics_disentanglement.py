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
    found = disentanglement(codes, factors, NAMES, seed=0)
    for name in (*SCORES, "dci_informativeness", "z_diff"):
        assert found[name] > 0.9, name
    assert found["z_diff_chance"] == pytest.approx(1 / 3)
    assert found["per_factor"].keys() == set(NAMES)
    assert np.argmax(found["information"], axis=0).tolist() == [2, 1, 0]


def test_random_codes(factors):
    found = disentanglement(np.random.default_rng(2).normal(size=(2000, 5)), factors, NAMES, seed=0)
    for name in SCORES:
        assert found[name] < 0.1, name
    assert found["z_diff"] == pytest.approx(1 / 3, abs=0.1)
    assert found["dci_informativeness"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 5]), abs=0.05)


def test_rotated_codes_are_informative_and_entangled(factors):
    rng = np.random.default_rng(3)
    standard = (factors - factors.mean(0)) / factors.std(0)
    codes = standard @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    found = disentanglement(codes, factors, NAMES, seed=0)
    assert found["dci_informativeness"] > 0.9
    for name in SCORES:
        assert found[name] < 0.5, name


def test_the_same_seed_gives_the_same_scores(factors):
    codes = np.random.default_rng(4).normal(size=(120, 2))
    assert disentanglement(codes, factors[:120], NAMES, 5) == disentanglement(
        codes, factors[:120], NAMES, 5
    )


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
