"""T5Gemma with injection by cross, against transformers' own T5Gemma."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import decoded_by_the_cache, make_t5gemma, t5gemma_config
from torch.nn import functional as F
from transformers import T5GemmaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from dsvae import T5VAE, T5VAEConfig
from dsvae.engine.weights import freeze_decoder, parameter_names
from dsvae.modeling.vocabulary import VocabularyHead
from dsvae.modeling.weight_source import Origin

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=["tied", "untied"])
def directory(request, tmp_path_factory):
    """A random T5Gemma as the hub has it."""
    path = make_t5gemma(tmp_path_factory.mktemp("t5gemma"))
    if request.param == "untied":
        state = load_file(path / "model.safetensors")
        state["lm_head.out_proj.weight"] = torch.randn(60, 32)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def theirs_of(directory, ours):
    """transformers' own, with its head."""
    theirs = T5GemmaForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()
    if not ours.config.tie_word_embeddings:
        theirs.lm_head.out_proj.weight = torch.nn.Parameter(ours.lm_head.weight.detach())
    return theirs


def make(directory, **latent):
    options = {"latent_dim": 6, "memory_slots": 2, "injection": "cross", **latent}
    torch.manual_seed(0)
    return T5VAE.from_t5(str(directory), **options).eval()


def test_decoder_logits_and_encoder_states_are_those_of_transformers(directory, batch):
    ids, mask, labels = batch
    ours = make(directory)
    theirs = theirs_of(directory, ours)
    assert ours.config.tie_word_embeddings == (ours.lm_head.weight is ours.shared.weight)
    assert ours.config.decoder_start_token_id == 2
    states = theirs.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours._encode(ids, mask).last_hidden_state, states, **CLOSE)
    z = torch.randn(5, 6)
    x = ours.injection.projection(z).view(5, 2, 40)
    x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    vectors = x * (1 + theirs.model.encoder.norm.weight)
    states = BaseModelOutput(last_hidden_state=vectors)
    expected = theirs(encoder_outputs=states, labels=labels).logits
    found = ours(labels=labels, latent=z).logits
    assert expected.abs().max() > 2  # the cap of 3 is felt
    torch.testing.assert_close(found, expected, **CLOSE)


def test_without_a_latent_it_is_the_t5gemma(directory, batch):
    ids, mask, labels = batch
    ours = make(directory, injection="none", conditional=True)
    theirs = theirs_of(directory, ours)
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).logits
    found = ours(ids, mask, labels=labels, condition_ids=ids, condition_mask=mask).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_batch_equals_batches_of_one_and_padding_changes_nothing(directory, batch):
    model = make(directory, conditional=True, prior="learned")
    ids, mask, labels = batch
    given = {"condition_ids": ids, "condition_mask": mask}
    together = model(ids, mask, labels=labels, **given)
    padded = model(
        F.pad(ids, (0, 7)),
        F.pad(mask, (0, 7)),
        labels=F.pad(labels, (0, 5), value=-100),
        **{name: F.pad(each, (0, 3)) for name, each in given.items()},
    )
    torch.testing.assert_close(padded.logits[:, :9], together.logits, **CLOSE)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = ids[row : row + 1, :length]
        alone = model(own, labels=labels[row : row + 1, :length], condition_ids=own)
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], **CLOSE)
        for name in ("posterior", "prior"):
            torch.testing.assert_close(
                together[name].parameters[row], alone[name].parameters[0], **CLOSE
            )


def test_cached_decoding_equals_uncached(directory):
    model = make(directory)
    z, tokens = torch.randn(3, 6), torch.randint(3, 60, (3, 9))
    whole = model(latent=z, decoder_input_ids=tokens).logits
    torch.testing.assert_close(whole, decoded_by_the_cache(model, tokens, latent=z), **CLOSE)


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
)
def test_generate_with_the_cache_equals_generate_without(directory, search):
    model = make(directory)
    z, texts = torch.randn(4, 6), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, **search}
        texts.append(model.generate(latent=z, use_cache=use_cache, **options))
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) > 1


def test_gradient_checkpointing_changes_nothing_and_every_weight_trains(directory, batch):
    ids, mask, labels = batch
    found = []
    for checkpointing in (False, True):
        model = make(directory).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(
            ids, mask, labels=labels, noise=torch.ones(5, 6), sentence_weights=torch.ones(5)
        )
        kl = out.posterior.kl(out.prior).sum()
        (out.weighted_nats + kl).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4 * largest, rtol=0, msg=name)


@pytest.mark.parametrize("cap", [0.7, 5.0])
def test_the_loss_in_pieces_has_the_cap(cap, monkeypatch):
    monkeypatch.setattr("dsvae.modeling.vocabulary.MOST_LOGITS", 60 * 4)
    torch.manual_seed(1)
    head = VocabularyHead(8, 60, cap).double()
    labels = torch.randint(0, 60, (3, 5))
    labels[1, 3:] = -100
    weights = torch.tensor([1.0, 0.5, 2.0])
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    nats, loss = head(hidden, labels, weights)
    loss.backward()
    found = (hidden.grad.clone(), head.weight.grad.clone())
    hidden.grad = head.weight.grad = None
    logits = cap * torch.tanh(hidden @ head.weight.T / cap)
    torch.testing.assert_close(head(hidden), logits)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(nats.double(), plain.sum(1), atol=1e-5, rtol=1e-5)
    (plain.sum(1) @ weights.double()).backward()
    torch.testing.assert_close(found[0], hidden.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], head.weight.grad, atol=1e-5, rtol=1e-4)


def test_save_and_load(directory, batch, tmp_path):
    ids, mask, labels = batch
    model = make(directory)
    expected = model(ids, mask, labels=labels).logits
    model.save_pretrained(tmp_path)
    for again in (T5VAE.from_pretrained(tmp_path), T5VAE.origin_in(str(tmp_path)).build()):
        assert torch.equal(again.eval()(ids, mask, labels=labels).logits, expected)


def test_positions_stay_float32_in_a_half_precision_model(directory):
    model = make(directory).bfloat16()
    exact = 10000.0 ** (-torch.arange(0, 12, 2) / 12)
    for stack in (model.encoder, model.decoder):
        assert stack.rotary_emb.inv_freq.dtype == torch.float32
        torch.testing.assert_close(stack.rotary_emb.inv_freq, exact)


def test_a_frozen_decoder_trains_the_encoder_with_its_embedding(directory):
    model = make(directory)
    freeze_decoder(model)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "encoder_embedding", "posterior", "injection"}
    assert "encoder_embedding.weight" in parameter_names(model)[1]


def test_a_new_model_draws_every_weight():
    config = T5VAEConfig(t5=t5gemma_config(), injection="cross")
    model = Origin(lambda: T5VAE(config), 3).build()
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.ndim == 1 or weight.std() > 0, name
    assert not model.injection.layer_norm.weight.any()  # a factor of 1 + 0


@pytest.mark.parametrize("injection_", ["memory", "embedding", "both", "none"])
def test_other_injections_are_refused(injection_):
    with pytest.raises(ValueError, match=f"injection {injection_} does not work with a t5gemma"):
        T5VAEConfig(t5=t5gemma_config(), injection=injection_)
