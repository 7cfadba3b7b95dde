"""The CRF against the enumeration of all tag sequences."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from dsvae.modeling.crf import CRF, IGNORE, _words_first

TAGS = ("O", "B-PROF", "I-PROF", "B-OBJ", "I-OBJ")
K = len(TAGS)


def crf(seed=0):
    module = CRF(TAGS)
    rng = torch.Generator().manual_seed(seed)
    for scores in module.parameters():
        scores.data = torch.randn(scores.shape, generator=rng)
    return module


def emissions_of(*shape, seed=1):
    return 2 * torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed))


def all_scores(module, emissions):
    """Every sequence of tags (K^n, n) and its score (K^n,) in float64, for the emissions
    (n, K) of the words of one sentence."""
    count = len(emissions)
    sequences = torch.tensor(list(itertools.product(range(K), repeat=count)))
    start, transitions, end = (scores.double() for scores in module.parameters())
    emissions = emissions.double()
    score = start[sequences[:, 0]] + end[sequences[:, -1]]
    for j in range(count):
        score = score + emissions[j, sequences[:, j]]
    for j in range(count - 1):
        score = score + transitions[sequences[:, j], sequences[:, j + 1]]
    return sequences, score


def possible(sequence):
    """Whether IOB2 allows the sequence of tags."""
    before = "O"
    for tag in (TAGS[k] for k in sequence):
        if tag[0] == "I" and before not in ("B" + tag[1:], tag):
            return False
        before = tag
    return True


def test_one_sentence_of_six_words_by_enumeration():
    """15,625 sequences: probabilities that sum to 1, the NLL, and the best possible one."""
    module, emissions = crf(), emissions_of(6)
    sequences, score = all_scores(module, emissions)
    assert len(sequences) == 15_625
    nats = module.nll(emissions.expand(15_625, -1, -1), sequences)
    torch.testing.assert_close(nats.double(), score.logsumexp(0) - score, rtol=1e-5, atol=1e-5)
    assert nats.dtype == torch.float32
    assert (-nats.double()).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_decoding_finds_the_best_possible_sequence(seed):
    module, emissions = crf(seed), emissions_of(6, seed=seed + 10)
    sequences, score = all_scores(module, emissions)
    allowed = torch.tensor([possible(sequence) for sequence in sequences.tolist()])
    best = sequences[score.masked_fill(~allowed, float("-inf")).argmax()]
    found = module.decode(emissions[None], torch.ones(1, 6))
    assert found[0].tolist() == best.tolist()


def test_what_is_forbidden_is_so_in_decoding_alone():
    module = CRF(TAGS)
    emissions = torch.zeros(1, 2, K)
    emissions[0, 0, 0], emissions[0, 1, 2] = 5.0, 6.0  # O, then I-PROF
    assert module.decode(emissions, torch.ones(1, 2)).tolist() == [[1, 2]]  # B-PROF I-PROF
    softmax = emissions.log_softmax(-1)
    expected = -(softmax[0, 0, 0] + softmax[0, 1, 2])
    torch.testing.assert_close(module.nll(emissions, torch.tensor([[0, 2]]))[0], expected)


def test_plain_names_restrict_nothing_and_names_that_cannot_begin_are_refused():
    module = CRF(("NOUN", "VERB", "INTJ"))
    emissions = torch.randn(3, 4, 3)
    assert torch.equal(module.decode(emissions, torch.ones(3, 4)), emissions.argmax(-1))
    with pytest.raises(ValueError, match="begin"):
        CRF(("I-PROF",))


def test_without_transitions_each_word_is_a_softmax():
    module, emissions = CRF(TAGS), emissions_of(4, 7)
    tags = torch.randint(0, K, (4, 7), generator=torch.Generator().manual_seed(2))
    tags[1, 3:] = IGNORE
    tags[2, ::2] = IGNORE
    expected = F.cross_entropy(emissions.flatten(0, 1), tags.flatten(), reduction="none")
    torch.testing.assert_close(module.nll(emissions, tags), expected.view(4, 7).sum(1))


SHAPES = [[0, 2, 3, 5], [1], [], [0, 1, 2, 3], [4, 6]]
"""The first pieces of the words of five sentences of seven pieces."""


def sentences():
    tags = torch.full((5, 7), IGNORE)
    rng = torch.Generator().manual_seed(3)
    for row, places in enumerate(SHAPES):
        tags[row, places] = torch.randint(0, K, (len(places),), generator=rng)
    return emissions_of(5, 7), tags


def test_only_the_first_pieces_count():
    """Against the enumeration of each sentence's own words; no tags: 0."""
    module = crf()
    emissions, tags = sentences()
    nats, found = module.nll(emissions, tags), module.decode(emissions, tags != IGNORE)
    for row, places in enumerate(SHAPES):
        assert (found[row] != IGNORE).nonzero()[:, 0].tolist() == places
        if not places:
            assert nats[row] == 0
            continue
        sequences, score = all_scores(module, emissions[row, places])
        own = (sequences == tags[row, places]).all(1).nonzero().item()
        torch.testing.assert_close(nats[row].double(), score.logsumexp(0) - score[own])
        allowed = torch.tensor([possible(sequence) for sequence in sequences.tolist()])
        best = sequences[score.masked_fill(~allowed, float("-inf")).argmax()]
        assert found[row, places].tolist() == best.tolist()


def test_a_longer_batch_and_padding_change_nothing():
    module = crf()
    emissions, tags = sentences()
    nats, found = module.nll(emissions, tags), module.decode(emissions, tags != IGNORE)
    for row in range(5):
        alone = module.nll(emissions[row : row + 1], tags[row : row + 1])
        torch.testing.assert_close(alone[0], nats[row], rtol=1e-6, atol=1e-6)
    for left, right in ((0, 4), (3, 2)):
        wide = F.pad(emissions, (0, 0, left, right), value=7.0)
        wide[:, :left] = torch.nan  # whatever stands there is not read
        wide_tags = F.pad(tags, (left, right), value=IGNORE)
        assert torch.equal(module.nll(wide, wide_tags), nats)
        again = module.decode(wide, wide_tags != IGNORE)
        assert torch.equal(again[:, left : left + 7], found)


def test_with_places_for_more_words_nothing_changes(monkeypatch):
    """As on a GPU, where nobody asks how many words there are."""
    torch.manual_seed(0)
    head = CRF(("O", "B-x", "I-x"))
    for scores in head.parameters():
        torch.nn.init.normal_(scores)
    emissions, tags = torch.randn(2, 9, 3), torch.full((2, 9), IGNORE)
    tags[0, [1, 4, 5]], tags[1, 2] = torch.tensor([0, 1, 2]), 1
    expected = head.nll(emissions, tags), head.decode(emissions, tags != IGNORE)
    monkeypatch.setattr("dsvae.modeling.crf._width", lambda mask: mask.shape[1])
    found = head.nll(emissions, tags), head.decode(emissions, tags != IGNORE)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_on_a_device_the_host_does_not_ask_for_the_number_of_words():
    """A tensor of the meta device has no value to ask for."""
    emissions, mask = torch.randn(2, 9, 3, device="meta"), torch.ones(2, 9, device="meta").bool()
    own, places, words = _words_first(emissions, mask)
    assert [len(own[0]), len(places[0]), len(words[0])] == [9, 9, 9]


def test_gradients_are_those_of_the_enumeration():
    module = crf()
    emissions, tags = sentences()
    emissions.requires_grad_()
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5, 3.0])
    found = torch.autograd.grad(
        weights @ module.nll(emissions, tags), [emissions, *module.parameters()]
    )
    total = 0.0
    for row, places in enumerate(SHAPES):
        if places:
            sequences, score = all_scores(module, emissions[row, places])
            own = (sequences == tags[row, places]).all(1).nonzero().item()
            total = total + weights[row] * (score.logsumexp(0) - score[own])
    expected = torch.autograd.grad(total, [emissions, *module.parameters()])
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    assert found[0][2].abs().max() == 0  # the sentence without tags
    assert found[0][tags == IGNORE].abs().max() == 0


def test_a_batch_without_tags_still_reaches_every_weight_with_a_gradient_of_zero():
    """At ZeRO 3 each rank must take part in the reduction of each gradient."""
    module, emissions = crf(), emissions_of(2, 3).requires_grad_()
    nats = module.nll(emissions, torch.full((2, 3), IGNORE))
    assert nats.tolist() == [0, 0]
    nats.sum().backward()
    for tensor in (emissions, *module.parameters()):
        assert tensor.grad.abs().max() == 0


def test_low_precision_is_computed_in_float32():
    module, (emissions, tags) = crf().bfloat16(), sentences()
    half = emissions.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = module.nll(half, tags)
    assert nats.dtype == torch.float32
    assert torch.equal(nats, module.float().nll(half.float(), tags))
