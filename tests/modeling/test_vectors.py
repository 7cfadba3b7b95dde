"""Several vectors per text, of which a short text lacks some: the exact tests."""

import math

import pytest
import torch
from small_models import FAMILIES, decoded_by_the_cache, make_vae
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from dsvae import T5VAE, T5VAEConfig
from dsvae.modeling.families import (
    CategoricalFamily,
    GaussianFamily,
    VectorFamily,
    make_family,
    masked,
    present,
)
from dsvae.modeling.posterior import ChunkPooling, QueryPooling

CLOSE = {"atol": 3e-4, "rtol": 1e-3}
K, D = 5, 6
CHUNKS = {"pooling": "chunks", "chunk": 2, "latent_vectors": K}
QUERIES = {"pooling": "queries", "query_layers": 2, "latent_vectors": K}
SHAPES = {
    "chunks cross": {**CHUNKS, "injection": "cross"},
    "chunks memory": {**CHUNKS, "injection": "memory"},
    "queries cross": {**QUERIES, "injection": "cross"},
    "queries memory": {**QUERIES, "injection": "memory"},
    "spike_slab": {**CHUNKS, "injection": "cross", "family": "spike_slab"},
    "categorical": {**CHUNKS, "injection": "memory", "family": "categorical", "categories": 3},
    "umt5": {**CHUNKS, "injection": "memory", "kind": "umt5"},
    "t5gemma": {**CHUNKS, "injection": "cross", "kind": "t5gemma"},
}


@pytest.fixture(params=SHAPES)
def model(request):
    return make_vae(**{"memory_slots": 1, **SHAPES[request.param]})


def lengths_of(mask):
    return mask.sum(1).tolist()


def expected_vectors(model, mask):
    """How many vectors each text has: its tokens by twos, rounded up, or all."""
    chunks = model.config.pooling == "chunks"
    return [math.ceil(n / 2) if chunks else K for n in lengths_of(mask)]


def test_a_batch_equals_singles_and_padding_changes_nothing(model, batch):
    ids, mask, labels = batch
    noise = torch.randn(5, model.family.noise_width)
    together = model(ids, mask, labels=labels, noise=noise)
    padded = model(
        F.pad(ids, (0, 7)),
        F.pad(mask, (0, 7)),
        labels=F.pad(labels, (0, 5), value=-100),
        noise=noise,
    )
    torch.testing.assert_close(together.logits, padded.logits[:, :9], **CLOSE)
    torch.testing.assert_close(together.latent, padded.latent, **CLOSE)
    left = model(F.pad(ids, (3, 0)), F.pad(mask, (3, 0)), labels=labels, noise=noise)
    if model.config.t5.model_type != "t5gemma":  # its positions are not relative to the text
        torch.testing.assert_close(together.latent, left.latent, **CLOSE)
    for row, length in enumerate(lengths_of(mask)):
        alone = model(
            ids[row : row + 1, :length],
            labels=labels[row : row + 1, :length],
            noise=noise[row : row + 1],
        )
        torch.testing.assert_close(together.latent[row], alone.latent[0], **CLOSE)
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], **CLOSE)
        kl, own = together.posterior.kl(together.prior), alone.posterior.kl(alone.prior)
        torch.testing.assert_close(kl[row], own[0], **CLOSE)


def test_a_text_has_as_many_vectors_as_its_length_says(model, batch):
    ids, mask, labels = batch
    out = model(ids, mask, labels=labels, noise=torch.randn(5, model.family.noise_width))
    expected = expected_vectors(model, mask)
    per_vector = out.posterior.kl(out.prior).view(5, K, -1)
    for z in (out.latent, out.posterior.point):
        for row, count in enumerate(expected):
            vectors = z.view(5, K, -1)[row]
            assert vectors[:count].abs().sum() > 0
            assert vectors[count:].abs().sum() == per_vector[row, count:].abs().sum() == 0
            assert (per_vector[row, :count].sum(1) > 0).all()
    assert present(out.latent, K).sum(1).tolist() == expected


def test_another_text_changes_nothing(model, batch):
    ids, mask, _ = batch
    changed = ids.clone()
    changed[0, :4] = torch.tensor([50, 40, 30, 20])
    one, other = (model.encode(each, mask).parameters for each in (ids, changed))
    torch.testing.assert_close(one[1:], other[1:], atol=0, rtol=0)
    assert not torch.allclose(one[0], other[0], atol=1e-3)


def test_vectors_that_are_not_there_have_no_influence(model, batch):
    """They may even be NaN, if the mask says so; the others all matter."""
    ids, mask, labels = batch
    z = model.encode(ids, mask).sample(torch.randn(5, model.family.noise_width)).detach()
    valid = torch.arange(K) < torch.tensor(expected_vectors(model, mask))[:, None]
    clean = model(latent=z, labels=labels)
    assert clean.logits.isfinite().all()
    filled = z.view(5, K, -1).masked_fill(~valid[..., None], math.nan).flatten(1)
    found = model(latent=filled, latent_mask=valid, labels=labels)
    torch.testing.assert_close(found.logits, clean.logits, atol=0, rtol=0)
    texts = model.generate(latent=z, max_new_tokens=5)
    assert torch.equal(model.generate(latent=filled, latent_mask=valid, max_new_tokens=5), texts)
    for vector in range(K):
        without = valid.clone()
        without[:, vector] = False
        other = model(latent=z, latent_mask=without, labels=labels).logits
        moved = (other - clean.logits).abs().amax((1, 2)) > 1e-4
        assert torch.equal(moved, valid[:, vector])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_cached_decoding_equals_uncached_with_other_numbers_of_vectors(model, batch, options):
    ids, mask, _ = batch
    z, tokens = model.encode(ids, mask).point, torch.randint(3, 60, (5, 7))
    whole = model(latent=z, decoder_input_ids=tokens).logits
    torch.testing.assert_close(whole, decoded_by_the_cache(model, tokens, latent=z), **CLOSE)
    texts = [
        model.generate(latent=z, max_new_tokens=6, use_cache=use, **options)
        for use in (True, False)
    ]
    assert torch.equal(*texts)
    for row in range(5):
        alone = model.generate(latent=z[row : row + 1], max_new_tokens=6, **options)[0]
        assert texts[0][row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("shape", ["chunks cross", "chunks memory", "queries cross"])
def test_gradient_checkpointing_changes_nothing_and_everything_trains(shape, batch):
    ids, mask, labels = batch
    noise, results = torch.randn(5, K * D + 1), []
    for checkpointing in (False, True):
        model = make_vae(memory_slots=1, **SHAPES[shape]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(ids, mask, labels=labels, noise=noise)
        (out.nats.sum() + out.posterior.kl(out.prior).sum()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0, name
        atol = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(gradient, results[1][name], atol=atol, rtol=1e-4, msg=name)


def test_eager_attention_masks_alike(batch):
    ids, mask, labels = batch
    for shape in ("chunks cross", "chunks memory"):
        model = make_vae(**SHAPES[shape])
        stock = model(ids, mask, labels=labels).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids, mask, labels=labels).logits, stock, **CLOSE)


def test_chunks_by_hand():
    pooling, states = ChunkPooling(8, vectors=3, chunk=2), torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    found = pooling(states, mask)
    for b in range(3):
        own = states[b][mask[b].bool()]
        for k in range(3):
            expected = torch.zeros(8)
            if 2 * k < len(own):
                joined = torch.zeros(2, 8)
                joined[: len(own[2 * k : 2 * k + 2])] = own[2 * k : 2 * k + 2]
                x = pooling.joined.weight @ joined.flatten() + pooling.joined.bias
                inner = F.gelu(pooling.inner.weight @ x + pooling.inner.bias)
                expected = x + pooling.outer.weight @ inner + pooling.outer.bias
            torch.testing.assert_close(found[b, k], expected)
    with pytest.raises(ValueError, match="7 tokens.*hold 6"):
        pooling(torch.randn(1, 7, 8), torch.ones(1, 7).long())


def test_queries_are_the_attention_of_torch():
    pooling = QueryPooling(8, vectors=3, query_layers=1)
    states, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    (layer,) = pooling.layers
    reference = torch.nn.MultiheadAttention(8, layer.heads, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(
            torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
        )
        reference.out_proj.weight.copy_(layer.output.weight)
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    x = pooling.queries.weight.expand(2, -1, -1)
    x = x + reference(norm(x), norm(states), norm(states), key_padding_mask=mask == 0)[0]
    inner = F.gelu(norm(x) @ layer.inner.weight.T + layer.inner.bias)
    x = norm(x + inner @ layer.outer.weight.T + layer.outer.bias)
    torch.testing.assert_close(pooling(states, mask), x)


@pytest.mark.parametrize("each", FAMILIES.values(), ids=FAMILIES)
def test_a_distribution_of_vectors_is_that_of_each_vector(each):
    """With as many rows, and without the vectors that there are not."""
    family = VectorFamily(4 * each.units, each, 4, (1.0, 1.0, 1.0, 1.0))
    numbers = [4, 1, 3, 4, 2]
    valid = torch.arange(4) < torch.tensor(numbers)[:, None]
    heads = torch.randn(5, 4, each.parameter_width)
    q = family.of(torch.cat([heads.flatten(1), valid.float()], 1))
    torch.testing.assert_close(family.of(q.parameters).parameters, q.parameters)
    noise = torch.randn(5, 4, each.noise_width)
    z = q.sample(torch.cat([noise.flatten(1), torch.randn(5, 1)], 1))
    kl, prior = q.kl(family.prior()), each.prior()
    pairs, (mean, variance) = q.pairwise_log_prob(z), q.moments()
    for row, count in enumerate(numbers):
        own = each.of(heads[row, :count])
        parts = {
            "z": (z, own.sample(noise[row, :count])),
            "point": (q.point, own.point),
            "kl": (kl, own.kl(prior)),
            "mean": (mean, own.moments()[0]),
            "variance": (variance, own.moments()[1]),
        }
        for name, (found, expected) in parts.items():
            rows = found[row].view(4, -1)
            torch.testing.assert_close(rows[:count], expected, msg=name)
            assert rows[count:].abs().sum() == 0
        density = own.log_prob(z[row].view(4, -1)[:count]).sum()
        torch.testing.assert_close(q.log_prob(z)[row], density)
        torch.testing.assert_close(pairs[row, row].float(), density, atol=1e-3, rtol=1e-3)
        of_prior = prior.log_prob(z[row].view(4, -1)[:count]).sum()
        torch.testing.assert_close(family.prior().log_prob(z[row : row + 1])[0], of_prior)
        assert torch.equal(pairs[row] == -math.inf, torch.tensor(numbers) != count)
    for vector, activity in enumerate(q.activity().view(4, -1)):
        rows = [row for row, count in enumerate(numbers) if count > vector]
        torch.testing.assert_close(activity, each.of(heads[rows, vector]).activity())
    twice = q.repeat(2)
    torch.testing.assert_close(twice.point, q.point.repeat_interleave(2, 0))
    assert q.tensors()["valid"].tolist() == valid.tolist()


def test_the_kl_of_vectors_is_that_of_torch():
    family = VectorFamily(2 * 3, GaussianFamily(3), 2, (1.0, 1.0))
    mean, logvar = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    valid = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 0]])
    q = family.of(torch.cat([torch.cat([mean, logvar], -1).flatten(1), valid], 1))
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    expected = (expected * valid[..., None]).flatten(1)
    torch.testing.assert_close(q.kl(family.prior()), expected, atol=1e-5, rtol=1e-5)


def test_the_prior_draws_the_number_of_vectors_of_the_training_texts():
    config = T5VAEConfig(**CHUNKS, injection="cross", vector_counts=[10, 0, 60, 20, 10])
    family = make_family(config)
    z = family.prior().sample(torch.randn(20_000, family.noise_width))
    found = torch.bincount(present(z, K).sum(1), minlength=6) / len(z)
    expected = torch.tensor([0, 0.1, 0, 0.6, 0.2, 0.1])
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert z[:, :6].std() == pytest.approx(1, abs=0.02)  # and z is not another one for that
    count = present(z, K).sum(1).float()
    assert abs(torch.corrcoef(torch.stack([z[:, 0], count]))[0, 1]) < 0.03


def test_one_value_of_a_variable_changes_one_vector():
    each = CategoricalFamily(3, 4)
    family = VectorFamily(6, each, 2, (1.0, 1.0))
    z = each.of(torch.randn(2, 12)).point.flatten()
    codes = family.codes(z, unit=4)  # of the second vector
    assert codes.shape == (4, 24)
    assert torch.equal(codes[:, :12], z[:12].expand(4, -1))
    assert torch.equal(codes[:, 12:], each.codes(z[12:], 1))


def test_masked_and_present_are_inverse():
    z, valid = torch.randn(3, 8), torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    assert torch.equal(present(masked(z, valid), 2), valid)


def test_one_vector_of_a_new_pooling_is_a_plain_latent(batch):
    ids, mask, labels = batch
    for pooling in ({"pooling": "chunks", "chunk": 9}, {"pooling": "queries"}):
        model = make_vae(injection="both", **pooling)
        out = model(ids, mask, labels=labels, noise=torch.randn(5, 6))
        assert out.posterior.mean.shape == out.latent.shape == (5, 6)


def test_a_class_head_reads_the_mean_of_the_vectors(batch):
    ids, mask, labels = batch
    model = make_vae(classes=["a", "b"], **CHUNKS, injection="cross")
    out = model(ids, mask, labels=labels, class_labels=torch.tensor([0, 1, 0, 1, -100]))
    states = model._encode(ids, mask).last_hidden_state
    vectors = model.posterior.pooling(states, mask)
    for row, count in enumerate(expected_vectors(model, mask)):
        expected = model.class_head(vectors[row, :count].mean(0))
        torch.testing.assert_close(out.class_logits[row], expected, **CLOSE)


def test_a_learned_prior_has_its_own_vectors_for_queries(batch):
    ids, mask, labels = batch
    model = make_vae(conditional=True, prior="learned", **QUERIES, injection="memory")
    out = model(
        ids, mask, labels=labels, condition_ids=ids, condition_mask=mask, noise=torch.randn(5, 31)
    )
    states = model._encode(ids, mask).last_hidden_state
    heads = model.prior_head(model.posterior.pooling(states, mask))  # (B, K, 2d)
    mean = torch.stack([each[:, :D] for each in heads]).flatten(1)
    torch.testing.assert_close(out.prior.point, mean, **CLOSE)
    assert out.logits.isfinite().all()


def test_a_normalized_latent_is_decoded_at_one_length(batch):
    ids, mask, labels = batch
    for fields in ({"injection": "both"}, SHAPES["chunks cross"], SHAPES["chunks memory"]):
        model, plain = make_vae(normalize="l2", **fields), make_vae(**fields)
        z = model.encode(ids, mask).point.detach()
        vectors = z.view(5, -1, D)
        lengths = vectors.norm(dim=-1, keepdim=True)
        scaled = torch.where(lengths > 0, vectors / lengths * D**0.5, 0.0).flatten(1)
        expected = plain(latent=scaled, labels=labels).logits
        for factor in (1.0, 5.0):
            found = model(latent=factor * z, labels=labels).logits
            torch.testing.assert_close(found, expected, **CLOSE)
    with pytest.raises(ValueError, match="normalize"):
        T5VAEConfig(normalize="l2", family="categorical")


@pytest.mark.parametrize("fields", [{}, SHAPES["chunks cross"], SHAPES["queries memory"]])
def test_a_disturbed_latent_is_decoded_in_place_of_z(fields, batch):
    ids, mask, labels = batch
    model = make_vae(**fields)
    z = model.encode(ids, mask).point.detach()
    added, factor = torch.randn_like(z), torch.rand_like(z)
    found = model(ids, mask, labels=labels, added=added, factor=factor)
    by_hand = torch.where(z != 0, (z + added) * factor, 0.0)
    expected = model(latent=by_hand, labels=labels).logits
    torch.testing.assert_close(found.logits, expected, **CLOSE)
    assert torch.equal(found.latent, z)


@pytest.mark.parametrize("fields", [{"pooling": "max"}, SHAPES["chunks cross"], QUERIES])
def test_the_distance_is_that_of_each_chunk_or_of_the_whole_text(fields, batch):
    ids, mask, labels = batch
    model = make_vae(align=True, **fields)
    states = torch.randn(5, ids.shape[1], 32)
    out = model(ids, mask, labels=labels, align_states=states)
    padded = model(
        *(F.pad(each, (2, 0)) for each in (ids, mask)),
        labels=labels,
        latent=out.latent,
        align_states=F.pad(states, (0, 0, 2, 0), value=9.0),
    )
    chunks = fields.get("pooling") == "chunks"
    for row, length in enumerate(lengths_of(mask)):
        parts = states[row, :length].split(2 if chunks else length)
        own = out.latent[row].view(K, D)[: len(parts)] if chunks else out.latent[row][None]
        mapped = own @ model.align_head.weight.T + model.align_head.bias
        means = torch.stack([part.mean(0) for part in parts])
        expected = (1 - F.cosine_similarity(mapped, means)).mean()
        torch.testing.assert_close(out.distance[row], expected)
        torch.testing.assert_close(padded.distance[row], expected)
    assert model(ids, mask, labels=labels).distance is None


def test_save_and_load(model, batch, tmp_path):
    ids, mask, labels = batch
    model.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path).eval()
    assert torch.equal(
        again(ids, mask, labels=labels).logits, model(ids, mask, labels=labels).logits
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"pooling": "mean"}, "pooling"),
        ({"injection": "embedding"}, "injection"),
        ({"injection": "both"}, "injection"),
        ({"injection": "none"}, "injection"),
        ({"clusters": 3}, "clusters"),
        ({"conditional": True, "prior": "learned", "injection": "cross"}, "prior"),
    ],
)
def test_what_cannot_have_several_vectors_is_refused_in_one_line(fields, word):
    with pytest.raises(ValueError, match=word) as caught:
        T5VAEConfig(**{**CHUNKS, "injection": "cross", **fields})
    assert "\n" not in str(caught.value)
