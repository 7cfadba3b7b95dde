"""The prior by flow matching, against the exact field of Gaussian data."""

import math

import pytest
import torch
from small_models import make_vae
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from dsvae import T5VAE
from dsvae.modeling.denoiser import Denoiser, FlowDraws, flow_errors, follow, guided, initialize

D = 3
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.5, 0, 0], [0.9, 0.4, 0], [-0.3, 0.2, 0.8]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T


def exact(moved, time, estimate=None):
    """E[u - n | u_t] for u from N(MEAN, COVARIANCE): both parts by Gaussian regression."""
    spread = (1 - time) ** 2 * torch.eye(D, dtype=torch.float64) + time**2 * COVARIANCE
    white = torch.linalg.solve(spread, (moved - time * MEAN).T).T
    return MEAN + time * white @ COVARIANCE - (1 - time) * white


def least_error(time):
    """The expected squared error of the exact field: the trace of Cov[u - n | u_t]."""
    eye = torch.eye(D, dtype=torch.float64)
    spread = (1 - time) ** 2 * eye + time**2 * COVARIANCE
    # Cov[u - n, u_t] = t S - (1 - t) I
    shared = time * COVARIANCE - (1 - time) * eye
    return float((COVARIANCE + eye - shared @ torch.linalg.solve(spread, shared.T)).trace())


def ends(solver, steps):
    """Mean and factor of what the sampler makes of N(0, I): it is affine in the noise."""
    noise = torch.cat([torch.zeros(1, D), torch.eye(D)]).double()
    found = follow(exact, noise, steps, solver)
    return found[0], (found[1:] - found[0]).T


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_sampler_gives_the_gaussian_with_the_order_of_its_solver(solver, order):
    errors = []
    for steps in (64, 128, 256):
        mean, factor = ends(solver, steps)
        errors.append(float((mean - MEAN).norm() + (factor @ factor.T - COVARIANCE).norm()))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)
    assert errors[-1] < (0.05 if order == 1 else 1e-3)


def test_the_trace_along_the_path_gives_the_density():
    """d log p / dt = -tr(dv/du) (the instantaneous change of variables)."""
    noise = torch.randn(4, D, dtype=torch.float64)
    start = MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double()).log_prob(noise)

    def joined(state, time, estimate):
        place = state[:, :D]
        slopes = torch.func.vmap(torch.func.jacrev(lambda u: exact(u[None], time)[0]))(place)
        trace = slopes.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
        return torch.cat([exact(place, time), -trace], dim=1)

    found = follow(joined, torch.cat([noise, start[:, None]], dim=1), 100, "heun")
    expected = MultivariateNormal(MEAN, COVARIANCE).log_prob(found[:, :D])
    torch.testing.assert_close(found[:, D], expected, atol=5e-3, rtol=0)


def draws_of(count, width, time=None, estimated=False):
    return FlowDraws(
        torch.randn(count, width),
        torch.rand(count) if time is None else torch.full((count,), time),
        torch.full((count,), estimated),
        torch.ones(count, dtype=torch.bool),
    )


class ExactField(torch.nn.Module):
    vectors = 1

    def forward(self, moved, times, valid, **_):
        return exact(moved[:, 0].double(), float(times[0])).float()[:, None]


@pytest.mark.parametrize("time", [0.0, 0.3, 0.7, 1.0])
def test_the_loss_of_the_exact_field_is_the_least(time):
    count = 200_000
    data = (MEAN + torch.randn(count, D).double() @ FACTOR.T).float()[:, None]
    valid = torch.ones(count, 1, dtype=torch.bool)
    errors = flow_errors(ExactField(), data, valid, draws_of(count, D, time))
    standard_error = float(errors.std()) / count**0.5
    assert float(errors.mean()) == pytest.approx(least_error(time), abs=5 * standard_error)


def denoiser(seed=0, vectors=1, numbers=D, classes=(), width=64, layers=2, randomize=False):
    """A small denoiser; `randomize` gives it weights that all matter."""
    fields = {"width": width, "layers": layers, "classes": list(classes)}
    shape = {"latent_vectors": vectors, "pooling": "chunks", "chunk": 2, "injection": "cross"}
    config = make_vae(latent_dim=numbers, memory_slots=1, **shape).config
    config.denoiser = fields | {"conditional": False}
    torch.manual_seed(seed)
    made = Denoiser(config)
    with torch.no_grad():
        for module in made.modules():
            initialize(module)
        if randomize:
            for parameter in made.parameters():
                parameter.normal_(0, 0.3)
    return made


def test_a_small_network_comes_close_to_the_exact_field():
    network, valid = denoiser(width=32, layers=1), torch.ones(256, 1, dtype=torch.bool)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 300)
        data = (MEAN + torch.randn(256, D).double() @ FACTOR.T).float()[:, None]
        loss = flow_errors(network, data, valid, draws_of(256, D, estimated=step % 2 == 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        noise = torch.randn(4_000, 1, D)
        field = guided(network, torch.ones(4_000, 1, dtype=torch.bool), 1.0)
        found = follow(field, noise, 10, "heun")[:, 0].double()
    torch.testing.assert_close(found.mean(0), MEAN, atol=0.15, rtol=0)
    torch.testing.assert_close(found.T.cov(), COVARIANCE, atol=0.35, rtol=0)


def test_a_new_denoiser_predicts_nothing():
    moved, valid = torch.randn(2, 4, D), torch.ones(2, 4, dtype=torch.bool)
    assert not denoiser(vectors=4)(moved, torch.rand(2), valid).any()


def test_a_batch_with_masks_equals_singles():
    network = denoiser(vectors=5, randomize=True)
    moved, times, estimate = torch.randn(3, 5, D), torch.rand(3), torch.randn(3, 5, D)
    counts = [5, 2, 3]
    valid = torch.arange(5) < torch.tensor(counts)[:, None]
    filled = moved.masked_fill(~valid[..., None], math.nan)
    together = network(filled, times, valid, estimate=estimate)
    assert together.isfinite().all()
    for row, count in enumerate(counts):
        given = moved[row : row + 1, :count], times[row : row + 1], valid[row : row + 1, :count]
        alone = network(*given, estimate=estimate[row : row + 1, :count])
        torch.testing.assert_close(together[row, :count], alone[0], atol=1e-4, rtol=1e-4)
        assert not together[row, count:].any()


def test_guidance_of_one_is_the_conditional_field_and_of_zero_the_other():
    network = denoiser(vectors=2, classes=("a", "b"), randomize=True)
    moved, valid = torch.randn(3, 2, D), torch.ones(3, 2, dtype=torch.bool)
    labels, times = torch.tensor([0, 1, 1]), torch.full((3,), 0.4)
    of_class = network(moved, times, valid, labels=labels)
    without = network(moved, times, valid)
    assert not torch.allclose(of_class, without, atol=1e-2)
    for guidance, expected in (
        (1, of_class),
        (0, without),
        (3, without + 3 * (of_class - without)),
    ):
        found = guided(network, valid, guidance, labels=labels)(moved, 0.4, None)
        torch.testing.assert_close(found, expected)
    unknown = network(moved, times, valid, labels=torch.tensor([-100, -100, 1]))
    torch.testing.assert_close(unknown[:2], without[:2])
    hidden = network(moved, times, valid, labels=labels, conditioned=torch.tensor([0, 1, 0]).bool())
    torch.testing.assert_close(hidden[1], of_class[1])
    torch.testing.assert_close(hidden[[0, 2]], without[[0, 2]])


def test_the_normalizer_has_an_inverse_and_stays_float32():
    network = denoiser(vectors=2)
    network.mean.normal_()
    network.std.uniform_(0.5, 2)
    z = torch.randn(4, 2 * D)
    torch.testing.assert_close(network.raw(network.normalized(z)), z)
    before = network.mean.clone()
    assert torch.equal(network.bfloat16().mean, before)


def with_denoiser(**more):
    fields = {"width": 32, "layers": 2, "classes": ["x", "y"], "conditional": bool(more)}
    shape = {"pooling": "chunks", "chunk": 2, "latent_vectors": 5, "injection": "cross"}
    model = make_vae(denoiser=fields, **{"memory_slots": 1, **shape, **more})
    model.denoiser.mean.normal_()
    model.denoiser.std.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("conditional", [False, True])
def test_the_model_gives_the_errors_of_each_text_alone(batch, conditional):
    """In a batch, with padding or without, and independently of the other texts."""
    more = {"conditional": True, "prior": "fixed", "latent_vectors": 9} if conditional else {}
    model, (ids, mask, _) = with_denoiser(**more), batch
    width = model.family.latent_width
    noise, draws = torch.randn(5, model.family.noise_width), draws_of(5, width, estimated=True)
    labels = torch.tensor([0, 1, -100, 1, 0])
    condition = {"condition_ids": ids[:, :4].clamp(min=1)} if conditional else {}
    kept = {"class_labels": labels, "noise": noise, "flow": draws, **condition}
    together = model(ids, mask, **kept)
    padded = model(F.pad(ids, (0, 4)), F.pad(mask, (0, 4)), **kept)
    torch.testing.assert_close(padded.flow_errors, together.flow_errors, atol=1e-3, rtol=1e-4)
    for row, length in enumerate(mask.sum(1).tolist()):
        one = slice(row, row + 1)
        alone = model(
            ids[one, :length],
            noise=noise[one],
            flow=FlowDraws(*(each[one] for each in draws)),
            class_labels=labels[one],
            **{name: each[one] for name, each in condition.items()},
        )
        torch.testing.assert_close(
            alone.flow_errors, together.flow_errors[one], rtol=1e-4, atol=1e-3
        )
        assert int(alone.flow_numbers) == math.ceil(length / 2) * model.config.latent_dim


def test_a_model_keeps_its_denoiser_when_it_is_saved(tmp_path):
    model = with_denoiser()
    model.save_pretrained(tmp_path)
    loaded = T5VAE.from_pretrained(tmp_path)
    assert loaded.config.denoiser == model.config.denoiser
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert "denoiser.mean" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    half = T5VAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in half.denoiser.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("field", [{"width": 0}, {"depth": 3}])
def test_a_field_that_does_not_fit_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        make_vae(denoiser=field)
