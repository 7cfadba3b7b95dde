"""The model against transformers' own T5 and against arithmetic written out here."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    INJECTIONS,
    POOLINGS,
    T5_CONFIGS,
    all_pairs,
    decoded_by_the_cache,
    make_t5,
    make_vae,
)
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from dsvae import T5VAE, T5VAEConfig
from dsvae.modeling.t5_vae import CACHE

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
GRID = all_pairs(T5_CONFIGS, INJECTIONS, POOLINGS)


def lengths_of(mask):
    return mask.sum(1).tolist()


def kl_of(model, out):
    return out.posterior.kl(out.prior).sum()


# Invariant 1: a batch of B equals B batches of one


@pytest.mark.parametrize(("kind", "injection", "pooling"), GRID)
def test_a_batch_equals_batches_of_one(kind, injection, pooling, batch):
    model = make_vae(kind, injection=injection, pooling=pooling)
    ids, mask, labels = batch
    together = model(ids, mask, labels=labels)
    for row, length in enumerate(lengths_of(mask)):
        alone = model(ids[row : row + 1, :length], labels=labels[row : row + 1, :length])
        torch.testing.assert_close(
            together.posterior.parameters[row], alone.posterior.parameters[0], **CLOSE
        )
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], **CLOSE)


@pytest.mark.parametrize(
    ("kind", "injection", "options"),
    all_pairs(T5_CONFIGS, INJECTIONS, [{"do_sample": False}, {"num_beams": 3, "do_sample": False}]),
)
def test_generation_of_a_batch_equals_generation_of_each(kind, injection, batch, options):
    model = make_vae(kind, injection=injection)
    ids, mask, _ = batch
    together = model.generate(ids, mask, max_new_tokens=8, **options)
    for row, length in enumerate(lengths_of(mask)):
        alone = model.generate(ids[row : row + 1, :length], max_new_tokens=8, **options)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        # transformers pads beams with EOS where pad is 0
        assert set(together[row, len(alone) :].tolist()) <= {0, 1}


# Invariant 2: padding, causality, cache


@pytest.mark.parametrize(("kind", "injection", "pooling"), GRID)
def test_more_padding_changes_nothing(kind, injection, pooling, batch):
    model = make_vae(kind, injection=injection, pooling=pooling)
    ids, mask, labels = batch
    plain = model(ids, mask, labels=labels)
    padded = model(
        F.pad(ids, (0, 7)), F.pad(mask, (0, 7)), labels=F.pad(labels, (0, 5), value=-100)
    )
    torch.testing.assert_close(plain.posterior.parameters, padded.posterior.parameters, **CLOSE)
    torch.testing.assert_close(plain.logits, padded.logits[:, :9], **CLOSE)


def test_padding_has_no_influence_whatever_its_tokens(pooling, batch):
    """The paper's code pools over pad positions."""
    model = make_vae(pooling=pooling)
    ids, mask, _ = batch
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 17))
    assert torch.equal(model.encode(ids, mask).mean, model.encode(other, mask).mean)


def test_a_later_token_changes_no_earlier_logit(kind, injection):
    model = make_vae(kind, injection=injection)
    z = torch.randn(2, 6)
    tokens = torch.randint(3, 60, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 50 + 3
    a = model(latent=z, decoder_input_ids=tokens).logits
    b = model(latent=z, decoder_input_ids=changed).logits
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=0, rtol=0)
    assert not torch.allclose(a[:, 5], b[:, 5], atol=1e-3)


def test_cached_decoding_equals_uncached(kind, injection):
    model = make_vae(kind, injection=injection)
    z, tokens = torch.randn(3, 6), torch.randint(3, 60, (3, 7))
    whole = model(latent=z, decoder_input_ids=tokens).logits
    torch.testing.assert_close(whole, decoded_by_the_cache(model, tokens, latent=z), **CLOSE)


SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    ("kind", "injection_", "search"), all_pairs(T5_CONFIGS, [*INJECTIONS, "none"], SEARCHES)
)
def test_generate_with_the_cache_equals_generate_without(kind, injection_, search):
    """The cache passes through `generate`, which names it as the release does."""
    model = make_vae(kind, injection=injection_)
    widths = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    z = torch.randn(4, model.config.latent_dim)
    texts, seen = [], []
    for use_cache in (True, False):
        torch.manual_seed(5)
        widths.clear()
        texts.append(
            model.generate(
                latent=z,
                max_new_tokens=9,
                min_new_tokens=9,
                use_cache=use_cache,
                **{"do_sample": False, **SEARCHES[search]},
            )
        )
        seen.append(list(widths))
    assert torch.equal(*texts)
    assert seen == [[1] * 9, list(range(1, 10))]
    assert len({tuple(row) for row in texts[0].tolist()}) > 1 or injection_ == "none"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_may_be_passed_by_either_name(name):
    model = make_vae()
    z, tokens = torch.randn(3, 6), torch.randint(3, 60, (3, 7))
    whole = model(latent=z, decoder_input_ids=tokens).logits
    start = model(latent=z, decoder_input_ids=tokens[:, :5], use_cache=True)
    rest = model(latent=z, decoder_input_ids=tokens[:, 5:], **{name: start[CACHE]})
    torch.testing.assert_close(rest.logits, whole[:, 5:], **CLOSE)


def test_the_output_names_the_cache_as_transformers_does():
    """Both a T5's decoder and `generate` read that name."""
    model = make_vae()
    z, tokens = torch.randn(3, 6), torch.randint(3, 60, (3, 7))
    theirs = AutoModelForSeq2SeqLM.from_config(T5_CONFIGS["t5 v1.0"]()).eval()
    expected = theirs(input_ids=tokens, decoder_input_ids=tokens, use_cache=True)
    ours = model(latent=z, decoder_input_ids=tokens, use_cache=True)
    assert CACHE in expected
    assert CACHE in ours
    assert CACHE not in model(latent=z, decoder_input_ids=tokens)


def test_an_argument_that_nothing_reads_is_an_error():
    """Ignored, a renamed cache gave wrong text without an error."""
    model = make_vae()
    z, tokens = torch.randn(3, 6), torch.randint(3, 60, (3, 7))
    start = model(latent=z, decoder_input_ids=tokens, use_cache=True)
    with pytest.raises(TypeError, match="no argument kv_states, position_ids"):
        model(latent=z, decoder_input_ids=tokens, kv_states=start[CACHE], position_ids=tokens)
    with pytest.raises(TypeError, match="both cache and past_key_values"):
        model(
            latent=z,
            decoder_input_ids=tokens,
            cache=start[CACHE],
            past_key_values=start[CACHE],
        )
    out = model(latent=z, decoder_input_ids=tokens, position_ids=None)
    assert torch.equal(out.logits, start.logits)
    as_tuple = model(latent=z, decoder_input_ids=tokens, return_dict=False)
    assert torch.equal(as_tuple[0], start.logits)


def test_sampling_is_repeatable_and_needs_no_sentence(injection):
    model = make_vae(injection=injection)
    z = torch.randn(4, 6)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(model.generate(latent=z, do_sample=True, max_new_tokens=6))
    assert torch.equal(*draws)
    assert draws[0].shape[0] == 4


# z


def test_z_is_the_only_way_to_the_decoder(kind, injection, batch):
    """Same z, another sentence: same logits. Another z, same sentence: other logits."""
    model = make_vae(kind, injection=injection)
    ids, mask, labels = batch
    z = torch.randn(5, 6)
    with_ids = model(ids, mask, labels=labels, latent=z).logits
    without = model(labels=labels, latent=z).logits
    assert torch.equal(with_ids, without)
    assert (model(labels=labels, latent=z + 1).logits - without).abs().max() > 1e-2


def test_every_example_gets_its_own_z_in_every_layer():
    """At batch 128 the paper's reshape left 6 of 768 (layer, example) slots with their
    own z."""
    model = make_vae(injection="memory", memory_slots=2)
    z = torch.randn(128, 6)
    _, kwargs = model.injection(z, torch.zeros(128, 1, 32))
    memory = kwargs["latent_memory"]
    layers, heads, d_kv = 3, 4, 12
    assert memory.shape == (128, layers, 2, 2, heads, d_kv)
    projection = model.injection.projection
    for example in (0, 1, 77, 127):
        expected = (projection.weight @ z[example] + projection.bias).view(
            layers, 2, 2, heads, d_kv
        )
        torch.testing.assert_close(memory[example], expected, **CLOSE)


def test_memory_attention_against_arithmetic():
    """One decoder layer's attention with slots, written out head by head and query by
    query."""
    model = make_vae(injection="memory", memory_slots=2)
    z, tokens = torch.randn(2, 6), torch.randint(3, 60, (2, 5))
    captured = {}
    attention = model.decoder.block[1].layer[0].SelfAttention
    attention.register_forward_hook(
        lambda module, args, kwargs, out: captured.update(
            hidden=args[0], bias=kwargs["position_bias"], out=out[0]
        ),
        with_kwargs=True,
    )
    model(latent=z, decoder_input_ids=tokens)
    memory = model.injection(z, torch.zeros(2, 1, 32))[1]["latent_memory"]
    for b in range(2):
        q, k, v = (getattr(attention, n)(captured["hidden"][b]).view(5, 4, 12) for n in "qkv")
        heads = torch.zeros(5, 4, 12)
        for head in range(4):
            for i in range(5):
                scores = [q[i, head] @ memory[b, 1, 0, m, head] for m in range(2)]
                scores += [
                    q[i, head] @ k[j, head] + captured["bias"][0, head, i, j] for j in range(i + 1)
                ]
                values = [memory[b, 1, 1, m, head] for m in range(2)] + [
                    v[j, head] for j in range(i + 1)
                ]
                weights = torch.stack(scores).softmax(0)
                heads[i, head] = sum(w * value for w, value in zip(weights, values, strict=True))
        torch.testing.assert_close(captured["out"][b], attention.o(heads.view(5, 48)), **CLOSE)


def test_the_projection_has_the_size_of_d_kv_not_of_d_model_over_heads():
    model = make_vae(injection="memory", memory_slots=1)
    assert model.injection.projection.out_features == 3 * 2 * 4 * 12  # not 3 * 2 * 32


# Invariant 3: gradient checkpointing


@pytest.mark.parametrize("kind_", ["t5 v1.1", "umt5"])
def test_gradient_checkpointing_changes_nothing(kind_, injection, batch):
    ids, mask, labels = batch
    noise = torch.randn(5, 6)
    results = []
    for checkpointing in (False, True):
        model = make_vae(kind_, injection=injection).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(ids, mask, labels=labels, noise=noise)
        loss = (
            F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
            + out.posterior.kl(out.prior).sum()
        )
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        # Other kernels: the bias of cross-attention requires a gradient under checkpointing.
        atol = 1e-4 * float(gradient.abs().max()) if injection == "cross" else 1e-6
        torch.testing.assert_close(gradient, results[1][1][name], atol=atol, rtol=1e-4, msg=name)
    latent_path = [n for n in results[0][1] if n.startswith(("posterior.", "injection."))]
    assert latent_path
    assert all(results[0][1][n].abs().max() > 0 for n in latent_path)


# Invariant 7: a loaded T5 computes what transformers' T5 computes


def test_encoder_states_are_those_of_transformers(t5_dir, batch):
    ids, mask, _ = batch
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir).eval()
    ours = T5VAE.from_t5(str(t5_dir), latent_dim=6).eval()
    expected = theirs.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    found = ours.encoder(inputs_embeds=ours.shared(ids), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


def test_decoder_logits_are_those_of_transformers_without_cross_attention(t5_dir, batch):
    """With cross-attention that outputs zero on their side, and z that adds zero on
    ours."""
    ids, mask, labels = batch
    # eager: under SDPA, umT5's decoder is not causal in transformers 5.17.
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, attn_implementation="eager").eval()
    for block in theirs.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data.zero_()
    ours = T5VAE.from_t5(str(t5_dir), latent_dim=6, injection="embedding").eval()
    ours.injection.projection.bias.data.zero_()
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).logits
    if theirs.config.model_type == "umt5" and not hasattr(theirs.config, "scale_decoder_outputs"):
        # Those releases scale the output of an untied umT5, which was trained without.
        expected = expected * theirs.config.d_model**0.5
    found = ours(labels=labels, latent=torch.zeros(5, 6)).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def vectors_by_hand(model, z):
    """The vectors (B, 2, d) that injection by cross makes of z: linear, then divided by
    the root of their mean square and multiplied by the norm's weight."""
    weights = dict(model.injection.named_parameters())
    x = z @ weights["projection.weight"].T + weights["projection.bias"]
    x = x.view(len(z), 2, -1)
    scale = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return x * scale * weights["layer_norm.weight"]


def test_cross_attention_to_z_is_that_of_transformers_to_the_same_vectors(t5_dir, batch):
    """With every weight of the pretrained decoder, and the scale of the encoder's
    states."""
    _, _, labels = batch
    # eager: under SDPA, umT5's decoder is not causal in transformers 5.17.
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, attn_implementation="eager").eval()
    ours = T5VAE.from_t5(str(t5_dir), latent_dim=6, injection="cross", memory_slots=2).eval()
    norm = theirs.encoder.final_layer_norm.weight
    assert torch.equal(ours.injection.layer_norm.weight, norm)
    for name, weight in theirs.decoder.named_parameters():
        if "embed_tokens" not in name:
            assert torch.equal(ours.decoder.get_parameter(name), weight), name
    z = torch.randn(5, 6)
    vectors = vectors_by_hand(ours, z)
    torch.testing.assert_close(vectors.std(), norm.pow(2).mean().sqrt(), rtol=0.1, atol=0)
    expected = theirs(encoder_outputs=(vectors,), labels=labels).logits
    if theirs.config.model_type == "umt5" and not hasattr(theirs.config, "scale_decoder_outputs"):
        # Those releases scale the output of an untied umT5, which was trained without.
        expected = expected * theirs.config.d_model**0.5
    found = ours(labels=labels, latent=z).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def decode_by_hand(state, kind, tokens):
    """Logits (T, V) for `tokens` (T,) from the weights of a T5, without
    cross-attention: a T5 decoder written out for the sizes of `small_models.SMALL`."""
    heads, d_kv, layers, buckets, longest, d_model = 4, 12, 3, 8, 16, 32

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[name]

    def bucket(distance):
        exact = buckets // 2
        if distance < exact:
            return max(distance, 0)
        share = math.log(distance / exact) / math.log(longest / exact)
        return min(exact + int(share * (buckets - exact)), buckets - 1)

    length = len(tokens)
    places = torch.tensor([[bucket(i - j) for j in range(length)] for i in range(length)])
    future = torch.ones(length, length).triu(1).bool()
    hidden = state["shared.weight"][tokens]
    for layer in range(layers):
        attention = f"decoder.block.{layer}.layer.0.SelfAttention."
        x = norm(hidden, f"decoder.block.{layer}.layer.0.layer_norm.weight")
        q, k, v = (
            (x @ state[f"{attention}{n}.weight"].T).view(length, heads, d_kv).transpose(0, 1)
            for n in "qkv"
        )
        own = attention if kind == "umt5" else "decoder.block.0.layer.0.SelfAttention."
        bias = state[f"{own}relative_attention_bias.weight"][places].permute(2, 0, 1)
        scores = (q @ k.transpose(1, 2) + bias).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, heads * d_kv)
        hidden = hidden + mixed @ state[f"{attention}o.weight"].T
        feed_forward = f"decoder.block.{layer}.layer.2."
        x = norm(hidden, f"{feed_forward}layer_norm.weight")
        inner = f"{feed_forward}DenseReluDense."
        if kind == "t5 v1.0":
            x = (x @ state[f"{inner}wi.weight"].T).relu()
        else:
            gate = F.gelu(x @ state[f"{inner}wi_0.weight"].T, approximate="tanh")
            x = gate * (x @ state[f"{inner}wi_1.weight"].T)
        hidden = hidden + x @ state[f"{inner}wo.weight"].T
    hidden = norm(hidden, "decoder.final_layer_norm.weight")
    if "lm_head.weight" in state:
        return hidden @ state["lm_head.weight"].T
    return hidden * d_model**-0.5 @ state["shared.weight"].T


@pytest.mark.parametrize("says", ["true", "false", "nothing"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_of_umt5_is_scaled_if_its_weights_are_tied(tied, says, tmp_path):
    """Whatever its config.json says: transformers 5 writes true into each."""
    make_t5("umt5", tmp_path)
    path, values = tmp_path / "config.json", {"true": True, "false": False}
    config = json.loads(path.read_text())
    for name in ("tie_word_embeddings", "scale_decoder_outputs"):
        config.pop(name, None)
        if says in values:
            config[name] = values[says]
    path.write_text(json.dumps(config))
    if tied:
        state = load_file(tmp_path / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_logits_by_hand("umt5", tmp_path)


def test_decoder_logits_are_those_of_a_decoder_written_by_hand(kind, tmp_path):
    make_t5(kind, tmp_path)
    check_logits_by_hand(kind, tmp_path)


def check_logits_by_hand(kind, directory):
    """Of a model made from a T5, and of the same model saved and loaded."""
    tokens = torch.tensor([0, *torch.randperm(57)[:20].add(3).tolist()])
    expected = decode_by_hand(load_file(directory / "model.safetensors"), kind, tokens)
    ours = T5VAE.from_t5(str(directory), latent_dim=6, injection="embedding").eval()
    ours.injection.projection.bias.data.zero_()
    ours.save_pretrained(directory / "vae")
    for model in (ours, T5VAE.from_pretrained(directory / "vae").eval()):
        found = model(decoder_input_ids=tokens[None], latent=torch.zeros(1, 6)).logits[0]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind_", ["t5 v1.1", "mt5", "umt5"])
def test_a_config_without_a_model_type_is_read_by_its_architecture(kind_, tmp_path):
    """As google/umt5-small was published."""
    make_t5(kind_, tmp_path)
    expected = T5VAE.from_t5(str(tmp_path), latent_dim=6).config.t5
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(
        json.dumps(
            {**config, "architectures": [f"{kind_[:4].split()[0].upper()}ForConditionalGeneration"]}
        )
    )
    found = T5VAE.from_t5(str(tmp_path), latent_dim=6).config.t5
    assert type(found) is type(expected)
    assert found.to_diff_dict() == {
        **expected.to_diff_dict(),
        "architectures": found.architectures,
    }


def test_a_config_that_says_no_model_type_is_an_error_in_one_line(tmp_path):
    make_t5("umt5", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    for other in ({}, {"architectures": ["BertModel"]}, {"architectures": None}):
        path.write_text(json.dumps({**config, **other}))
        with pytest.raises(ValueError, match='no "model_type".*add .*"umt5"') as caught:
            T5VAE.from_t5(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_an_untied_head_stays_untied(t5_v11_dir, tmp_path):
    """transformers' configuration says tied for every T5; building from it and loading
    a state dict ties silently."""
    ours = T5VAE.from_t5(str(t5_v11_dir), latent_dim=6)
    assert not ours.config.tie_word_embeddings
    ours.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    assert not torch.equal(again.lm_head.weight, again.shared.weight)
    assert torch.equal(again.lm_head.weight, ours.lm_head.weight)


def test_nothing_is_kept_that_nothing_reads(kind, injection, batch):
    """No cross-attention unless z enters there, and every parameter gets a gradient."""
    model = make_vae(kind, injection=injection, pooling="attention").train()
    ids, mask, labels = batch
    out = model(ids, mask, labels=labels, noise=torch.randn(5, 6))
    (
        F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        + out.posterior.kl(out.prior).sum()
    ).backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    ] == []
    names = [name for name, _ in model.named_parameters()]
    assert any("EncDec" in name for name in names) == (injection == "cross")
    assert not any("embed_tokens" in name for name in names)


@pytest.mark.parametrize(("kind", "injection", "pooling"), GRID)
def test_save_and_load(kind, injection, pooling, batch, tmp_path):
    model = make_vae(kind, injection=injection, pooling=pooling, max_tokens=17)
    model.save_pretrained(tmp_path)
    ids, mask, labels = batch
    for again in (T5VAE.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is T5VAE
        config = AutoConfig.from_pretrained(tmp_path)
        for field in (
            "latent_dim",
            "pooling",
            "injection",
            "memory_slots",
            "max_tokens",
            "tie_word_embeddings",
            "decoder_start_token_id",
        ):
            assert getattr(config, field) == getattr(model.config, field), field
        assert config.t5.model_type == model.config.t5.model_type
        assert torch.equal(
            again.eval()(ids, mask, labels=labels).logits, model(ids, mask, labels=labels).logits
        )


@pytest.mark.parametrize("size", [70, 40])
def test_a_vocabulary_can_be_resized(kind, size, batch, tmp_path):
    model = make_vae(kind)
    tied = model.config.tie_word_embeddings
    before = {
        name: weight.clone()
        for name, weight in (("shared", model.shared.weight), ("lm_head", model.lm_head.weight))
    }
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.config.t5.vocab_size == size
    assert (model.shared.num_embeddings, model.lm_head.out_features) == (size, size)
    assert (model.lm_head.weight is model.shared.weight) == tied == (kind == "t5 v1.0")
    for name, old in before.items():
        new = getattr(model, name).weight
        assert new.shape == (size, 32)
        assert torch.equal(new[: min(size, 60)], old[:size])
    model.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path).eval()
    ids, mask, labels = (part.clamp(max=size - 1) for part in batch)
    assert again.config.vocab_size == size
    assert torch.equal(
        again(ids, mask, labels=labels).logits, model.eval()(ids, mask, labels=labels).logits
    )
    assert again(ids, mask, labels=labels).logits.shape[-1] == size


def test_the_posterior_is_float32_in_bfloat16(batch):
    model = make_vae()
    ids, mask, labels = batch
    states = model.encoder(inputs_embeds=model.shared(ids), attention_mask=mask).last_hidden_state
    half = copy.deepcopy(model).bfloat16()
    q = half.family.of(half(ids, mask, labels=labels).posterior.parameters)
    assert q.mean.dtype == q.logvar.dtype == torch.float32
    # Given the same states, the head computes in float32: its only error is that of its
    # bfloat16 weights.
    weight, bias = (
        t.bfloat16().float() for t in (model.posterior.head.weight, model.posterior.head.bias)
    )
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(
        half.posterior.head(half.posterior.pooling(states, mask)), pooled @ weight.T + bias, **CLOSE
    )


def test_dropout_rate_can_be_set_on_a_pretrained_t5(t5_v11_dir):
    model = T5VAE.from_t5(str(t5_v11_dir), dropout_rate=0.37, latent_dim=6)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.37}


def test_a_directory_without_weights_is_an_error(tmp_path):
    make_t5("t5 v1.0", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named"):
        T5VAE.from_t5(str(tmp_path))


def test_missing_weights_are_an_error(tmp_path):
    make_t5("t5 v1.0", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        T5VAE.from_t5(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooling", "x"),
        ("family", "x"),
        ("injection", "x"),
        ("prior", "x"),
        ("posterior_reads", "x"),
        ("latent_dim", -1),
        ("latent_dim", "many"),
        ("categories", 0),
        ("spike_prior", [4.0]),
        ("spike_prior", [4.0, 0.0]),
        ("memory_slots", 0),
        ("clusters", 1),
        ("max_tokens", "x"),
        ("classes", "a"),
        ("conditional", 2),
        ("lora", {"rank": 1, "alpha": 0, "targets": ["q"]}),
        ("lora", {"rank": 1, "alpha": 1, "targets": ["x"]}),
    ],
)
def test_a_configuration_refuses_values_that_make_no_sense(field, value):
    T5VAEConfig()
    with pytest.raises(ValueError, match=rf"^{field}[. ].*") as caught:
        T5VAEConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_prior_that_is_not_given_is_learned_where_there_are_conditions():
    for conditional, injection, prior in (
        (False, "memory", "fixed"),
        (True, "memory", "learned"),
        (True, "none", "fixed"),
    ):
        config = T5VAEConfig(prior=None, conditional=conditional, injection=injection)
        assert config.prior == prior
        assert T5VAEConfig.from_dict(config.to_dict()).prior == prior
