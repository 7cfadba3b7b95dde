"""A T5VAE with heads: what they cost, which weights they train, and what they leave alone."""

import pytest
import torch
from small_models import make_vae, plain_nats
from torch.nn import functional as F

from dsvae import T5VAE
from dsvae.modeling.crf import IGNORE
from dsvae.objective.elbo import Penalty, loss_share

HEADS = {"classes": ["no", "yes", "maybe"], "tags": ["O", "B-X", "I-X"], "clusters": 4}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def labelled(batch):
    """The arguments of `forward` for five sentences, of which the second has no class and
    the third no tags."""
    ids, mask, labels = batch
    torch.manual_seed(3)
    tags = torch.randint(0, 3, ids.shape).masked_fill(mask == 0, IGNORE)
    tags[:, ::3] = IGNORE  # later pieces of words
    tags[2] = IGNORE
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "class_labels": torch.tensor([2, IGNORE, 0, 1, 1]),
        "tag_labels": tags,
    }


def test_the_losses_of_the_heads_by_hand(labelled):
    model = make_vae(**HEADS)
    out = model(**labelled)
    ids, mask = labelled["input_ids"], labelled["attention_mask"]
    states = model.encoder(inputs_embeds=model.shared(ids), attention_mask=mask)[0]
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    logits = pooled @ model.class_head.weight.T + model.class_head.bias
    torch.testing.assert_close(out.class_logits, logits, **CLOSE)
    expected = -logits.log_softmax(-1)[[0, 2, 3, 4], [2, 0, 1, 1]]
    torch.testing.assert_close(out.class_nats[[0, 2, 3, 4]], expected, **CLOSE)
    # one sentence at a time, its words alone, with every sequence of tags written out
    emissions = states @ model.tag_head.head.weight.T + model.tag_head.head.bias
    crf = model.tag_head.crf
    for row in range(len(ids)):
        at = labelled["tag_labels"][row] != IGNORE
        tags, scores = labelled["tag_labels"][row][at], emissions[row][at]
        if not len(tags):
            continue
        every = torch.cartesian_prod(*[torch.arange(3)] * len(tags)).view(-1, len(tags))

        def score(path, scores=scores):
            chosen = scores[torch.arange(len(path)), path].sum()
            steps = crf.transitions[path[:-1], path[1:]].sum()
            return crf.start[path[0]] + chosen + steps + crf.end[path[-1]]

        total = torch.stack([score(path) for path in every]).logsumexp(0)
        torch.testing.assert_close(out.tag_nats[row], total - score(tags), atol=1e-3, rtol=1e-4)
    assert (out.class_nats[1], out.tag_nats[2]) == (0, 0)
    assert (out.tags[labelled["tag_labels"] == IGNORE] == IGNORE).all()
    torch.testing.assert_close(out.clusters.sum(-1), torch.ones(5))


def test_a_batch_is_its_sentences_one_by_one(labelled):
    model = make_vae(**HEADS)
    whole = model(**labelled)
    for row in range(5):
        length = int(labelled["attention_mask"][row].sum())
        one = {
            name: each[row : row + 1] if each.ndim == 1 else each[row : row + 1, :length]
            for name, each in labelled.items()
        }
        alone = model(**one)
        torch.testing.assert_close(
            alone.posterior.parameters[0], whole.posterior.parameters[row], atol=1e-4, rtol=1e-4
        )
        for name in ("class_logits", "class_nats", "tag_nats", "clusters"):
            torch.testing.assert_close(alone[name][0], whole[name][row], atol=1e-4, rtol=1e-4)
        assert alone.tags[0].tolist() == whole.tags[row, :length].tolist()


def test_heads_for_labels_leave_the_vae_alone(labelled):
    with_heads, plain = make_vae(classes=["a", "b"], tags=["O", "B-X"]), make_vae()
    plain.load_state_dict(
        {n: w for n, w in with_heads.state_dict().items() if n in plain.state_dict()}
    )
    vae = {name: labelled[name] for name in ("input_ids", "attention_mask", "labels")}
    assert torch.equal(with_heads(**vae).logits, plain(**vae).logits)


def test_every_head_trains_and_only_on_what_has_labels(labelled):
    model = make_vae(**HEADS).train()
    for name, key in (("class_nats", "class_head."), ("tag_nats", "tag_head.")):
        model.zero_grad()
        model(**labelled)[name].sum().backward()
        trained = {n for n, w in model.named_parameters() if w.grad is not None and w.grad.any()}
        assert {n for n, _ in model.named_parameters() if n.startswith(key)} <= trained
        assert any(n.startswith("encoder.") for n in trained)
        assert not any(n.startswith(("decoder.", "lm_head.", "injection.")) for n in trained)
    unlabelled = labelled | {
        name: torch.full_like(labelled[name], IGNORE) for name in ("class_labels", "tag_labels")
    }
    model.zero_grad()
    out = model(**unlabelled)
    (out.class_nats + out.tag_nats).sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in model.class_head.parameters())
    assert all(w.grad is not None and not w.grad.any() for w in model.tag_head.parameters())


def test_the_share_of_each_micro_batch_adds_up_to_the_gradient_of_the_whole(labelled):
    """Against autograd of the loss written out, with all terms at once."""
    model = make_vae(**HEADS)
    weights = {"skewness": 0.3, "dispersion": 0.7, "class_weight": 2.0, "tag_weight": 0.5}
    penalty = Penalty(0.9, free_bits=0.2, **weights)
    noise = torch.randn(5, 6)

    def forward(rows):
        out = model(**{name: each[rows] for name, each in labelled.items()}, noise=noise[rows])
        return out, out.posterior.kl(out.prior), penalty.statistics(out)

    out, kl, statistics = forward(slice(None))
    r = out.clusters
    loss = plain_nats(out.logits, labelled["labels"]).mean()
    loss = loss + 0.9 * kl.mean(0).clamp(min=0.2).sum() - 0.3 * (r * r.log()).sum(-1).mean()
    loss = loss + 0.7 * (r.mean(0) * r.mean(0).log()).sum()
    labels, has_class = labelled["class_labels"], labelled["class_labels"] != IGNORE
    classes = F.cross_entropy(out.class_logits[has_class], labels[has_class], reduction="sum")
    loss = loss + 2.0 * classes / 5 + 0.5 * out.tag_nats.mean()
    expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    slopes = penalty.slopes({name: each.mean(0) for name, each in statistics.items()})
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 5)):
        out, _, some = forward(rows)
        rec = plain_nats(out.logits, labelled["labels"][rows])
        loss_share(rec.sum(), some, torch.ones(len(rec)), slopes, 5).backward()
    for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_heads_are_saved_and_loaded(labelled, tmp_path):
    model = make_vae(**HEADS)
    model.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    assert (again.config.classes, again.config.tags) == (HEADS["classes"], HEADS["tags"])
    for name in ("class_nats", "tag_nats", "tags", "clusters", "logits"):
        assert torch.equal(again(**labelled)[name], model(**labelled)[name]), name


def test_heads_need_a_latent():
    with pytest.raises(ValueError, match="injection other than none"):
        make_vae(injection="none", classes=["a"])
