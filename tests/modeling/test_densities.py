"""Fitted densities against torch.distributions, quadrature and autograd."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dsvae.modeling.densities import Flow, GaussianMixture, flow_of


def mixture(components, dim, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.rand(components, generator=rng, dtype=torch.float64) + 0.2
    means = torch.randn(components, dim, generator=rng, dtype=torch.float64) * 1.5
    raw = torch.randn(components, dim, dim, generator=rng, dtype=torch.float64)
    factors = raw.tril(-1) * 0.4 + torch.diag_embed(raw.diagonal(dim1=1, dim2=2).abs() + 0.3)
    return GaussianMixture(weights / weights.sum(), means, factors)


def flow(dim, seed=0):
    """A flow whose couplings do something."""
    torch.manual_seed(seed)
    found = Flow(torch.randn(dim), torch.eye(dim) + 0.4 * torch.randn(dim, dim).tril(-1), 4, 16)
    for name, weight in found.named_parameters():
        torch.nn.init.normal_(weight, 0, 0.5 if "bias" in name else 0.3)
    return found.requires_grad_(False)


def reference(density):
    parts = MultivariateNormal(density.means, scale_tril=density.factors)
    return MixtureSameFamily(Categorical(density.weights), parts)


def grid(dim, end, steps):
    """Points of a grid, and the volume of a cell."""
    axis = torch.linspace(-end, end, steps, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dim).view(-1, dim), float(axis[1] - axis[0]) ** dim


@pytest.mark.parametrize(("components", "dim"), [(1, 1), (1, 4), (3, 1), (5, 4)])
def test_a_mixture_is_that_of_torch(components, dim):
    density = mixture(components, dim)
    z = torch.randn(20, dim, dtype=torch.float64) * 2
    torch.testing.assert_close(density.log_prob(z), reference(density).log_prob(z))
    noise = torch.randn(200_000, density.noise_width, generator=torch.Generator().manual_seed(1))
    drawn = density.sample(noise).double()
    expected = reference(density)
    torch.testing.assert_close(drawn.mean(0), expected.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(0), expected.variance, atol=0.03, rtol=0.02)


def test_samples_of_a_mixture_have_its_density():
    """The mean of log p over samples is the entropy by quadrature, with its sign."""
    density = mixture(3, 1)
    points, cell = grid(1, 12, 20_001)
    log_p = density.log_prob(points)
    assert float(log_p.exp().sum() * cell) == pytest.approx(1, abs=1e-6)
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(2))
    found = float(density.log_prob(density.sample(noise)).mean())
    assert found == pytest.approx(float((log_p.exp() * log_p).sum() * cell), abs=0.02)


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_a_flow_is_inverted_and_its_log_det_is_that_of_the_jacobian(dim):
    density = flow(dim).double()
    z = torch.randn(8, dim, dtype=torch.float64) * 2
    noise, log_det = density(z)
    torch.testing.assert_close(density.sample(noise).double(), z, atol=1e-5, rtol=1e-5)
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(lambda x: density(x[None])[0][0], z[i])
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet)
    normal = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
    torch.testing.assert_close(density.log_prob(z), normal.log_prob(noise) + log_det)


def test_the_density_of_a_flow_integrates_to_one_and_is_that_of_its_samples():
    density = flow(2).double()
    points, cell = grid(2, 20, 601)
    log_p = density.log_prob(points)
    assert float(log_p.exp().sum() * cell) == pytest.approx(1, abs=1e-3)
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(3))
    drawn = density.sample(noise).double()
    mean = (log_p.exp()[:, None] * points).sum(0) * cell
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)


def test_a_new_flow_is_its_gaussian_and_a_stored_one_is_itself():
    start = mixture(1, 5)
    new = Flow(start.means[0], start.factors[0])
    z = torch.randn(9, 5)
    expected = MultivariateNormal(start.means[0], scale_tril=start.factors[0]).log_prob(z.double())
    torch.testing.assert_close(new.log_prob(z).double(), expected, atol=1e-4, rtol=1e-5)
    old = flow(5)
    torch.testing.assert_close(flow_of(old.tensors()).log_prob(z), old.log_prob(z))
