"""Sparsity and the parts of a discrete KL against closed forms and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch

from dsvae.metrics.codes import (
    average_hoyer,
    hoyer,
    marginal_kl_of_variables,
    pairwise_total_correlation,
    total_correlation,
)
from dsvae.modeling.families import CategoricalFamily, SpikeSlabFamily


def test_hoyer_of_known_vectors():
    rows = torch.tensor([[0.0, 0.0, -3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    one_hot, constant, nothing = hoyer(rows)
    assert (float(one_hot), float(constant)) == (pytest.approx(1.0), pytest.approx(0.0))
    assert math.isnan(nothing)


@pytest.mark.parametrize(("width", "expected"), [(8, 0.271), (32, 0.238), (768, 0.210)])
def test_hoyer_of_normal_draws(width, expected):
    """E|z|_1 / |z|_2 of normal vectors; the values are those of 4,000 draws."""
    z = torch.randn(4_000, width, generator=torch.Generator().manual_seed(1))
    assert float(hoyer(z).mean()) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize(
    ("spike_prior", "width", "expected"),
    [((4.0, 1.0), 32, 0.664), ((4.0, 1.0), 768, 0.595), ((2.0, 2.0), 32, 0.487)],
)
def test_hoyer_of_draws_of_a_spike_and_slab_prior(spike_prior, width, expected):
    family = SpikeSlabFamily(width, spike_prior)
    noise = torch.randn(4_000, family.noise_width, generator=torch.Generator().manual_seed(2))
    z = family.prior().sample(noise)
    assert float(hoyer(z).mean()) == pytest.approx(expected, abs=0.005)
    assert average_hoyer(z) == pytest.approx(float(hoyer(z).mean()), abs=0.005)


def test_a_dimension_that_is_always_small_is_no_sparsity():
    z = torch.randn(5_000, 8, generator=torch.Generator().manual_seed(3))
    shrunk = z * torch.tensor([1.0, 1e-3, 1.0, 1e-3, 1.0, 1e-3, 1.0, 1e-3])
    assert float(hoyer(shrunk).mean()) > float(hoyer(z).mean()) + 0.2
    assert average_hoyer(shrunk) == pytest.approx(average_hoyer(z), abs=1e-9)
    assert math.isnan(average_hoyer(torch.ones(5, 3)))


def made_up(n=6, variables=3, values=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, variables, values, generator=rng)).softmax(-1)


def test_the_parts_add_up_to_the_kl():
    """mean KL(q(z|x)||p) = I(x;z) + TC + sum_d KL(q(z_d)||p_d), with I by enumeration."""
    q = made_up().double()
    family = CategoricalFamily(3, 3)
    kl = float(family.of(q.log().flatten(1)).kl(family.prior()).sum(1).double().mean())
    codes = list(itertools.product(range(3), repeat=3))
    joint = np.array(
        [[math.prod(float(x[d, k]) for d, k in enumerate(c)) for c in codes] for x in q]
    )
    marginal = joint.mean(0)
    information = float((joint * np.log(joint / marginal)).sum(1).mean())
    parts = information + total_correlation(q) + marginal_kl_of_variables(q)
    assert parts == pytest.approx(kl, abs=1e-5)


def test_two_variables_have_no_other_total_correlation_than_their_information():
    q = made_up(n=40, variables=2, values=5)
    assert pairwise_total_correlation(q) == pytest.approx(total_correlation(q), abs=1e-12)


def test_pairs_are_blind_to_what_only_three_variables_share():
    """z_3 = z_1 xor z_2: pairwise independent, one bit of total correlation."""
    codes = [(a, b, a ^ b) for a in (0, 1) for b in (0, 1)]
    q = torch.nn.functional.one_hot(torch.tensor(codes), 2).float()
    assert pairwise_total_correlation(q) == pytest.approx(0.0, abs=1e-12)
    assert total_correlation(q) == pytest.approx(math.log(2), abs=1e-12)
    assert marginal_kl_of_variables(q) == pytest.approx(0.0, abs=1e-12)


def test_too_many_codes_are_not_enumerated():
    assert math.isnan(total_correlation(made_up(n=2, variables=12, values=16)))
