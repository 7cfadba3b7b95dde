"""Packed sentences against the same sentences padded: losses and gradients."""

import numpy as np
import pytest
import torch
from small_models import INJECTIONS, make_vae

from dsvae.data.batches import padded
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.lora import is_adapter
from dsvae.modeling.packing import Packed, Packing

LENGTHS = {
    "input": [9, 7, 8, 6, 3, 5, 4, 1, 3, 1],  # after deletion noise: not in order
    "labels": [9, 9, 8, 6, 6, 5, 4, 4, 4, 1],  # groups with padding, and without
    "condition": [2, 5, 3, 1, 7, 4, 4, 3, 2, 6],
}


def texts(name):
    rng = np.random.default_rng(len(name))
    return [np.append(rng.integers(2, 60, n - 1), 1) for n in LENGTHS[name]]


def batch_of(model, draws=1):
    """What the model reads, and where its tokens lie."""
    input_ids, attention_mask = padded(texts("input"), 0)
    labels = padded(texts("labels"), IGNORE)[0]
    rng = torch.Generator().manual_seed(3)
    shape = (len(labels), draws, model.family.noise_width)
    noise = torch.randn(shape, generator=rng)
    weights = torch.rand(len(labels), generator=rng)
    weights[4] = 0.0  # a filler
    batch = {"noise": noise if draws > 1 else noise[:, 0], "sentence_weights": weights}
    batch |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if model.config.conditional:
        ids, mask = padded(texts("condition"), 0)
        batch |= {"condition_ids": ids, "condition_mask": mask}
    if model.config.classes:
        batch["class_labels"] = torch.arange(len(labels)) % 2
    if model.config.tags:
        batch["tag_labels"] = torch.where(attention_mask.bool(), input_ids % 3, IGNORE)
    lengths = {name: np.array(each) for name, each in LENGTHS.items()}
    condition = Packing.of(lengths["condition"]) if model.config.conditional else None
    of_labels = Packing.of(np.repeat(lengths["labels"], draws))
    return batch, Packed(Packing.of(lengths["input"]), of_labels, condition)


def passed(model, batch, packed):
    """What a training pass gives: numbers per sentence and gradients."""
    model.zero_grad()
    out = model(**batch, packed=packed)
    kl = out.posterior.kl(out.prior)
    weights = batch["sentence_weights"].repeat_interleave(len(kl) // len(batch["labels"]))
    loss = out.weighted_nats + weights @ kl.sum(-1)
    found = {"nats": out.nats, "kl": kl}
    for name in ("class_nats", "tag_nats"):
        if getattr(out, name) is not None:
            found[name] = getattr(out, name)
            loss = loss + batch["sentence_weights"] @ found[name]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: each.detach() for name, each in found.items()}, gradients


def check_same(model, draws=1):
    model.train()
    batch, packed = batch_of(model, draws)
    expected, padded_gradients = passed(model, batch, None)
    found, packed_gradients = passed(model, batch, packed)
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=2e-6, atol=1e-5)
    assert packed_gradients.keys() == padded_gradients.keys()
    largest = max(float(each.abs().max()) for each in padded_gradients.values())
    for name, each in padded_gradients.items():
        scale = float(each.abs().max())
        difference = float((packed_gradients[name] - each).abs().max())
        assert difference <= 1e-5 * scale + 1e-6 * largest, (name, difference / scale)
    return packed_gradients


def tame(model):
    """Weights at which rounding is not enlarged by saturated attention."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "relative_attention_bias" not in name:
                weight.mul_(0.5)
    return model


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5 v1.0", "t5 v1.1", "umt5"])
def test_losses_and_gradients_are_those_of_padded_sentences(kind, injection, conditional):
    if kind == "umt5" and (conditional or injection == "cross"):
        model = make_vae(kind, injection=injection, conditional=conditional)
        batch, packed = batch_of(model)
        with pytest.raises(ValueError, match="umt5 with cross-attention"):
            model(**batch, packed=packed)
        return
    gradients = check_same(tame(make_vae(kind, injection=injection, conditional=conditional)))
    bias = gradients["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert bias.abs().max() > 0


@pytest.mark.parametrize(
    "latent",
    [
        {"pooling": "chunks", "latent_vectors": 3, "chunk": 4, "injection": "memory"},
        {"pooling": "queries", "latent_vectors": 3, "injection": "cross"},
        {"pooling": "attention", "classes": ["a", "b"], "tags": ["O", "B-x", "I-x"]},
        {"clusters": 3, "normalize": "l2"},
        {"conditional": True, "prior": "learned", "pooling": "max"},
        {"injection": "none"},
    ],
    ids=["chunks", "queries", "heads", "clusters", "learned prior", "language model"],
)
def test_vectors_heads_and_priors_are_those_of_padded_sentences(latent):
    check_same(tame(make_vae(**latent)))


def test_several_draws_of_each_sentence():
    check_same(tame(make_vae(injection="both", conditional=True)), draws=3)


def test_with_gradient_checkpointing_and_adapters():
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q", "v", "wi", "wo"]}
    model = tame(make_vae("t5 v1.1", injection="both", conditional=True, lora=lora))
    model.gradient_checkpointing_enable()
    gradients = check_same(model)
    assert any(is_adapter(name) and each.abs().max() > 0 for name, each in gradients.items())


def test_no_layer_computes_padding():
    """The feed-forwards and the head see as many rows as there are tokens."""
    model = make_vae("t5 v1.0", conditional=True)
    batch, packed = batch_of(model)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("DenseReluDense") or name == "lm_head":
            module.register_forward_hook(
                lambda _, given, __, name=name: seen.setdefault(name, set()).add(given[0].shape[:2])
            )
    model.train()(**batch, packed=packed)
    tokens = {name: sum(each) for name, each in LENGTHS.items()}
    for name, shapes in seen.items():
        sides = ("input", "condition") if name.startswith("encoder") else ("labels",)
        assert shapes == {(tokens[side], 1) for side in sides}, name
    assert len(seen) == 6


def test_groups_cover_every_sentence_and_pad_little():
    lengths = np.array([32, 30, 25, 24, 23, 12, 12, 5, 8, 1])
    packing = Packing.of(lengths)
    groups = [(each.rows, each.width, each.full) for each in packing.groups]
    full = [(1, 23, True), (2, 12, True), (1, 1, True)]
    assert groups == [(4, 32, False), *full[:2], (2, 8, False), full[2]]
    numbers = torch.arange(10 * 32).view(10, 32)
    own = torch.arange(32) < torch.tensor(lengths)[:, None]
    tokens = packing.pack(numbers)
    assert torch.equal(tokens[:, 0], numbers[own])
    assert torch.equal(packing.pad(tokens[:, 0]), numbers * own)


def test_a_t5gemma_says_that_it_cannot():
    model = make_vae("t5gemma")
    batch, packed = batch_of(model)
    with pytest.raises(ValueError, match="t5gemma"):
        model(**batch, packed=packed)
