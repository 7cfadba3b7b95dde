"""The sum of position bias and mask that all layers of the encoder use together, against
transformers' own encoder, where each layer makes it."""

import pytest
import torch
from small_models import make_vae

from dsvae.modeling.attention import MASK_ALIGNMENT, mask_bias
from dsvae.modeling.t5_vae import T5VAEConfig
from dsvae.planning.dry_run import dry_run


@pytest.mark.parametrize("kind", ["t5 v1.0", "t5 v1.1", "mt5"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_states_and_gradients_are_those_of_transformers(kind, checkpointing, precision, batch):
    ids, mask, _ = batch
    model = make_vae(kind).train()
    if precision == "bf16":
        model.to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for ours in (True, False):
        model.zero_grad()
        torch.manual_seed(1)  # dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            if ours:
                states = model._encode(ids, mask).last_hidden_state
            else:
                embeddings = model.shared(ids)
                states = model.encoder(
                    inputs_embeds=embeddings, attention_mask=mask
                ).last_hidden_state
        (states.float() * mask[..., None]).square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((states, gradients))
    (states, gradients), (expected_states, expected) = found
    assert torch.equal(states, expected_states)
    assert gradients.keys() == expected.keys()
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("length", [5, 8])
def test_rows_begin_where_the_kernel_of_gpus_wants_them(length):
    """Otherwise it would copy the sum in every layer."""
    # as T5 computes it: its heads lie innermost
    bias = torch.randn(length, length, 3).permute(2, 0, 1)[None]
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 3:] = 0
    found = mask_bias(bias, mask)
    assert all(stride % MASK_ALIGNMENT == 0 for stride in found.stride()[:-1])
    assert found.stride(-1) == 1
    lowest = torch.finfo(torch.float32).min
    expected = bias.repeat(2, 1, 1, 1).masked_fill(mask[:, None, None] == 0, lowest)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [256, 253])
def test_a_layer_of_the_encoder_keeps_no_mask_of_its_own(tokens):
    rows, heads = 4, 16
    mask = rows * heads * tokens * tokens * 2
    kept = []
    for layers in (2, 6):
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": heads, "vocab_size": 50}
        t5 |= {"num_layers": layers, "num_decoder_layers": 1, "decoder_start_token_id": 0}
        run = dry_run(
            T5VAEConfig(t5=t5),
            rows=rows,
            tokens=tokens,
            evaluation_rows=0,
            dtype=torch.bfloat16,
            autocast=None,
            gradient_checkpointing=False,
            freeze_decoder=False,
            fused_attention=True,
        )
        kept.append(run.forward)
    assert (kept[1] - kept[0]) / 4 < 0.5 * mask
