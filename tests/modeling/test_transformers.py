"""A T5VAE as a model of transformers: its loss, its outputs by their names there, and what
the public setters of transformers may change."""

import pytest
import torch
from small_models import INJECTIONS, make_t5, make_vae, plain_nats
from torch.distributions import Categorical, Normal, kl_divergence
from transformers import AutoModelForSeq2SeqLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from dsvae import T5VAE
from dsvae.modeling.t5_vae import LATENT_PATH

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


# The loss


def kl_by_torch(model, out, condition):
    """KL(q || p) of each sentence, (B,), by torch.distributions."""
    if model.config.family == "categorical":
        q = Categorical(logits=out.posterior.logits)
        return kl_divergence(q, Categorical(logits=torch.zeros(4))).sum(-1)
    prior = Normal(0.0, 1.0)
    if condition:
        p = model.prior(**condition)
        prior = Normal(p.mean, (0.5 * p.logvar).exp())
    q = Normal(out.posterior.mean, (0.5 * out.posterior.logvar).exp())
    return kl_divergence(q, prior).sum(-1)


@pytest.mark.parametrize(
    "latent",
    [
        {},
        {"beta": 0.3},
        {"injection": "cross"},
        {"family": "categorical", "categories": 4},
        {"conditional": True, "prior": "learned"},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_negative_elbo_per_sentence(latent, training, batch):
    model = make_vae(**latent).train(training)
    ids, mask, labels = batch
    condition = {}
    if model.config.conditional:
        condition = {"condition_ids": ids[:, :3], "condition_mask": mask[:, :3]}
    noise = torch.randn(5, model.family.noise_width)
    out = model(ids, mask, labels=labels, noise=noise, **condition)
    z = model.encode(ids, mask).sample(noise)
    logits = model(latent=z, labels=labels, **condition).logits
    rec, kl = plain_nats(logits, labels), kl_by_torch(model, out, condition)
    assert kl.min() > 0.1
    expected = (rec + latent.get("beta", 1.0) * kl).mean()
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(out.nats, rec, **CLOSE)
    found, by_hand = (
        torch.autograd.grad(
            each, list(model.parameters()), materialize_grads=True, retain_graph=True
        )
        for each in (out.loss, expected)
    )
    for (name, _), mine, reference in zip(model.named_parameters(), found, by_hand, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-3, msg=name)


def test_the_loss_of_a_language_model_is_its_reconstruction(batch):
    _, _, labels = batch
    model = make_vae(injection="none")
    out = model(labels, labels=labels)
    torch.testing.assert_close(out.loss, plain_nats(out.logits, labels).mean())


def test_a_given_latent_has_no_kl_and_no_loss(batch):
    _, _, labels = batch
    out = make_vae()(latent=torch.randn(5, 6), labels=labels)
    assert out.loss is None
    assert out.posterior is None
    assert out.nats.shape == (5,)


def test_parts_of_a_batch_share_its_number_of_sentences(batch):
    """`num_items_in_batch` are sentences, as the loss is per sentence."""
    model = make_vae().train()
    ids, mask, labels = batch
    noise = torch.randn(5, 6)

    def loss(rows, **items):
        given = {"labels": labels[rows], "noise": noise[rows], **items}
        return model(ids[rows], mask[rows], **given).loss

    whole = torch.autograd.grad(loss(slice(0, 5)), list(model.parameters()))
    parts = [loss(rows, num_items_in_batch=5) for rows in (slice(0, 2), slice(2, 5))]
    for expected, found in zip(
        whole, torch.autograd.grad(sum(parts), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


# Hidden states and attentions


def test_hidden_states_and_attentions_are_those_of_transformers(t5_dir, batch):
    """The decoder's are of a T5 that reads the same vectors by cross-attention."""
    ids, mask, labels = batch
    asked = {"output_hidden_states": True, "output_attentions": True}
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, attn_implementation="eager").eval()
    ours = T5VAE.from_t5(t5_dir, latent_dim=6, injection="cross", memory_slots=2).eval()
    ours.set_attn_implementation("eager")
    out = ours(ids, mask, labels=labels, **asked)
    encoder = theirs.encoder(input_ids=ids, attention_mask=mask, **asked)
    _, kwargs = ours.injection(out.latent, ours.shared(ids))
    decoder = theirs(encoder_outputs=(kwargs["encoder_hidden_states"],), labels=labels, **asked)
    real = mask.bool()
    pairs = zip(out.encoder_hidden_states, encoder.hidden_states, strict=True)
    for mine, reference in pairs:
        torch.testing.assert_close(mine[real], reference[real], **CLOSE)
    for mine, reference in zip(out.encoder_attentions, encoder.attentions, strict=True):
        torch.testing.assert_close(
            mine.transpose(1, 2)[real], reference.transpose(1, 2)[real], **CLOSE
        )
    for found, expected in (
        (out.hidden_states, decoder.decoder_hidden_states),
        (out.attentions, decoder.decoder_attentions),
        (out.cross_attentions, decoder.cross_attentions),
    ):
        assert len(found) == len(expected) > 0
        for mine, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=2e-3, rtol=1e-3)
    plain = ours(ids, mask, labels=labels)
    for name in ("hidden_states", "attentions", "encoder_hidden_states", "cross_attentions"):
        assert getattr(plain, name) is None


def test_generation_returns_the_states_of_the_uncached_pass(injection):
    model, z = make_vae(injection=injection), torch.randn(3, 6)
    found = model.generate(
        latent=z,
        max_new_tokens=4,
        min_new_tokens=4,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    whole = model(
        latent=z, decoder_input_ids=found.sequences[:, :-1], output_hidden_states=True
    ).hidden_states
    for step, states in enumerate(found.hidden_states):
        for mine, reference in zip(states, whole, strict=True):
            torch.testing.assert_close(mine[:, 0], reference[:, step], **CLOSE)


def test_generate_takes_inputs_by_either_name(batch):
    model = make_vae()
    ids, mask, _ = batch
    expected = model.generate(ids, mask, max_new_tokens=6)
    assert torch.equal(model.generate(inputs=ids, attention_mask=mask, max_new_tokens=6), expected)
    with pytest.raises(ValueError, match="both inputs and input_ids"):
        model.generate(ids, mask, inputs=ids)


# Setters


@pytest.mark.parametrize("kind_", ["t5 v1.0", "umt5"])
@pytest.mark.parametrize("injection_", [*INJECTIONS, "none"])
def test_eager_attention_computes_what_sdpa_computes(kind_, injection_, batch, tmp_path):
    model = make_vae(kind_, injection=injection_)
    ids, mask, labels = batch
    expected = model(ids, mask, labels=labels).logits
    model.save_pretrained(tmp_path)
    loaded = T5VAE.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model.set_attn_implementation("eager")
    slots = 2 if injection_ in ("memory", "both") else 0
    for each in (model, loaded):
        out = each(ids, mask, labels=labels, output_attentions=True)
        torch.testing.assert_close(out.logits, expected, **CLOSE)
        for weights in out.attentions:
            assert weights.shape == (5, 4, 9, 9 + slots)
            torch.testing.assert_close(weights.sum(-1), torch.ones(5, 4, 9))
            assert (weights[..., slots:].triu(1) == 0).all()
            assert (weights[..., :slots] > 0).all()
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids, mask, labels=labels).logits, expected)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", {"t5": "eager"}])
def test_an_attention_that_would_not_see_z_is_refused(attention):
    with pytest.raises(ValueError, match="z would not reach the decoder"):
        make_vae().set_attn_implementation(attention)


def test_a_t5gemma_has_eager_attention_alone():
    model = make_vae("t5gemma")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="not one of eager"):
        model.set_attn_implementation("sdpa")


def test_reentrant_checkpoints_are_refused(batch):
    model, (ids, mask, labels) = make_vae().train(), batch
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable()
    model(ids, mask, labels=labels).loss.backward()
    assert model.injection.projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("injection_", INJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loaded", [False, True])
def test_z_reaches_the_decoder_in_any_dtype(injection_, dtype, loaded, batch, tmp_path):
    model, z = make_vae(injection=injection_), torch.randn(5, 6, requires_grad=True)
    ids, mask, labels = batch
    expected = [model(labels=labels, latent=each).logits for each in (z, z + 1)]
    if loaded:
        model.save_pretrained(tmp_path)
        model = T5VAE.from_pretrained(tmp_path, dtype=dtype).eval()
    else:
        model.to(dtype)
    found = [model(labels=labels, latent=each).logits for each in (z, z + 1)]
    moved, reference = found[1].float() - found[0].float(), expected[1] - expected[0]
    assert (moved - reference).norm() < 0.1 * reference.norm()
    (gradient,) = torch.autograd.grad(found[0].float().square().sum(), z)
    assert gradient.abs().min() > 0
    q = model.encode(ids, mask)
    assert q.mean.dtype == torch.float32
    assert q.mean.isfinite().all()


@pytest.mark.parametrize("size", [70, 40])
def test_z_reaches_the_decoder_with_another_vocabulary(injection, size):
    model, z, tokens = make_vae(injection=injection), torch.randn(3, 6), torch.full((3, 4), 5)
    before = model(latent=z, decoder_input_ids=tokens).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    after = model(latent=z, decoder_input_ids=tokens).logits
    common = min(size, 60)
    torch.testing.assert_close(after[..., :common], before[..., :common], **CLOSE)
    assert (model(latent=z + 1, decoder_input_ids=tokens).logits - after).abs().max() > 1e-2


def test_quantizers_leave_the_latent_path_alone(injection):
    """A projection of integers would round z to integers: bitsandbytes in 4 bits did."""
    model = make_vae(injection=injection, classes=["a"], tags=["O"], clusters=3)
    left = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantized = [name for name in linear if should_convert_module(name, left)]
    assert not any(name.startswith(LATENT_PATH) or name == "lm_head" for name in quantized)
    assert "decoder.block.0.layer.0.SelfAttention.q" in quantized


# from_t5


def test_from_t5_names_the_nearest_argument(t5_v11_dir):
    for wrong, right in (("latentdim", "latent_dim"), ("revison", "revision"), ("dtpye", "dtype")):
        with pytest.raises(TypeError, match=f"no argument {wrong}; did you mean {right}"):
            T5VAE.from_t5(t5_v11_dir, **{wrong: 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto", None])
def test_from_t5_gives_the_weights_in_a_dtype(dtype, t5_v11_dir):
    torch.manual_seed(1)
    model = T5VAE.from_t5(t5_v11_dir, latent_dim=6, dtype=dtype)
    torch.manual_seed(1)
    exact = T5VAE.from_t5(t5_v11_dir, latent_dim=6)
    expected = torch.float32 if dtype in ("auto", None) else torch.bfloat16
    assert model.dtype == model.config.dtype == expected
    for name, weight in exact.named_parameters():
        found = model.get_parameter(name)
        assert found.dtype == (torch.float32 if name.startswith("posterior.") else expected), name
        assert torch.equal(found, weight.to(found.dtype)), name


def test_from_t5_reads_the_revision_that_is_named(tmp_path):
    """From a cache with two revisions of a hub model, without the network."""
    states = {}
    for revision in ("one", "two"):
        snapshot = tmp_path / "models--user--t5" / "snapshots" / (revision[0] * 40)
        (tmp_path / "models--user--t5" / "refs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "models--user--t5" / "refs" / revision).write_text(snapshot.name)
        snapshot.mkdir(parents=True)
        make_t5("t5 v1.1" if revision == "one" else "mt5", snapshot)
    for revision in ("one", "two"):
        model = T5VAE.from_t5(
            "user/t5", latent_dim=6, revision=revision, cache_dir=tmp_path, local_files_only=True
        )
        states[revision] = model.config.t5.model_type
    assert states == {"one": "t5", "two": "mt5"}
    with pytest.raises(OSError, match="cached files"):
        T5VAE.from_t5("user/t5", revision="three", cache_dir=tmp_path, local_files_only=True)
