"""The term of a learned prior where the KL has no weight, and which steps have it."""

import pytest
import torch

from dsvae import config as configuration
from dsvae.modeling.families import CategoricalFamily, GaussianFamily, SpikeSlabFamily
from dsvae.modeling.t5_vae import T5VAEOutput
from dsvae.objective.elbo import Penalty, loss_share
from dsvae.phases import Phase


def statistics_of(penalty, posterior, prior):
    return penalty.statistics(T5VAEOutput(posterior=posterior, prior=prior))


FAMILIES = [GaussianFamily(4), SpikeSlabFamily(4, (4.0, 1.0)), CategoricalFamily(3, 4)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "penalty",
    [
        Penalty(0.7, 0.3, "dimension"),
        Penalty(0.7, 0.3, "sentence"),
        Penalty(prior_alone=True),
        Penalty(0.0, 0.3, "sentence", prior_alone=True),
    ],
)
def test_the_gradient_of_both_heads_is_that_of_the_undivided_batch(family, penalty):
    """Against autograd of the formula; here with two micro-batches of 2 and 4
    sentences."""
    torch.manual_seed(0)
    shape = (6, family.parameter_width)
    q, p = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    kl = family.of(q).kl(family.of(p))
    if penalty.prior_alone:
        loss = family.of(q.detach()).kl(family.of(p)).sum() / 6
    elif penalty.mode == "dimension":
        loss = penalty.beta * kl.mean(0).clamp(min=penalty.free_bits).sum()
    else:
        loss = penalty.beta * kl.clamp(min=penalty.free_bits).sum() / 6
    expected = torch.autograd.grad(loss, (q, p), allow_unused=True, materialize_grads=True)
    statistics = statistics_of(penalty, family.of(q), family.of(p))
    mean = {name: each.detach().mean(0) for name, each in statistics.items()}
    torch.testing.assert_close(penalty(mean), loss.detach())
    torch.testing.assert_close(mean["kl"], kl.detach().mean(0))
    slopes = penalty.slopes(mean)
    for part in (slice(0, 2), slice(2, 6)):
        s = statistics_of(penalty, family.of(q[part]), family.of(p[part]))
        loss_share(torch.zeros(()), s, torch.ones(len(q[part])), slopes, 6).backward()
    torch.testing.assert_close(q.grad, expected[0])
    torch.testing.assert_close(p.grad, expected[1])
    assert bool((q.grad == 0).all()) == penalty.prior_alone
    assert p.grad.abs().max() > 0


def test_the_term_stands_beside_total_correlation():
    family = FAMILIES[2]
    torch.manual_seed(0)
    q, p = (family.of(torch.randn(6, family.parameter_width)) for _ in range(2))
    penalties = [Penalty(0.0, total_correlation=2.0, prior_alone=alone) for alone in (True, False)]
    alone, without = (
        each({name: s.mean(0) for name, s in statistics_of(each, q, p).items()})
        for each in penalties
    )
    torch.testing.assert_close(alone, without + q.kl(p).sum() / 6)


def test_only_a_learned_prior_has_the_term_and_only_where_beta_is_0():
    flags = ["--ds_config", "x.json", "--phase2.steps", "10", "--phase2.beta.zero", "0.5"]
    flags += ["--phase2.beta.rise", "0.5"]
    flags += ["--train_file", "pairs.jsonl", "--phase2.warmup_steps", "0"]
    with_condition = [*flags, "--data.condition_column", "c"]
    for given, learned in (
        (flags, False),
        (with_condition, True),
        ([*with_condition, "--model.prior", "fixed"], False),
        ([*with_condition, "--injection", "none"], False),
    ):
        config = configuration.read(given)
        assert config.learned_prior == learned
        assert Phase(1, config, 0).penalty(0, 0.0) == Penalty(prior_alone=learned)
        second = Phase(2, config, 0)
        found = [second.penalty(step, 0.0) for step in range(10)]
        assert [each.prior_alone for each in found] == [
            learned and each.beta == 0 for each in found
        ]
        assert found[0].beta == 0 < found[9].beta


@pytest.mark.parametrize("mode", ["dimension", "total", "sentence"])
def test_the_loss_of_a_model_without_a_latent_is_its_reconstruction(mode):
    flags = ["--ds_config", "x.json", "--phase2.free_bits", "4", "--phase2.free_bits_mode", mode]
    for injection, penalized in (("memory", True), ("none", False)):
        config = configuration.read([*flags, "--injection", injection])
        penalty = Phase(2, config, 0).penalty(config.phase2.steps - 1, 0.0)
        assert penalty.beta == 1
        assert (penalty.free_bits == 4) == penalized
    mean = {"kl": torch.zeros(0), "above": torch.zeros(1)}
    assert penalty(mean) == 0
