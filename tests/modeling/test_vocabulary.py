"""The loss on the vocabulary against torch's own on all logits at once."""

import pytest
import torch
from small_models import make_vae, plain_nats
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dsvae.modeling import vocabulary
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.vocabulary import VocabularyHead
from dsvae.planning.dry_run import LiveBytes

EOS = 1


def sentences(width=7, vocab=11, seed=0):
    """Logits (4, T, V) and labels of sentences of 5, 1, 7 and 3 tokens, EOS last,
    padded to `width`."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.full((4, width), IGNORE)
    for row, length in enumerate((5, 1, 7, 3)):
        labels[row, :length] = torch.randint(2, vocab, (length,), generator=rng)
        labels[row, length - 1] = EOS
    return 3 * torch.randn(4, width, vocab, generator=rng), labels


def head_of(weight):
    head = VocabularyHead(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    head.weight.data.copy_(weight)
    return head


def nats(logits, labels):
    """The nats of given logits: the projection is the identity."""
    head = head_of(torch.eye(logits.shape[-1], dtype=logits.dtype))
    return head(logits, labels, torch.ones(len(labels)))


def test_nats_are_the_sum_over_the_tokens_eos_included():
    logits, labels = sentences()
    expected = []
    for b in range(4):
        total = 0.0
        for t in range(labels.shape[1]):
            if labels[b, t] != IGNORE:
                total -= torch.log_softmax(logits[b, t].double(), 0)[labels[b, t]].item()
        expected.append(total)
    each, total = nats(logits, labels)
    torch.testing.assert_close(each, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert total.item() == pytest.approx(sum(expected), rel=1e-5)
    # the sentence that is EOS alone
    torch.testing.assert_close(each[1], -torch.log_softmax(logits[1, 0], 0)[EOS])


def test_the_likeliest_pieces_are_counted_where_there_are_tokens():
    logits, labels = sentences()
    head = head_of(torch.eye(logits.shape[-1]))
    right = torch.full((labels.numel(),), 7)
    with torch.no_grad():
        each, _ = head(logits, labels, torch.ones(4), right)
    assert torch.equal(right.view_as(labels), (logits.argmax(-1) == labels).long())
    assert 0 < right.sum() < (labels != IGNORE).sum()
    torch.testing.assert_close(each, nats(logits, labels)[0])


def test_padding_changes_neither_the_nats_nor_their_gradient():
    """The paper's code averages over all positions, so there padding to twice the width
    doubles the effective beta."""
    logits, labels = sentences()
    narrow = logits.clone().requires_grad_()
    wide = torch.cat([logits, torch.full_like(logits, 5.0)], 1).requires_grad_()
    wide_labels = F.pad(labels, (0, labels.shape[1]), value=IGNORE)
    (each, total), (wide_each, wide_total) = nats(narrow, labels), nats(wide, wide_labels)
    torch.testing.assert_close(each, wide_each)
    total.backward()
    wide_total.backward()
    torch.testing.assert_close(wide.grad[:, : labels.shape[1]], narrow.grad)
    assert wide.grad[wide_labels == IGNORE].abs().max() == 0
    assert (wide.grad[wide_labels != IGNORE].abs().amax(-1) > 0).all()


def test_low_precision_logits_are_summed_in_float32():
    logits, labels = sentences()
    half = logits.bfloat16()
    each, _ = nats(half, labels)
    exact = -torch.log_softmax(half.double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert each.dtype == torch.float32
    expected = (exact * (labels != IGNORE)).sum(1)
    torch.testing.assert_close(each.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 28, 1000])
def test_in_pieces_the_gradients_are_those_of_the_plain_loss(rows, frozen, monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", rows * 11 + 5)
    rng = torch.Generator().manual_seed(1)
    _, labels = sentences()
    weight = torch.randn(11, 6, generator=rng)
    given = torch.randn(4, 7, 6, generator=rng)
    weights = torch.tensor([1.0, 0.0, 2.5, 1.0])
    results = []
    for plain in (True, False):
        head, hidden = head_of(weight).requires_grad_(not frozen), given.clone().requires_grad_()
        if plain:
            each = plain_nats(head(hidden), labels)
            total = weights @ each
        else:
            each, total = head(hidden, labels, weights)
            assert not each.requires_grad
        (total * 3).backward()
        results.append((each.detach(), total.detach(), hidden.grad, head.weight.grad))
    for plain, ours in zip(*results, strict=True):
        assert (plain is None) == (ours is None)
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


def test_bfloat16_gradients_are_as_close_to_the_exact_ones_as_the_plain_ones(monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", 5 * 400)
    rng = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 400, (4, 50), generator=rng)
    weight = torch.randn(400, 32, generator=rng).bfloat16()
    given = torch.randn(4, 50, 32, generator=rng).bfloat16()

    def gradients(dtype, loss):
        head, hidden = head_of(weight.to(dtype)), given.to(dtype, copy=True).requires_grad_()
        loss(head, hidden).backward()
        return hidden.grad.double(), head.weight.grad.double()

    def plain(head, hidden):
        return plain_nats(head(hidden), labels).sum()

    exact = gradients(torch.float32, plain)
    all_at_once = gradients(torch.bfloat16, plain)
    ours = gradients(torch.bfloat16, lambda head, hidden: head(hidden, labels, torch.ones(4))[1])
    for true, usual, found in zip(exact, all_at_once, ours, strict=True):
        assert (found - true).norm() < 1.2 * (usual - true).norm()


def test_under_autocast_no_product_is_in_float32():
    """Its gradients are as close to the exact ones as those of torch's own loss."""
    torch.manual_seed(0)
    logits, labels = sentences(vocab=40)
    hidden, weight = torch.randn(4, 7, 24), torch.randn(40, 24) / 5
    target = labels.flatten().clamp(min=0)
    present = (labels != IGNORE).flatten().float()

    def gradients(loss):
        given = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss(*given).backward()
        return [each.grad for each in given]

    def plain(hidden, weight):
        logits = F.linear(hidden, weight).flatten(0, 1).float()
        return F.cross_entropy(logits, target, reduction="none") @ present

    exact = gradients(plain)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "matmul"):
                products.append({each.dtype for each in args if isinstance(each, torch.Tensor)})
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Products():
        own, head = hidden.clone().requires_grad_(), head_of(weight)
        head(own, labels, torch.ones(4))[1].backward()
    found = [own.grad, head.weight.grad]
    assert products == 3 * [{torch.bfloat16}]  # the logits and both gradients
    assert [each.dtype for each in found] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(plain)
    for each, theirs, true in zip(found, low, exact, strict=True):
        assert (each - true).norm() < 1.1 * (theirs - true).norm() + 1e-6


def test_the_logits_are_never_all_in_memory(monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", 20_000)
    labels = torch.randint(0, 2_000, (4, 100))
    peaks = []
    for plain in (True, False):
        head, hidden = VocabularyHead(16, 2_000), torch.randn(4, 100, 16, requires_grad=True)
        live = LiveBytes()
        with live:
            live.restart()
            if plain:
                plain_nats(head(hidden), labels).sum().backward()
            else:
                head(hidden, labels, torch.ones(4))[1].backward()
            peaks.append(live.restart())
    assert peaks[1] < peaks[0] / 4


def test_weights_without_labels_are_refused():
    with pytest.raises(ValueError, match="sentence_weights weigh the nats of labels"):
        make_vae()(
            latent=torch.zeros(1, 6),
            decoder_input_ids=torch.zeros(1, 3, dtype=torch.long),
            sentence_weights=torch.ones(1),
        )
