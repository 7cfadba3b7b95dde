"""Parameter counts against the published totals."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from dsvae.modeling.t5_vae import T5VAEConfig
from dsvae.planning.dry_run import build, weights_of
from dsvae.planning.sizes import KNOWN, configuration_of

# As the released checkpoints have them, embeddings counted once, an lm_head of their
# own counted where there is one.
PUBLISHED = {
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": 222_903_552,
    "google-t5/t5-large": 737_668_096,
    "google-t5/t5-3b": 2_851_598_336,
    "google-t5/t5-11b": 11_307_321_344,
    "google/t5-v1_1-small": 76_961_152,
    "google/t5-v1_1-base": 247_577_856,
    "google/t5-v1_1-large": 783_150_080,
    "google/t5-v1_1-xl": 2_849_757_184,
    "google/t5-v1_1-xxl": 11_135_332_352,
    "google/mt5-small": 300_176_768,
    "google/mt5-base": 582_401_280,
    "google/mt5-large": 1_229_581_312,
    "google/mt5-xl": 3_742_619_648,
    "google/mt5-xxl": 12_921_057_280,
    "google/byt5-small": 299_637_760,
    "google/umt5-small": 306_601_984,
}
# Likewise. Of l-l and 2b-2b no total was found; the sides of 2b-2b are in the others.
PUBLISHED_T5GEMMA = {
    "google/t5gemma-s-s-prefixlm": 312_517_632,
    "google/t5gemma-b-b-prefixlm": 591_490_560,
    "google/t5gemma-ml-ml-prefixlm": 2_200_345_344,
    "google/t5gemma-xl-xl-prefixlm": 3_766_980_608,
    "google/t5gemma-9b-2b-ul2": 12_292_375_296,
    "google/t5gemma-9b-9b-ul2": 20_333_401_088,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_t5_of_a_known_configuration_has_the_published_number_of_parameters(name):
    config = configuration_of(name)
    kind = config.pop("model_type")
    own_head = kind != "t5" or not config["tie_word_embeddings"]
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **config))
    # transformers 5 ties every T5 that it builds from a configuration; the released
    # v1.1, mT5, umT5 and ByT5 are not tied.
    tied = "lm_head.weight" not in dict(model.named_parameters())
    head = config["vocab_size"] * config["d_model"] if own_head and tied else 0
    assert sum(p.numel() for p in model.parameters()) + head == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_T5GEMMA)
def test_a_known_t5gemma_has_the_published_number_of_parameters(name):
    config = configuration_of(name)
    vae = T5VAEConfig(t5=config, latent_dim=32, injection="cross", memory_slots=8)
    with torch.device("meta"):
        theirs = AutoModelForSeq2SeqLM.from_config(vae.t5)
    assert sum(p.numel() for p in theirs.parameters()) == PUBLISHED_T5GEMMA[name]
    width = config["encoder"]["hidden_size"]
    latent_path = (width + 1) * 64 + (32 + 1) * 8 * width + width
    found = sum(w.numel for w in weights_of(build(vae, False)))
    assert found == PUBLISHED_T5GEMMA[name] + latent_path


@pytest.mark.parametrize("name", ["google-t5/t5-base", "google/t5-v1_1-base", "google-t5/t5-3b"])
def test_a_t5vae_has_its_t5_without_cross_attention_and_the_latent_path(name):
    c = configuration_of(name)
    weights = weights_of(
        build(T5VAEConfig(t5=c, latent_dim=32, injection="memory", memory_slots=1), False)
    )
    inner, layers = c["num_heads"] * c["d_kv"], c["num_decoder_layers"]
    # q, k, v, o and the norm before them
    cross = layers * (4 * inner * c["d_model"] + c["d_model"])
    posterior = c["d_model"] * 64 + 64
    memory = (32 + 1) * layers * 2 * inner
    assert sum(w.numel for w in weights) == PUBLISHED[name] - cross + posterior + memory


def test_injection_by_cross_has_every_weight_of_its_t5():
    c, slots = configuration_of("t5-base"), 8
    config = T5VAEConfig(t5=c, latent_dim=32, injection="cross", memory_slots=slots)
    d_model = c["d_model"]
    latent_path = (d_model + 1) * 64 + (32 + 1) * slots * d_model + d_model
    found = sum(w.numel for w in weights_of(build(config, False)))
    assert found == PUBLISHED["google-t5/t5-base"] + latent_path


def test_a_frozen_decoder_trains_encoder_and_latent_path_only():
    weights = weights_of(build(T5VAEConfig(t5=configuration_of("t5-small")), freeze_decoder=True))
    assert {w.name.split(".")[0] for w in weights if w.trains} == {
        "encoder",
        "posterior",
        "injection",
    }
    assert {w.name.split(".")[0] for w in weights if not w.trains} == {"shared", "decoder"}


def test_adapters_train_in_place_of_the_t5():
    lora = {"rank": 4, "alpha": 16, "targets": ["o", "wi"]}
    config = configuration_of("t5-3b")
    weights = weights_of(build(T5VAEConfig(t5=config, lora=lora), freeze_decoder=False))
    latent = ("posterior.", "injection.")
    trained = [w for w in weights if w.trains and not w.name.startswith(latent)]
    # 24 + 24 layers; o: 32 x 128 to 1024, wi: 1024 to 16384
    assert sum(w.numel for w in trained) == 48 * 4 * ((4096 + 1024) + (1024 + 16384))
    assert all(w.trains for w in weights if w.name.startswith(latent))


def test_short_names_and_the_whole_family_are_known():
    assert configuration_of("t5-base") == configuration_of("google-t5/t5-base")
    assert configuration_of("flan-t5-xl") == configuration_of("google/t5-v1_1-xl")
    assert configuration_of("t5-medium") is None
    assert len(KNOWN) == 5 * 5 + 4 + 2 + 8 * 4
