"""The heads against their formulas, in plain matrix products."""

import pytest
import torch

from dsvae.modeling.crf import IGNORE, TagHead
from dsvae.modeling.posterior import CLUSTER_WIDTH, OWN_WIDTH, ClusterHead

D, R, P = 12, 5, 6
TAGS = ("O", "B-X", "I-X")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_emissions_are_linear_and_the_nats_reach_every_weight():
    head, states = TagHead(D, TAGS), torch.randn(2, 5, D)
    emissions = head(states)
    torch.testing.assert_close(emissions, states @ head.head.weight.T + head.head.bias)
    tags = torch.tensor([[0, 1, IGNORE, 2, IGNORE], [1, IGNORE, 0, IGNORE, IGNORE]])
    nats = head.crf.nll(emissions, tags)
    softmax = emissions.log_softmax(-1)  # the transitions begin at 0
    expected = [softmax[0, 0, 0] + softmax[0, 1, 1] + softmax[0, 3, 2]]
    expected.append(softmax[1, 0, 1] + softmax[1, 2, 0])
    torch.testing.assert_close(nats, -torch.stack(expected))
    nats.sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in head.parameters())


def test_clusters_by_hand():
    head, pooled = ClusterHead(D, R, P), torch.randn(4, D)
    parameters, r = head(pooled)
    assert (parameters.shape, r.shape) == ((4, P), (4, R))
    for b in range(4):
        h = pooled[b]
        scores = (head.clusters.weight @ h + head.clusters.bias).exp()
        torch.testing.assert_close(r[b], scores / scores.sum())
        rows = head.embedding.weight.T  # E, (R, width)
        mixed = sum(r[b, k] * rows[k] for k in range(R))
        own = head.own.weight @ h + head.own.bias
        assert (len(own), len(mixed)) == (OWN_WIDTH, CLUSTER_WIDTH)
        expected = head.head.weight @ torch.cat([own, mixed]) + head.head.bias
        torch.testing.assert_close(parameters[b], expected)


def test_the_posterior_reads_few_numbers_past_the_cluster():
    """Where the clusters are decided, the parameters move in `OWN_WIDTH` directions only."""
    head = ClusterHead(D, R, parameter_width=20)
    with torch.no_grad():
        head.clusters.weight.zero_()
        head.clusters.bias.copy_(torch.tensor([50.0, 0, 0, 0, 0]))
    jacobian = torch.autograd.functional.jacobian(lambda h: head(h[None])[0][0], torch.randn(D))
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-5) == OWN_WIDTH


def test_both_outputs_reach_their_weights():
    head, pooled = ClusterHead(D, R, P), torch.randn(4, D)
    parameters, r = head(pooled)
    reached = torch.autograd.grad(
        parameters.square().sum(), list(head.parameters()), retain_graph=True
    )
    assert all(gradient.abs().max() > 0 for gradient in reached)
    (found,) = torch.autograd.grad((r * r.log()).sum(), head.clusters.bias)
    # d sum_k r ln r / d logit_k = r_k (ln r_k - sum_j r_j ln r_j)
    expected = r * (r.log() - (r * r.log()).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected.sum(0))


@pytest.mark.parametrize("head", [TagHead(D, TAGS), ClusterHead(D, R, P)])
def test_all_heads_compute_in_float32(head):
    states = torch.randn(2, D) if not isinstance(head, TagHead) else torch.randn(2, 3, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head.bfloat16()(states.bfloat16())
    full = head.float()(states.bfloat16().float())
    outputs = zip(low, full, strict=True) if isinstance(low, tuple) else [(low, full)]
    for mine, reference in outputs:
        assert mine.dtype == torch.float32
        assert torch.equal(mine, reference)
