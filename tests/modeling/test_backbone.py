"""What a T5VAE asks of a T5, against transformers' own models and their weights."""

import pytest
from small_models import T5_CONFIGS
from transformers import AutoModelForSeq2SeqLM, BartConfig

from dsvae.modeling.backbone import backbone


@pytest.fixture(params=T5_CONFIGS)
def pretrained(request):
    return AutoModelForSeq2SeqLM.from_config(T5_CONFIGS[request.param]())


def test_sizes_are_those_of_the_weights(pretrained):
    base, state = backbone(pretrained.config), pretrained.state_dict()
    assert state["shared.weight"].shape == (base.vocabulary, base.encoder_width)
    assert state["lm_head.weight"].shape == (base.vocabulary, base.decoder_width)
    assert len(pretrained.encoder.block) == base.encoder_layers
    assert len(pretrained.decoder.block) == base.decoder_layers
    attention = pretrained.decoder.block[0].layer[0].SelfAttention
    assert attention.q.weight.shape == (base.query_heads * base.head_width, base.decoder_width)
    assert attention.k.weight.shape == (base.key_value_heads * base.head_width, base.decoder_width)
    assert {type(each).__name__ for each in pretrained.encoder.block} == set(base.blocks)
    assert type(pretrained).__name__ == base.architecture


def test_every_weight_of_the_stacks_has_its_own_name_and_shape_in_a_pretrained_model(pretrained):
    base, state = backbone(pretrained.config), pretrained.state_dict()
    read = set()
    for side, stack in (("encoder", base.encoder()), ("decoder", base.decoder())):
        for name, weight in stack.named_parameters():
            key = base.pretrained_key(f"{side}.{name}")
            assert state[key].shape == weight.shape
            read.add(key)
    whole = base.decoder(cross_attention=True)
    kept = {f"decoder.{name}": weight for name, weight in whole.named_parameters()}
    for name, weight in kept.items():
        assert base.pretrained_key(name, cross_attention=True) == name
        assert state[name].shape == weight.shape
    assert set(kept) | read == set(state) - set(base.embedding_keys)
    unread = {name for name in state if name not in read and ".layer.1.EncDec" not in name}
    norms = {f"decoder.block.{i}.layer.1.layer_norm.weight" for i in range(base.decoder_layers)}
    assert unread == {*base.embedding_keys, *norms}


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="'bart' is not one of t5, mt5, umt5, t5gemma"):
        backbone(BartConfig())
