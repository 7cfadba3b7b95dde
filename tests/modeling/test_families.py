"""The latent families against torch.distributions."""

import math

import pytest
import torch
from small_models import FAMILIES
from torch.distributions import Independent, Normal, kl_divergence

from dsvae.modeling.families import (
    SPIKE,
    Categorical,
    CategoricalFamily,
    Gaussian,
    GaussianFamily,
    SpikeSlab,
    SpikeSlabFamily,
)


def gaussian(batch=7, dim=4):
    rng = torch.Generator().manual_seed(0)
    return Gaussian(
        torch.randn(batch, dim, generator=rng) * 2, torch.randn(batch, dim, generator=rng)
    )


def prior(q):
    return GaussianFamily(q.mean.shape[1]).prior()


def as_torch(q):
    return Normal(q.mean, torch.exp(0.5 * q.logvar))


def test_kl_is_that_of_torch():
    q = gaussian()
    expected = kl_divergence(as_torch(q), Normal(0.0, 1.0))
    torch.testing.assert_close(q.kl(prior(q)), expected, atol=1e-5, rtol=1e-5)


def test_kl_to_another_gaussian_is_that_of_torch():
    q, p = gaussian(), Gaussian(torch.randn(7, 4), torch.randn(7, 4))
    torch.testing.assert_close(q.kl(p), kl_divergence(as_torch(q), as_torch(p)))
    assert q.kl(q).abs().max() == 0


def test_kl_near_the_prior_is_positive_and_that_of_float64():
    small = torch.logspace(-9, -1, 20_000)
    q = Gaussian(torch.zeros(1, 40_000), torch.cat([small, -small])[None])
    exact = q.logvar.double()
    expected = 0.5 * (torch.special.expm1(exact) - exact)
    assert float(q.kl(prior(q)).min()) >= 0
    torch.testing.assert_close(q.kl(prior(q)).double(), expected, atol=1e-9, rtol=1e-4)
    # By its series, where even float64 cancels.
    expected = exact.square() / 4 + exact**3 / 12 + exact**4 / 48
    tiny = exact.abs() < 1e-3
    torch.testing.assert_close(q.kl(prior(q)).double()[tiny], expected[tiny], atol=1e-10, rtol=1e-4)


def test_log_probabilities_are_those_of_torch():
    q, z = gaussian(), torch.randn(7, 4)
    torch.testing.assert_close(q.log_prob(z), Independent(as_torch(q), 1).log_prob(z))
    torch.testing.assert_close(prior(q).log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))
    pairwise = torch.stack([Independent(as_torch(q), 1).log_prob(row) for row in z]).double()
    torch.testing.assert_close(q.pairwise_log_prob(z), pairwise, atol=1e-4, rtol=1e-5)


def test_a_sample_has_the_mean_and_the_deviation():
    q = gaussian(1, 3)
    z = Gaussian(q.mean.expand(200_000, 3), q.logvar.expand(200_000, 3)).sample(
        torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1))
    )
    torch.testing.assert_close(z.mean(0), q.mean[0], atol=0.03, rtol=0.0)
    torch.testing.assert_close(z.std(0), torch.exp(0.5 * q.logvar[0]), atol=0.03, rtol=0.01)


# Spike and slab


def spike_slab(batch=6, dim=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return SpikeSlab(torch.randn(batch, 4 * dim, generator=rng) * 1.5)


def spike_slab_of(g, mu, s, a, b):
    """One dimension with given values; a / (a + b) must be g."""
    raw = [math.log(math.expm1(x - 0.5)) for x in (a, b)]
    return SpikeSlab(torch.tensor([[mu, 2 * math.log(s), *raw]]))


@pytest.mark.parametrize(
    ("g", "mu", "s", "marginal", "bound"),
    [
        (0.8, 1, 0.5, 0.15455, 0.16363),
        (0.5, 2, 0.3, 1.32049, 1.37449),
        (0.2, 0, 0.5, 0.23653, 0.25452),
        (0.5, 0, 0.05, 0.58515, 1.24849),
    ],
)
def test_the_slab_s_share_bounds_the_kl_of_the_mixtures(g, mu, s, marginal, bound):
    """KL between the mixtures for a fixed weight g by quadrature, and (1-g) KL_G, its
    bound; both prior and posterior have the weight g."""
    a, b = (g * 2 / min(g, 1 - g), (1 - g) * 2 / min(g, 1 - g))
    q, p = spike_slab_of(g, mu, s, a, b), spike_slab_of(g, 0, 1, a, b)
    assert q.spike.item() == pytest.approx(g, rel=1e-5)
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)[:, None]
    log_q, log_p = q.log_prob(z), p.log_prob(z)
    assert torch.trapezoid(log_q.exp(), z[:, 0]).item() == pytest.approx(1, abs=1e-6)
    kl = torch.trapezoid(log_q.exp() * (log_q - log_p), z[:, 0]).item()
    assert kl == pytest.approx(marginal, abs=2e-5)
    assert q.kl(p).item() == pytest.approx(bound, abs=2e-5)


def test_the_kl_of_the_spike_s_weight_is_that_of_torch():
    from torch.distributions import Beta

    q, p = spike_slab(), SpikeSlabFamily(5, (4.0, 1.0)).prior()
    weights = kl_divergence(Beta(*(x.double() for x in q.beta)), Beta(4.0, 1.0))
    slab = kl_divergence(as_torch(q.slab), Normal(0.0, 1.0))
    expected = weights + (1 - q.spike) * slab
    torch.testing.assert_close(q.kl(p).double(), expected, atol=1e-5, rtol=1e-5)
    one = spike_slab_of(0.5, 0, 1, 2, 2).kl(spike_slab_of(0.8, 0, 1, 4, 1)).item()
    assert one == pytest.approx(1.23880, abs=1e-5)  # KL(Beta(2,2) || Beta(4,1))


def test_the_kl_of_spike_and_slab_is_never_negative_near_the_prior():
    prior = SpikeSlabFamily(3, (4.0, 1.0)).prior()
    near = prior.parameters + torch.randn(2000, 12) * torch.logspace(-8, -1, 2000)[:, None]
    assert float(SpikeSlab(near).kl(prior).min()) >= 0
    assert float(prior.kl(prior).abs().max()) == 0


def test_draws_of_spike_and_slab_have_its_moments():
    q = spike_slab(1, 3, seed=2)
    many = SpikeSlab(q.parameters.expand(400_000, 12))
    z = many.sample(torch.randn(400_000, 6, generator=torch.Generator().manual_seed(1)))
    g, slab = q.spike[0], q.slab
    mean = (1 - g) * slab.mean[0]
    square = g * SPIKE**2 + (1 - g) * (slab.mean[0].square() + slab.logvar[0].exp())
    torch.testing.assert_close(z.mean(0), mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(z.square().mean(0), square, atol=0.05, rtol=0.02)


def test_spike_and_slab_without_a_spike_is_the_gaussian():
    parameters = torch.randn(4, 6).repeat(1, 2)
    parameters[:, 6:9], parameters[:, 9:] = -50.0, 99.0  # G = 0.5 / 100
    q, noise = SpikeSlab(parameters), torch.randn(4, 6)
    noise[:, :3] = -1.0  # a selector that is no spike
    torch.testing.assert_close(q.sample(noise), q.slab.sample(noise[:, 3:]))
    assert torch.equal(q.point, q.slab.mean)


# Categories


def categorical(batch=6, variables=3, values=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Categorical(torch.randn(batch, variables, values, generator=rng) * 2)


def test_the_kl_of_categories_is_that_of_torch():
    from torch.distributions import Categorical as TorchCategorical

    q, family = categorical(), CategoricalFamily(3, 4)
    uniform = TorchCategorical(logits=torch.zeros(4))
    expected = kl_divergence(TorchCategorical(logits=q.logits), uniform)
    torch.testing.assert_close(q.kl(family.prior()), expected, atol=1e-6, rtol=1e-5)
    assert float(family.prior().kl(family.prior()).max()) == 0
    certain = Categorical(torch.tensor([[[60.0, 0, 0, 0]]]))
    assert certain.kl(CategoricalFamily(1, 4).prior()).item() == pytest.approx(math.log(4))
    tiny = Categorical(torch.randn(2000, 3, 4) * torch.logspace(-8, -1, 2000)[:, None, None])
    assert float(tiny.kl(family.prior()).min()) >= 0


def test_draws_of_categories_are_one_hot_with_the_probabilities():
    q = categorical(1)
    many = Categorical(q.logits.expand(200_000, 3, 4))
    z = many.sample(torch.randn(200_000, 12, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(z.view(-1, 3, 4).sum(-1), torch.ones(200_000, 3))
    assert set(z.unique().tolist()) == {0.0, 1.0}
    frequencies = z.mean(0).view(3, 4)
    torch.testing.assert_close(frequencies, q.logits[0].softmax(-1), atol=0.005, rtol=0.0)


def test_the_information_of_categories_by_enumeration():
    q = categorical(5, 2, 3)
    joint = q.logits.double().softmax(-1) / 5  # p(x, z_d) over five equally likely x
    independent = joint.sum(0, keepdim=True) / 5
    expected = (joint * (joint / independent).log()).sum((0, 2))
    torch.testing.assert_close(q.activity(), expected)


# What holds for every family


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_pairwise_densities_and_shapes(family):
    q = family.of(torch.randn(5, family.parameter_width))
    z = q.sample(torch.randn(5, family.noise_width))
    assert z.shape == q.point.shape == (5, family.latent_width)
    assert q.kl(family.prior()).shape == (5, family.units)
    assert q.activity().shape == (family.units,)
    torch.testing.assert_close(family.of(q.parameters).parameters, q.parameters)
    drawn = family.prior().sample(torch.randn(7, family.noise_width))
    assert drawn.shape == (7, family.latent_width)
    pairs = q.pairwise_log_prob(drawn)
    for i in range(5):
        row = family.of(q.parameters[i : i + 1])
        torch.testing.assert_close(pairs[:, i].float(), row.log_prob(drawn), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_gets_a_gradient_through_the_draw_and_the_kl(family):
    parameters = torch.randn(50, family.parameter_width, requires_grad=True)
    q = family.of(parameters)
    weight = torch.randn(family.latent_width)
    for value in (q.sample(torch.randn(50, family.noise_width)) @ weight, q.kl(family.prior())):
        (gradient,) = torch.autograd.grad(value.sum(), parameters, retain_graph=True)
        assert (gradient.abs().sum(0) > 0).all()


@pytest.mark.parametrize(
    "q",
    [
        gaussian(3),
        spike_slab(3, 4),
        Categorical(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_moments_are_those_of_draws(q):
    """Of 100,000 draws from each of three distributions."""
    count = 100_000
    mean, variance = q.moments()
    for row in range(3):
        one = type(q)(*(value[row : row + 1] for value in vars(q).values()))
        many = type(q)(*(value.expand(count, *value.shape[1:]) for value in vars(one).values()))
        width = many.parameters.shape[1] // (1 if isinstance(q, Categorical) else 2)
        z = many.sample(torch.randn(count, width, generator=torch.Generator().manual_seed(row)))
        torch.testing.assert_close(mean[row], z.mean(0), atol=0.03, rtol=0.01)
        torch.testing.assert_close(variance[row], z.var(0), atol=0.01, rtol=0.03)
