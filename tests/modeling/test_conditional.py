"""Conditional models: cross-attention against transformers' own T5, and the learned
prior."""

import math

import pytest
import torch
from small_models import INJECTIONS, POOLINGS, T5_CONFIGS, all_pairs, decoded_by_the_cache, make_vae
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM

from dsvae import T5VAE, T5VAEConfig
from dsvae.engine.weights import freeze_decoder
from dsvae.modeling.families import LOGVAR_BOUNDS
from dsvae.modeling.t5_vae import LATENT_PATH
from dsvae.modeling.weight_source import Origin
from dsvae.objective.elbo import Penalty, loss_share

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
FAMILIES = {
    "gaussian": {"latent_dim": 6},
    "spike_slab": {"latent_dim": 6},
    "categorical": {"latent_dim": 3, "categories": 4},
}


def conditional(kind="t5 v1.0", seed=0, **latent):
    """A small conditional T5VAE, with a learned prior unless it says otherwise."""
    return make_vae(kind, seed, **{"conditional": True, "prior": "learned", **latent})


def condition_of(rows, longest=6, seed=1):
    """Conditions of different lengths, padded: condition_ids, condition_mask. The first
    is the longest."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    for row in range(rows):
        length = longest - row % longest
        ids[row, :length] = torch.randint(3, 60, (length,), generator=rng)
        ids[row, length - 1] = 1
    return ids, (ids != 0).long()


def pack(condition, text):
    """`c EOS x EOS` of each row, padded."""
    rows = [torch.cat([c[c != 0], x[x != 0]]) for c, x in zip(condition, text, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (ids != 0).long()


@pytest.fixture
def pairs(batch):
    """The arguments of `forward` for five sentences and their conditions."""
    ids, _, labels = batch
    condition_ids, condition_mask = condition_of(5)
    packed, mask = pack(condition_ids, ids)
    return {
        "input_ids": packed,
        "attention_mask": mask,
        "labels": labels,
        "condition_ids": condition_ids,
        "condition_mask": condition_mask,
    }


def one_of(pairs, row):
    """One row of a batch without its padding."""
    lengths = {name: int((pairs[name][row] > 0).sum()) for name in pairs}
    return {
        name: tensor[row : row + 1, : lengths[name]]
        for name, tensor in pairs.items()
        if not name.endswith("mask")
    }


# transformers' own T5


def test_logits_without_a_latent_are_those_of_transformers(t5_dir, batch):
    ids, mask = condition_of(5)
    labels = batch[2]
    # eager: under SDPA, umT5's decoder is not causal in transformers 5.17.
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, attn_implementation="eager").eval()
    ours = T5VAE.from_t5(str(t5_dir), injection="none", conditional=True).eval()
    scale = 1.0
    if theirs.config.model_type == "umt5" and not hasattr(theirs.config, "scale_decoder_outputs"):
        # Those releases scale the output of an untied umT5, which was trained without.
        scale = theirs.config.d_model**0.5
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).logits * scale
    found = ours(ids, mask, labels=labels, condition_ids=ids, condition_mask=mask).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    expected = theirs(input_ids=ids[:1], labels=labels[:1]).logits * scale  # no padding, no mask
    found = ours(ids[:1], labels=labels[:1], condition_ids=ids[:1]).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_without_a_latent_is_that_of_transformers(t5_dir, beams):
    ids, mask = condition_of(4)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, attn_implementation="eager").eval()
    if theirs.config.model_type == "umt5" and not hasattr(theirs.config, "scale_decoder_outputs"):
        theirs.lm_head.weight.data *= theirs.config.d_model**0.5
    ours = T5VAE.from_t5(str(t5_dir), injection="none", conditional=True).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    # Their cache has as many layers as the encoder, and these decoders have more.
    expected = theirs.generate(ids, attention_mask=mask, use_cache=False, **options)
    found = ours.generate(condition_ids=ids, condition_mask=mask, **options)
    assert found.tolist() == expected.tolist()


def test_every_weight_but_the_latent_path_is_that_of_transformers(t5_dir):
    ours = T5VAE.from_t5(str(t5_dir), latent_dim=6, conditional=True, prior="learned")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir)
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    names = {name for name, _ in ours.named_parameters() if not name.startswith(LATENT_PATH)}
    for name in names:
        assert torch.equal(ours.get_parameter(name), expected[name]), name
    assert sum(".EncDecAttention." in name for name in names) == 3 * 4
    assert {n.split(".")[0] for n, _ in ours.named_parameters() if n not in names} == {
        "posterior",
        "prior_head",
        "injection",
    }


def test_the_condition_is_read_behind_the_vectors_of_z(t5_dir, batch):
    ids, mask = condition_of(5)
    labels, z = batch[2], torch.randn(5, 6)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, attn_implementation="eager").eval()
    options = {"latent_dim": 6, "injection": "cross", "memory_slots": 2, "conditional": True}
    ours = T5VAE.from_t5(str(t5_dir), **options).eval()
    vectors = ours.injection(z, torch.zeros(0))[1]["encoder_hidden_states"]
    states = theirs.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = theirs(
        encoder_outputs=(torch.cat([vectors, states], 1),),
        attention_mask=F.pad(mask, (2, 0), value=1),
        labels=labels,
    ).logits
    if theirs.config.model_type == "umt5" and not hasattr(theirs.config, "scale_decoder_outputs"):
        expected = expected * theirs.config.d_model**0.5
    given = {"condition_ids": ids, "condition_mask": mask}
    found = ours(labels=labels, latent=z, **given).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


# Invariants


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_batches_of_one(kind, family, pairs):
    model = conditional(kind, family=family, **FAMILIES[family])
    together = model(**pairs)
    for row in range(5):
        own = one_of(pairs, row)
        alone = model(**own)
        for name in ("posterior", "prior"):
            torch.testing.assert_close(
                together[name].parameters[row], alone[name].parameters[0], **CLOSE
            )
        length = own["labels"].shape[1]
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], **CLOSE)
        prior = model.prior(own["condition_ids"])
        torch.testing.assert_close(prior.parameters, alone.prior.parameters)


@pytest.mark.parametrize(
    ("kind", "injection_", "pooling"), all_pairs(T5_CONFIGS, [*INJECTIONS, "none"], POOLINGS)
)
def test_more_padding_of_text_and_condition_changes_nothing(kind, injection_, pooling, pairs):
    prior = "fixed" if injection_ == "none" else "learned"
    model = conditional(kind, injection=injection_, pooling=pooling, prior=prior)
    more = {"labels": 3, "condition_ids": 5, "condition_mask": 5}
    padded = {
        name: F.pad(tensor, (0, more.get(name, 7)), value=-100 if name == "labels" else 0)
        for name, tensor in pairs.items()
    }
    # whatever the padding is
    padded["condition_ids"] = padded["condition_ids"].masked_fill(padded["condition_mask"] == 0, 17)
    expected, found = model(**pairs), model(**padded)
    torch.testing.assert_close(found.logits[:, :9], expected.logits, **CLOSE)
    torch.testing.assert_close(found.posterior.parameters, expected.posterior.parameters, **CLOSE)
    if prior == "learned":
        torch.testing.assert_close(found.prior.parameters, expected.prior.parameters, **CLOSE)


def test_a_later_token_changes_no_earlier_logit(kind, injection):
    model = conditional(kind, injection=injection)
    ids, mask = condition_of(2)
    tokens = torch.randint(3, 60, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 50 + 3
    given = {"latent": torch.randn(2, 6), "condition_ids": ids, "condition_mask": mask}
    a = model(decoder_input_ids=tokens, **given).logits
    b = model(decoder_input_ids=changed, **given).logits
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=0, rtol=0)
    assert not torch.allclose(a[:, 5], b[:, 5], atol=1e-3)


def test_z_is_the_only_way_from_the_sentence_and_the_condition_has_its_own(kind, injection, pairs):
    model = conditional(kind, injection=injection)
    z = torch.randn(5, 6)
    condition = {name: pairs[name] for name in ("condition_ids", "condition_mask")}
    both = model(**pairs, latent=z).logits
    without = model(labels=pairs["labels"], latent=z, **condition).logits
    assert torch.equal(both, without)
    other = {"condition_ids": (condition["condition_ids"] + 5) % 50 + 3}
    moved_z = model(labels=pairs["labels"], latent=z + 1, **condition).logits
    moved_c = model(labels=pairs["labels"], latent=z, **other).logits
    assert (moved_z - both).abs().max() > 0.01
    assert (moved_c - both).abs().max() > 0.01


# Generation


def test_cached_decoding_equals_uncached(kind, injection):
    model = conditional(kind, injection=injection)
    ids, mask = condition_of(3)
    tokens = torch.randint(3, 60, (3, 7))
    given = {"latent": torch.randn(3, 6), "condition_ids": ids, "condition_mask": mask}
    whole = model(decoder_input_ids=tokens, **given).logits
    torch.testing.assert_close(whole, decoded_by_the_cache(model, tokens, **given), **CLOSE)


SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    ("kind", "search", "padded"), all_pairs(T5_CONFIGS, SEARCHES, [True, False])
)
def test_generate_with_the_cache_equals_generate_without(kind, search, padded):
    model = conditional(kind)
    passes, widths = [], []
    model.encoder.register_forward_hook(lambda *_: passes.append(1))
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    ids, mask = condition_of(4)
    if not padded:
        ids, mask = (ids * mask + 20) % 57 + 3, None
    z, texts, seen = torch.randn(4, 6), [], []
    for use_cache in (True, False):
        torch.manual_seed(5)
        widths.clear()
        texts.append(
            model.generate(
                latent=z,
                condition_ids=ids,
                condition_mask=mask,
                max_new_tokens=9,
                min_new_tokens=9,
                use_cache=use_cache,
                **{"do_sample": False, **SEARCHES[search]},
            )
        )
        seen.append(list(widths))
    assert torch.equal(*texts)
    assert seen == [[1] * 9, list(range(1, 10))]
    assert len(passes) == 2  # the condition is encoded once per call
    assert len({tuple(row) for row in texts[0].tolist()}) > 1


@pytest.mark.parametrize(
    ("kind", "injection", "options"),
    all_pairs(T5_CONFIGS, INJECTIONS, [{}, {"num_beams": 3, "num_return_sequences": 2}]),
)
def test_generation_of_a_batch_equals_generation_of_each(kind, injection, options, pairs):
    """Beams and returned sequences have the condition and the z of their own row."""
    model = conditional(kind, injection=injection)
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    given = {name: tensor for name, tensor in pairs.items() if name != "labels"}
    together = model.generate(**given, **options)
    count = options.get("num_return_sequences", 1)
    assert len(together) == 5 * count
    for row in range(5):
        own = one_of(given, row)
        alone = model.generate(**own, **options)
        for found, expected in zip(together[row * count : (row + 1) * count], alone, strict=True):
            assert found[: len(expected)].tolist() == expected.tolist()
            assert set(found[len(expected) :].tolist()) <= {0, 1}


# The learned prior


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kl_is_the_mean_of_the_log_densities_and_0_where_both_agree(family, pairs):
    model = conditional(family=family, **FAMILIES[family])
    with torch.no_grad():
        out = model(**pairs)
        posterior, prior = out.posterior, out.prior
    kl = posterior.kl(prior)
    assert kl.shape == (5, model.family.units)
    assert kl.min() >= 0
    assert float(prior.kl(prior).abs().max()) < 1e-6
    if not posterior.kl_of_z:
        return  # its KL includes latents that have no density here
    torch.manual_seed(0)
    total, draws = torch.zeros(5), 20_000
    for row in range(5):
        q, p = (
            model.family.of(each.parameters[row : row + 1].expand(draws, -1))
            for each in (posterior, prior)
        )
        z = q.sample(torch.randn(draws, model.family.noise_width))
        ratio = q.log_prob(z) - p.log_prob(z)
        total[row] = ratio.mean()
        error = 5 * float(ratio.std()) / draws**0.5
        assert float(total[row]) == pytest.approx(float(kl[row].sum()), abs=error + 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_prior_at_the_fixed_one_gives_the_same_kl_bit_by_bit(family):
    model = make_vae(family=family, **FAMILIES[family])
    posterior = model.family.of(torch.randn(5, model.family.parameter_width))
    fixed = model.family.prior()
    learned = model.family.of(fixed.parameters.expand(5, -1).clone())
    assert torch.equal(posterior.kl(learned), posterior.kl(fixed))


@pytest.mark.parametrize("family", ["gaussian", "spike_slab"])
def test_the_log_variances_of_both_heads_are_bounded_where_the_prior_is_learned(family, pairs):
    low, high = LOGVAR_BOUNDS
    units = 6
    for prior in ("learned", "fixed"):
        model = conditional(family=family, latent_dim=units, prior=prior)
        heads = [model.posterior.head] + ([model.prior_head] if prior == "learned" else [])
        for value in (-1e4, -5.0, 0.0, 2.0, 1e4):
            for head in heads:
                head.bias.data[units : 2 * units] = value
                head.weight.data[units : 2 * units] = 0
            out = model(**pairs)
            found = [out.posterior.parameters[:, units : 2 * units]]
            if prior == "learned":
                found.append(out.prior.parameters[:, units : 2 * units])
                clamped = min(max(value, low), high)
                assert all(torch.all((each >= low) & (each <= high)) for each in found)
                assert all((each - clamped).abs().max() < 0.02 for each in found)
                assert out.posterior.kl(out.prior).isfinite().all()
            else:
                assert torch.all(found[0] == value)


def test_a_fixed_prior_is_one_row_for_all_and_a_learned_one_needs_the_condition(pairs):
    fixed = conditional(prior="fixed")
    assert fixed.prior().parameters.shape == (1, 12)
    assert fixed(**pairs).prior.parameters.shape == (1, 12)
    learned = conditional()
    ids, mask = pairs["condition_ids"], pairs["condition_mask"]
    assert learned.prior(ids, mask).parameters.shape == (5, 12)
    with pytest.raises(ValueError, match="needs condition_ids"):
        learned.prior()
    only = learned(condition_ids=ids, condition_mask=mask, encode_only=True)
    assert torch.equal(only.prior.parameters, learned.prior(ids, mask).parameters)
    assert only.posterior is None


def test_states_from_an_earlier_call_serve_instead_of_the_condition(pairs):
    model = conditional()
    given = {name: tensor for name, tensor in pairs.items() if name != "labels"}
    ahead = model(**given, encode_only=True)
    z = torch.randn(5, 6)
    found = model(
        labels=pairs["labels"],
        latent=z,
        condition_states=ahead.condition_states,
        condition_mask=pairs["condition_mask"],
    )
    assert torch.equal(found.logits, model(**pairs, latent=z).logits)
    torch.testing.assert_close(model(**pairs).prior.parameters, ahead.prior.parameters)


def test_a_condition_in_the_wrong_place_is_an_error(pairs):
    model, plain = conditional(), make_vae()
    without = {name: pairs[name] for name in ("input_ids", "attention_mask", "labels")}
    for call in (lambda: model(**without), lambda: model.generate(latent=torch.randn(2, 6))):
        with pytest.raises(ValueError, match="is conditional: it needs condition_ids"):
            call()
    with pytest.raises(ValueError, match="not conditional"):
        plain(**pairs)
    with pytest.raises(ValueError, match="not conditional"):
        plain.generate(latent=torch.randn(5, 6), condition_ids=pairs["condition_ids"])
    with pytest.raises(ValueError, match="5 conditions for 2 latents"):
        model(
            latent=torch.randn(2, 6),
            labels=pairs["labels"][:2],
            condition_ids=pairs["condition_ids"],
        )
    with pytest.raises(ValueError, match="prior learned needs"):
        T5VAEConfig(prior="learned")
    with pytest.raises(ValueError, match="prior is 'flat'"):
        T5VAEConfig(conditional=True, prior="flat")


# Gradients


def gradients(model, pairs, penalty):
    """The gradients of a training step with dropout off, by parameter; None where there
    is none."""
    noise = torch.randn(5, model.family.noise_width, generator=torch.Generator().manual_seed(1))
    out = model(
        **pairs,
        noise=noise,
        sentence_weights=torch.ones(5),
        detach_prior=penalty.prior_alone,
    )
    statistics = penalty.statistics(out)
    mean = {name: each.mean(0) for name, each in statistics.items()}
    slopes = penalty.slopes(mean) if penalty.active else None
    loss_share(out.weighted_nats, statistics, torch.ones(5), slopes, 5).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def moved(found):
    return {name for name, each in found.items() if each is not None and each.abs().max() > 0}


@pytest.mark.parametrize("kind_", ["t5 v1.0", "umt5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient_in_phase_2(kind_, family, pairs):
    model = conditional(kind_, family=family, pooling="attention", **FAMILIES[family]).train()
    names = {name for name, _ in model.named_parameters()}
    assert names - moved(gradients(model, pairs, Penalty(beta=1.0))) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_phase_1_trains_the_prior_alone_with_its_own_term(family, pairs):
    """The gradient of everything else is the one without the term, bit by bit."""
    found = {
        alone: gradients(
            conditional(family=family, pooling="attention", **FAMILIES[family]).train(),
            pairs,
            Penalty(prior_alone=alone),
        )
        for alone in (True, False)
    }
    head = {"prior_head.weight", "prior_head.bias"}
    assert moved(found[True]) == set(found[True])
    assert moved(found[False]) == set(found[False]) - head
    for name in set(found[True]) - head:
        assert torch.equal(found[True][name], found[False][name]), name


def test_the_term_of_the_prior_is_the_kl_and_its_gradient_that_of_the_kl(pairs):
    """Of the KL's own gradient, it has the part of the prior's head."""
    model = conditional().train()
    with torch.no_grad():
        out = model(**pairs, sample_latent=False)
    kl = out.posterior.kl(out.prior).sum(-1)
    penalty = Penalty(prior_alone=True)
    statistics = penalty.statistics(out)
    torch.testing.assert_close(statistics["prior"][:, 0], kl)
    mean = {name: each.mean(0) for name, each in statistics.items()}
    torch.testing.assert_close(penalty(mean), kl.mean())
    alone = gradients(conditional().train(), pairs, Penalty(prior_alone=True))
    whole = gradients(conditional().train(), pairs, Penalty(beta=1.0))
    for name in ("prior_head.weight", "prior_head.bias"):
        torch.testing.assert_close(alone[name], whole[name])


@pytest.mark.parametrize("injection_", ["memory", "cross", "none"])
def test_a_frozen_decoder_keeps_its_cross_attention(injection_, pairs):
    prior = "fixed" if injection_ == "none" else "learned"
    model = conditional(injection=injection_, prior=prior).train()
    freeze_decoder(model)
    found = gradients(model, pairs, Penalty(prior_alone=prior == "learned"))
    trained = tuple(name for name in LATENT_PATH if prior == "learned") + ("encoder.",)
    expected = {name for name in found if name.startswith(trained)}
    assert moved(found) == expected
    assert {name for name, each in found.items() if each is not None} == expected
    assert not any("EncDecAttention" in name for name in expected)


@pytest.mark.parametrize("penalty", [Penalty(prior_alone=True), Penalty(beta=1.0)])
@pytest.mark.parametrize("kind_", ["t5 v1.1", "umt5"])
def test_gradient_checkpointing_changes_nothing(kind_, injection, penalty, pairs):
    results = []
    for checkpointing in (False, True):
        model = conditional(kind_, injection=injection).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, pairs, penalty))
    for name, gradient in results[0].items():
        # Other kernels: the bias of cross-attention requires a gradient under checkpointing.
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradient, results[1][name], atol=1e-4 * largest, rtol=0)


# Files and numbers


def test_a_saved_model_is_conditional_and_an_older_directory_is_not(tmp_path, pairs):
    model = conditional("umt5")
    model.save_pretrained(tmp_path / "new")
    again = T5VAE.from_pretrained(tmp_path / "new").eval()
    assert again.config.conditional
    assert again.config.prior == "learned"
    assert torch.equal(again(**pairs).logits, model(**pairs).logits)
    read = T5VAE.origin_in(str(tmp_path / "new")).build()
    assert all(torch.equal(read.get_parameter(n), p) for n, p in model.named_parameters())
    plain = make_vae("umt5")
    plain.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    lines = path.read_text().splitlines()
    new = ('"conditional"', '"posterior_reads"', '"prior"')
    kept = [line for line in lines if not any(name in line for name in new)]
    assert len(kept) == len(lines) - 3
    path.write_text("\n".join(kept))
    old = T5VAE.from_pretrained(tmp_path / "old")
    assert not old.config.conditional
    assert old.config.prior == "fixed"


def test_a_new_model_draws_every_weight(kind):
    config = T5VAEConfig(t5=T5_CONFIGS[kind](), conditional=True, prior="learned")
    model = Origin(lambda: T5VAE(config), 3).build()
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.ndim == 1 or weight.std() > 0, name


def test_the_heads_compute_in_float32_in_a_half_precision_model(tmp_path, pairs):
    conditional().save_pretrained(tmp_path)
    half = T5VAE.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.prior_head.weight.dtype == half.posterior.head.weight.dtype == torch.float32
    assert half.decoder.block[0].layer[1].EncDecAttention.q.weight.dtype == torch.bfloat16
    out = half(**pairs)
    assert out.prior.mean.dtype == out.posterior.mean.dtype == torch.float32


def test_the_elbo_of_a_linear_gaussian_pair_is_its_likelihood_at_the_true_posterior():
    """c ~ N(0,1), z|c ~ N(ac, 1), x|z,c ~ N(bz + dc, s^2), so x|c is normal."""
    family = make_vae(latent_dim=1).family
    a, b, d, s = 0.7, -1.3, 0.4, 0.8
    rng = torch.Generator().manual_seed(2)
    c, x = torch.randn(64, 1, generator=rng), torch.randn(64, 1, generator=rng)
    evidence = torch.distributions.Normal((a * b + d) * c, math.hypot(b, s)).log_prob(x)
    prior = family.of(torch.cat([a * c, torch.zeros(64, 1)], 1))
    variance = 1 / (1 + b * b / s**2)
    mean = variance * (a * c + b * (x - d * c) / s**2)

    def elbo(mean, variance):
        q = family.of(torch.cat([mean, torch.full((64, 1), math.log(variance))], 1))
        # E_q log p(x|z,c), in closed form
        squared = (x - b * mean - d * c).square() + b * b * variance
        likelihood = -0.5 * (squared / s**2 + math.log(2 * math.pi * s * s))
        return likelihood - q.kl(prior)

    torch.testing.assert_close(elbo(mean, variance), evidence, atol=1e-5, rtol=1e-5)
    for other in (elbo(mean + 0.2, variance), elbo(mean, 2 * variance), elbo(a * c, 1.0)):
        assert torch.all(other < evidence)
