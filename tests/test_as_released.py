"""The deviations of the released code in tests/benchmarks/as_released.py, against what is
known of them: counts by formula, and transformers' own cache."""

import numpy as np
import pytest
import torch
from benchmarks import as_released
from small_models import make_vae
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.models.t5.modeling_t5 import T5Attention

from dsvae.config import RunConfig
from dsvae.data import batches
from dsvae.modeling.attention import LATENT_ATTENTION, latent_attention_forward
from dsvae.modeling.posterior import Pooling
from dsvae.modeling.t5_vae import CACHE, T5VAE


@pytest.fixture
def restored(monkeypatch):
    """Takes back what the switches replace."""
    for owner, name in (
        (T5Attention, "compute_bias"),
        (T5VAE, "_read"),
        (Pooling, "forward"),
        (batches, "delete_tokens"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    yield
    AttentionInterface.register(LATENT_ATTENTION, latent_attention_forward)


def test_few_slots_are_of_their_own_sentence():
    """Of 128 sentences and 6 layers, 6 of 768 slots, 2 of them of their own layer."""
    count, layers = 128, 6
    sentence, layer = torch.meshgrid(torch.arange(count), torch.arange(layers), indexing="ij")
    own = torch.stack([sentence, layer], dim=-1)  # (B, L, 2): whose part this is
    got = as_released.mix(own.flatten(1), layers).view(count, layers, 2)
    for b, each in ((0, 0), (5, 1), (127, 5), (64, 3)):
        place = each * count + b
        assert got[b, each].tolist() == [place // layers, place % layers]
    same = got == own
    assert same[..., 0].sum() == 6
    assert same.all(-1).sum() == 2
    assert torch.equal(as_released.mix(own[7:8].flatten(1), layers), own[7:8].flatten(1))


@pytest.mark.parametrize("tied", [False, True])
def test_slots_are_mixed_within_groups(tied):
    base = make_vae().config.backbone
    torch.manual_seed(0)
    mixed = as_released.ReleasedMemory(base, 5, 1, group=4, tied=tied)
    alone = as_released.ReleasedMemory(base, 5, 1, group=1, tied=tied)
    alone.load_state_dict(mixed.state_dict())
    z = torch.randn(7, 5)
    found, apart = (each(z, None)[1]["latent_memory"] for each in (mixed, alone))
    assert found.shape == (7, base.decoder_layers, 2, 1, base.key_value_heads, base.head_width)
    for start, rows in ((0, 4), (4, 3)):  # the last group is not whole
        for b in range(rows):
            for layer in range(base.decoder_layers):
                place = layer * rows + b
                of, part = divmod(place, base.decoder_layers)
                assert torch.equal(found[start + b, layer], apart[start + of, part])
    assert torch.equal(apart[:, :, 0], apart[:, :, 1]) == tied
    zero = mixed(torch.zeros(4, 5), None)[1]["latent_memory"]
    assert mixed.projection.bias is None if tied else torch.equal(zero[0], zero[3])
    assert not tied or not zero.any()


def test_a_slot_with_a_position_is_a_past_token(restored):
    """As transformers treats a key and value that are in its cache."""
    model = make_vae(injection="memory", memory_slots=1).eval()
    labels = torch.randint(2, 50, (3, 9))
    z = torch.randn(3, model.config.latent_dim)
    inputs = model.shared(model.shift_right(labels))
    memory = model.injection(z, inputs)[1]["latent_memory"]
    cache = DynamicCache()
    for layer in range(memory.shape[1]):
        key, value = memory[:, layer].transpose(2, 3).unbind(1)
        cache.update(key, value, layer)
    with torch.no_grad():
        plain = model(labels=labels, latent=z).logits
        past = model.decoder(inputs_embeds=inputs, use_cache=True, **{CACHE: cache})
        expected = model.lm_head(past.last_hidden_state * model.output_scale)
        as_released.slot_has_a_position(RunConfig())
        found = model(labels=labels, latent=z).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_half_of_the_deletions(restored):
    as_released.fewer_deletions(RunConfig())
    ids = np.arange(21)
    rng = np.random.default_rng(0)
    kept = [batches.delete_tokens(ids, 0.4, rng) for _ in range(4000)]
    deleted = np.bincount([21 - len(row) for row in kept], minlength=9)
    assert deleted[8:].sum() == 0  # 0 to floor(0.4 * 20) - 1 = 7
    np.testing.assert_allclose(deleted[:8] / 4000, 1 / 8, atol=0.025)  # 5 standard errors
    assert all(row[-1] == 20 and (np.diff(row) > 0).all() for row in kept)
    assert len(batches.delete_tokens(np.arange(5), 0.4, rng)) == 5


def test_padding_is_pooled(restored):
    model = make_vae(pooling="mean").eval()
    ids = torch.randint(2, 50, (2, 7))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    config = RunConfig()
    wide_ids, wide_mask = (torch.cat([x, x.new_zeros(2, 57)], 1) for x in (ids, mask))
    with torch.no_grad():
        states = model._encode(wide_ids, wide_mask).last_hidden_state
        expected = model.posterior.head(states.mean(1))
        before = model(ids, mask, encode_only=True).posterior.parameters
        as_released.pool_over_padding(config)
        found = model(ids, mask, encode_only=True).posterior.parameters
    assert config.data.max_tokens == 64
    torch.testing.assert_close(found, expected)
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_in_place_of_ids_tells_the_length_at_most(padded, restored):
    model = make_vae(pooling="mean").eval()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]])
    if padded:
        as_released.pool_over_padding(RunConfig())
    with torch.no_grad():
        found = model(mask, mask, encode_only=True).posterior.parameters
    torch.testing.assert_close(found[0], found[2])
    distance = (found[0] - found[1]).abs().max()
    assert distance > 1e-3 if padded else distance < 1e-5
