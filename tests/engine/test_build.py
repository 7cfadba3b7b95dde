"""Where a new T5's configuration is wrong, it is said before anything is built."""

import json
from types import SimpleNamespace

import pytest
import torch
from small_models import make_t5, make_vae

from dsvae import T5VAE
from dsvae.config import ModelConfig
from dsvae.engine.build import Annotations, find_origin
from dsvae.errors import UserError

SMALL = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}


class Tokenizer(SimpleNamespace):
    def __len__(self):
        return 50


TOKENIZER = Tokenizer(pad_token_id=0, eos_token_id=1)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_fields_of_transformers_configuration_are_taken(kind):
    fields = {
        **SMALL,
        "model_type": kind,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    config = find_origin(ModelConfig(t5=fields), TOKENIZER, None, 0).config
    assert (config.t5.d_ff, config.t5.vocab_size, config.tie_word_embeddings) == (
        16,
        50,
        kind == "t5" and config.tie_word_embeddings,
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"d_modle": 32}, "model model.t5: unknown field d_modle; did you mean d_model?"),
        ({"d_model": "abc"}, "model model.t5: .*d_model.*abc"),
        ({"model_type": "bert"}, "model model.t5: "),
        ({"feed_forward_proj": "gated-nothing-at-all"}, "model model.t5: "),
    ],
)
def test_a_field_that_is_not_one_is_told_in_one_line(field, message):
    with pytest.raises(UserError, match=message) as caught:
        find_origin(ModelConfig(t5={**SMALL, **field}), TOKENIZER, None, 0)
    assert "\n" not in str(caught.value)


def test_a_model_saved_before_there_were_families_is_gaussian(tmp_path):
    model = make_vae(injection="memory")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for name in ("family", "categories", "spike_prior"):
        del fields[name]
    path.write_text(json.dumps(fields))
    assert T5VAE.from_pretrained(tmp_path).config.family == "gaussian"
    latent = {name: fields[name] for name in ("latent_dim", "injection", "pooling", "memory_slots")}
    settings = ModelConfig(name=str(tmp_path), **latent)
    loaded = find_origin(settings, range(60), None, 0).build()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_sentences_with_conditions_make_a_conditional_model(tmp_path):
    make_t5("t5 v1.1", tmp_path)
    for settings, conditional, prior in (
        (ModelConfig(name=str(tmp_path)), False, "fixed"),
        (ModelConfig(name=str(tmp_path)), True, "learned"),
        (ModelConfig(name=str(tmp_path), prior="fixed"), True, "fixed"),
        (ModelConfig(name=str(tmp_path), injection="none"), True, "fixed"),
        (ModelConfig(t5=SMALL), True, "learned"),
    ):
        config = find_origin(settings, TOKENIZER, None, 0, Annotations(conditional)).config
        assert (config.conditional, config.prior) == (conditional, prior)


@pytest.mark.parametrize(
    ("saved", "conditional", "settings", "message"),
    [
        ({}, True, {}, "it reads no conditions, and --data.condition_column is set"),
        ({"conditional": True}, False, {}, "it reads conditions: set --data.condition_column"),
        (
            {"conditional": True, "prior": "learned"},
            True,
            {"prior": "fixed"},
            "its prior is learned, not fixed: set --model.prior",
        ),
        ({"conditional": True, "prior": "learned"}, True, {}, None),
        ({"conditional": True, "injection": "none"}, True, {"injection": "none"}, None),
    ],
)
def test_a_t5vae_with_other_conditions_or_another_prior_is_refused(
    saved, conditional, settings, message, tmp_path
):
    model = make_vae(**saved)
    model.save_pretrained(tmp_path)
    fields = {"latent_dim": 6, "memory_slots": 2, **settings}
    asked = ModelConfig(name=str(tmp_path), **fields)
    if message is None:
        loaded = find_origin(asked, TOKENIZER, None, 0, Annotations(conditional)).build()
        torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    else:
        with pytest.raises(UserError, match=message):
            find_origin(asked, TOKENIZER, None, 0, Annotations(conditional))
