"""The loss against its formula: autograd of the contract."""

import math

import pytest
import torch

from dsvae.modeling.crf import IGNORE
from dsvae.modeling.families import Categorical, CategoricalFamily, Gaussian, GaussianFamily
from dsvae.modeling.t5_vae import T5VAEOutput
from dsvae.objective.elbo import (
    Penalty,
    information_of_pairs,
    loss_share,
    negative_entropy,
    products_of_pairs,
    reconstruction_weights,
)

EOS = 1
MEAN_KL = {"kl": torch.tensor([0.1, 0.5, 2.0])}


def statistics_of(penalty, posterior, prior, **heads):
    """Those of what a forward pass returned."""
    return penalty.statistics(T5VAEOutput(posterior=posterior, prior=prior, **heads))


def means(statistics):
    return {name: each.detach().mean(0) for name, each in statistics.items()}


def test_by_length_a_sentence_counts_with_the_mean_of_its_tokens():
    """Two sentences of 3 and 1 tokens and a filler, by hand."""
    labels = torch.tensor([[2, 3, EOS], [EOS, IGNORE, IGNORE], [EOS, IGNORE, IGNORE]])
    rec, weight = torch.tensor([6.0, 4.0, 7.0]), torch.tensor([1.0, 1.0, 0.0])
    kl = torch.tensor([[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]])
    slopes = {"kl": torch.full((2,), 0.5)}
    for by_length, expected in ((False, 6 + 4), (True, 6 / 3 + 4)):
        weights = reconstruction_weights(weight, labels, by_length)
        loss = loss_share(weights @ rec, {"kl": kl}, weight, slopes, 2)
        # 0.5 * (3 + 3) / 2 = 1.5 is the KL's part of both
        assert loss.item() == pytest.approx(expected / 2 + 1.5)
        parts = [
            loss_share(weights[[i]] @ rec[[i]], {"kl": kl[[i]]}, weight[[i]], slopes, 2)
            for i in range(3)
        ]
        assert sum(parts).item() == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("mode", "free_bits", "expected"),
    [
        ("dimension", 0.0, 2.6),
        ("dimension", 0.5, 0.5 + 0.5 + 2.0),
        ("dimension", 3.0, 9.0),
        ("total", 0.0, 2.6),
        ("total", 0.5, 2.6),
        ("total", 3.0, 3.0),
    ],
)
def test_threshold_by_hand(mode, free_bits, expected):
    penalty = Penalty(0.5, free_bits, mode)
    assert penalty(MEAN_KL).item() == pytest.approx(0.5 * expected)


@pytest.mark.parametrize(
    ("mode", "free_bits", "expected"),
    [
        ("dimension", 0.3, [0, 1, 1]),
        ("dimension", 3.0, [0, 0, 0]),
        ("total", 0.5, [1, 1, 1]),
        ("total", 3.0, [0, 0, 0]),
    ],
)
def test_slopes_by_hand(mode, free_bits, expected):
    penalty = Penalty(0.5, free_bits, mode)
    assert penalty.slopes(MEAN_KL)["kl"].tolist() == [0.5 * each for each in expected]
    assert not penalty.linear


def test_free_bits_of_a_sentence_by_hand():
    """max(lambda, kl) of each sentence's each unit; a gradient where the KL is above."""
    mean = torch.tensor([[1.0, 0.2, 3.0], [0.1, 0.3, 2.0]], requires_grad=True)
    penalty = Penalty(0.5, 0.25, "sentence")
    posterior = Gaussian(mean, torch.zeros(2, 3))
    statistics = statistics_of(penalty, posterior, GaussianFamily(3).prior())
    kl = mean.detach().square() / 2
    torch.testing.assert_close(statistics["kl"].detach(), kl)
    assert penalty.linear
    anywhere = {name: torch.ones(each.shape[1]) for name, each in statistics.items()}
    loss = loss_share(torch.zeros(()), statistics, torch.ones(2), penalty.slopes(anywhere), 2)
    expected = 0.5 * torch.maximum(kl, torch.tensor(0.25)).sum() / 2
    assert penalty(means(statistics)).item() == pytest.approx(expected.item())
    loss.backward()
    by_hand = torch.tensor([[1.0, 0, 3.0], [0, 0, 2.0]]) * 0.5 / 2
    torch.testing.assert_close(mean.grad, by_hand)


class Linear:
    """rec (N,) and kl (N, Z) from two weight matrices, in float64, both positive as
    nats are."""

    def __init__(self, count=13, features=4, dim=3):
        rng = torch.Generator().manual_seed(4)
        self.inputs = torch.randn(count, features, generator=rng, dtype=torch.float64)
        self.for_rec = torch.randn(features, generator=rng, dtype=torch.float64).requires_grad_()
        self.for_kl = torch.randn(
            features, dim, generator=rng, dtype=torch.float64
        ).requires_grad_()

    def __call__(self, rows):
        return (self.inputs[rows] @ self.for_rec).exp(), (self.inputs[rows] @ self.for_kl).square()

    def gradient(self, loss):
        return torch.autograd.grad(loss, (self.for_rec, self.for_kl), allow_unused=True)

    def contract(self, beta, free_bits, mode):
        """(1/N) sum rec + beta * T(mean kl), with the maximum written out."""
        rec, kl = self(slice(None))
        mean = kl.mean(0)
        floor = torch.tensor(free_bits, dtype=torch.float64)
        threshold = (
            torch.maximum(mean, floor).sum()
            if mode == "dimension"
            else torch.maximum(mean.sum(), floor)
        )
        return self.gradient(rec.mean() + beta * threshold)

    def in_shares(self, beta, free_bits, mode, splits):
        """The sum of the gradients of the shares; each split is (rows, weight)."""
        count = len(self.inputs)
        with torch.no_grad():
            mean = {"kl": self(slice(None))[1].mean(0)}
            slopes = Penalty(beta, free_bits, mode).slopes(mean)
        total = [torch.zeros_like(self.for_rec), torch.zeros_like(self.for_kl)]
        for rows, weight in splits:
            rec, kl = self(rows)
            for sum_, part in zip(
                total,
                self.gradient(loss_share(weight @ rec, {"kl": kl}, weight, slopes, count)),
                strict=True,
            ):
                sum_ += 0 if part is None else part
        return total


def splits(seed, parts, fillers):
    """13 sentences in random order, in `parts` uneven parts, some with a filler of
    weight 0 behind them."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(13, generator=rng)
    cuts = sorted((torch.randperm(12, generator=rng)[: parts - 1] + 1).tolist())
    found = []
    for part in torch.tensor_split(order, cuts):
        extra = torch.randint(0, 13, (fillers,), generator=rng)
        found.append(
            (
                torch.cat([part, extra]),
                torch.cat([torch.ones(len(part)), torch.zeros(fillers)]).double(),
            )
        )
    return found


@pytest.mark.parametrize("mode", ["dimension", "total"])
@pytest.mark.parametrize("where", ["none", "below all", "between", "above all"])
def test_shares_of_any_split_sum_to_the_gradient_of_the_contract(mode, where):
    model = Linear()
    mean = model(slice(None))[1].mean(0).detach()
    middle = mean.sort().values[:2].mean().item()
    free_bits = {
        "none": 0.0,
        "below all": 0.5 * mean.min().item(),
        "between": middle,
        "above all": 2 * mean.sum().item(),
    }[where]
    expected = model.contract(0.7, free_bits, mode)
    gated = (expected[1].abs().amax(0) == 0).sum()  # dimensions without a gradient
    assert gated == {"above all": 3, "between": 1 if mode == "dimension" else 0}.get(where, 0)
    for seed, parts, fillers in ((0, 1, 0), (1, 2, 0), (2, 5, 2), (3, 13, 1)):
        got = model.in_shares(0.7, free_bits, mode, splits(seed, parts, fillers))
        for mine, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_a_filler_has_no_gradient():
    rec, kl = torch.rand(3, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 1.0])
    slopes = {"kl": torch.full((2,), 0.5)}
    loss_share(weight @ rec, {"kl": kl}, weight, slopes, 4).backward()
    assert rec.grad.tolist() == [0.25, 0, 0.25]
    assert kl.grad.tolist() == [[0.125, 0.125], [0, 0], [0.125, 0.125]]


def test_without_a_penalty_the_kl_has_no_gradient_even_where_it_is_infinite():
    assert not Penalty().active
    rec, kl = torch.rand(3, requires_grad=True), torch.full((3, 2), torch.inf)
    loss = loss_share(rec.sum(), {"kl": kl}, torch.ones(3), None, 3)
    loss.backward()
    assert loss.item() == pytest.approx(rec.mean().item())
    torch.testing.assert_close(rec.grad, torch.full((3,), 1 / 3))


# Total correlation


def test_the_pairwise_total_correlation_of_two_variables_by_enumeration():
    """TC = KL(q(z) || prod_d q(z_d)), and the identity: mean KL = I(x; z) + TC + the sum of
    the marginals' KLs."""
    q = Categorical(2 * torch.randn(6, 2, 3, dtype=torch.float64))
    p = q.probabilities
    joint = torch.einsum("nj,nk->njk", p[:, 0], p[:, 1])  # q(z|x_n)
    mean, alone = joint.mean(0), p.mean(0)
    tc = (mean * (mean / (alone[0][:, None] * alone[1][None])).log()).sum()
    found = information_of_pairs(p.mean(0), products_of_pairs(p).mean(0))
    torch.testing.assert_close(found, tc)
    information = (joint * (joint / mean).log()).sum((1, 2)).mean()
    marginals = (alone * (alone * 3).log()).sum()
    kl = q.kl(CategoricalFamily(2, 3).prior()).double().sum(-1).mean()
    torch.testing.assert_close(information + tc + marginals, kl)


def in_float64(statistics):
    return {name: each.double() for name, each in statistics.items()}


def test_shares_with_total_correlation_sum_to_the_gradient_of_the_undivided_batch():
    torch.manual_seed(5)
    penalty, prior = Penalty(0.7, 0.2, "dimension", 3.0), CategoricalFamily(4, 3).prior()
    logits = (2 * torch.randn(13, 4, 3, dtype=torch.float64)).requires_grad_()
    p = logits.softmax(-1)
    kl = (p * (p.log() + math.log(3))).sum(-1).mean(0)
    joint = torch.einsum("ndj,nek->dejk", p, p) / 13
    alone = p.mean(0)
    information = (joint * (joint / torch.einsum("dj,ek->dejk", alone, alone)).log()).sum((2, 3))
    loss = 0.7 * torch.maximum(kl, torch.tensor(0.2)).sum() + 3 * information.triu(1).sum()
    (expected,) = torch.autograd.grad(loss, logits)
    statistics = statistics_of(penalty, Categorical(logits), prior)
    slopes = in_float64(penalty.slopes(means(statistics)))
    for parts in ([slice(0, 13)], [slice(0, 4), slice(4, 5), slice(5, 13)]):
        got = torch.zeros_like(logits)
        for part in parts:
            own = in_float64(statistics_of(penalty, Categorical(logits[part]), prior))
            ones = torch.ones(len(logits[part])).double()
            share = loss_share(torch.zeros(()), own, ones, slopes, 13)
            got += torch.autograd.grad(share, logits)[0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


# Clusters


def test_the_cluster_terms_of_one_sentence_cancel():
    """Skewness H(r), dispersion -H(r)."""
    r = torch.tensor([[0.7, 0.2, 0.1]])
    q, prior = Gaussian(torch.ones(1, 2), torch.zeros(1, 2)), GaussianFamily(2).prior()
    entropy = -(r * r.log()).sum().item()
    for skewness, dispersion, expected in ((2.0, 2.0, 0), (3.0, 0, 3), (0, 0.5, -0.5)):
        penalty = Penalty(skewness=skewness, dispersion=dispersion)
        assert penalty.active
        assert penalty.linear == (dispersion == 0)
        value = penalty(means(statistics_of(penalty, q, prior, clusters=r))).item()
        assert value == pytest.approx(expected * entropy, abs=1e-6)


def test_dispersion_is_least_where_the_clusters_are_even():
    r = 5
    even = torch.full((r,), 1 / r)
    assert negative_entropy(even).item() == pytest.approx(-math.log(r))
    assert negative_entropy(torch.eye(r)[0]) == 0
    penalty, kl = Penalty(dispersion=1.0), torch.zeros(2)
    slopes = penalty.slopes({"kl": kl, "clusters": even})
    assert slopes["kl"].tolist() == [0, 0]
    torch.testing.assert_close(slopes["clusters"], torch.full((r,), 1 - math.log(r)))  # ln m + 1
    for _ in range(20):
        assert penalty({"kl": kl, "clusters": torch.rand(r).softmax(0)}) >= -math.log(r)


def test_a_probability_that_underflows_leaves_every_gradient_finite():
    logits = torch.tensor([[0.0, -300.0], [0.0, -300.0]], requires_grad=True)
    q, prior = Gaussian(torch.zeros(2, 1), torch.zeros(2, 1)), GaussianFamily(1).prior()
    penalty = Penalty(skewness=1.0, dispersion=1.0)
    statistics = statistics_of(penalty, q, prior, clusters=logits.softmax(-1))
    slopes = penalty.slopes(means(statistics))
    loss_share(torch.zeros(()), statistics, torch.ones(2), slopes, 2).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["dimension", "sentence"])
@pytest.mark.parametrize("total_correlation", [0.0, 3.0])
@pytest.mark.parametrize(("skewness", "dispersion"), [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_shares_with_clusters_sum_to_the_gradient_of_the_undivided_batch(
    mode, total_correlation, skewness, dispersion, beta
):
    """All terms together, whatever their order among the statistics."""
    rng = torch.Generator().manual_seed(6)
    logits = (2 * torch.randn(13, 3, 4, generator=rng, dtype=torch.float64)).requires_grad_()
    hidden = (2 * torch.randn(13, 5, generator=rng, dtype=torch.float64)).requires_grad_()
    p, r = logits.softmax(-1), hidden.softmax(-1)
    kl = (p * (p.log() + math.log(4))).sum(-1)
    floor = torch.tensor(0.4)
    penalized = (
        torch.maximum(kl.mean(0), floor).sum()
        if mode == "dimension"
        else torch.maximum(kl, floor).sum(-1).mean()
    )
    joint = torch.einsum("ndj,nek->dejk", p, p) / 13
    alone = p.mean(0)
    information = (joint * (joint / torch.einsum("dj,ek->dejk", alone, alone)).log()).sum((2, 3))
    m = r.mean(0)
    loss = (
        beta * penalized
        + total_correlation * information.triu(1).sum()
        - skewness * (r * r.log()).sum(-1).mean()
        + dispersion * (m * m.log()).sum()
    )
    expected = torch.autograd.grad(loss, (logits, hidden), materialize_grads=True)
    penalty = Penalty(
        beta,
        0.4,
        mode,
        total_correlation,
        skewness=skewness,
        dispersion=dispersion,
    )
    prior = CategoricalFamily(3, 4).prior()
    mean = means(statistics_of(penalty, Categorical(logits), prior, clusters=r))
    slopes = in_float64(penalty.slopes(mean))
    torch.testing.assert_close(penalty(mean).double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for parts in ([slice(0, 13)], [slice(0, 4), slice(4, 5), slice(5, 13)]):
        got = [torch.zeros_like(logits), torch.zeros_like(hidden)]
        for part in parts:
            clusters = hidden[part].softmax(-1)
            own = statistics_of(penalty, Categorical(logits[part]), prior, clusters=clusters)
            ones = torch.ones(len(clusters)).double()
            share = loss_share(torch.zeros(()), in_float64(own), ones, slopes, 13)
            gradients = torch.autograd.grad(share, (logits, hidden), materialize_grads=True)
            got = [total + each for total, each in zip(got, gradients, strict=True)]
        for mine, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_clusters_that_nothing_penalizes_change_nothing():
    q, prior = Gaussian(torch.randn(4, 3), torch.randn(4, 3)), GaussianFamily(3).prior()
    penalty = Penalty(0.5, 0.2)
    statistics = statistics_of(penalty, q, prior, clusters=torch.rand(4, 6).softmax(-1))
    assert list(statistics) == ["kl"]
    assert torch.equal(statistics["kl"], q.kl(prior))


@pytest.mark.parametrize(
    ("term", "needed"),
    [
        ("skewness", "clusters"),
        ("dispersion", "clusters"),
        ("class_weight", "class_nats"),
        ("tag_weight", "tag_nats"),
    ],
)
def test_a_term_of_a_head_that_the_model_lacks_is_refused(term, needed):
    q, prior = Gaussian(torch.randn(4, 3), torch.randn(4, 3)), GaussianFamily(3).prior()
    with pytest.raises(ValueError, match=f"needs {needed}"):
        statistics_of(Penalty(**{term: 0.1}), q, prior)
