"""Decoder self-attention that can also look at latent memory slots.

transformers dispatches the attention of T5, mT5 and umT5 through
`ALL_ATTENTION_FUNCTIONS`, so memory slots need no copy of the model code: the function
registered here prepends the slots of its layer to the keys and values and calls the
stock SDPA.

The slots travel as a keyword argument through the decoder stack and not in the
key/value cache: gradient checkpointing sets the cache to None (the latent would
vanish), and the stock SDPA crops keys that are longer than the queries when it is given
no mask (a prefilled slot would shift causality). Outside the cache, relative positions
also stay those of the tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LATENT_ATTENTION = "dsvae_latent_sdpa"
"""Name under which transformers finds `latent_attention_forward`: the decoder's
`_attn_implementation`."""


def latent_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor,
    latent_memory: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over `[memory slots of this layer, tokens]`.

    Args:
        module: the attention module; `module.layer_idx` says which slots are its own.
        query: (B, H, Q, D).
        key, value: (B, H, K, D), the tokens seen so far.
        attention_mask: (B or 1, 1, Q, K) boolean, True = may be attended to.
        position_bias: (1, H, Q, K), T5's relative position bias.
        latent_memory: (B, L, 2, M, H, D): for each decoder layer, keys and values of M
            slots. None: plain attention.

    Every query sees every slot; slots have no position, so their bias is zero.
    """
    if latent_memory is not None:
        # (B, 2, H, M, D)
        slots = latent_memory[:, cast(int, module.layer_idx)].to(key.dtype).transpose(2, 3)
        count = slots.shape[3]
        key = torch.cat([slots[:, 0], key], dim=2)
        value = torch.cat([slots[:, 1], value], dim=2)
        position_bias = F.pad(position_bias, (count, 0))
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (count, 0), value=True)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        position_bias=position_bias,
        is_causal=False,
        **kwargs,
    )


def explicit_causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The decoder's mask, (1 or B, 1, Q, K) boolean, always written out.

    The stock mask function may return None and leave causality to a flag, which memory
    slots would shift (and which umT5 sets wrongly in some releases of transformers).
    Without padding the mask is shared by the batch, so that SDPA's merged bias-and-mask
    stays (1, H, Q, K).
    """
    if attention_mask is None:
        queries = torch.arange(q_length, device=device)[:, None] + q_offset
        keys = torch.arange(kv_length, device=device)[None, :] + kv_offset
        return (keys <= queries)[None, None]
    kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    assert mask is not None  # skipping is off
    return mask


AttentionInterface.register(LATENT_ATTENTION, latent_attention_forward)
AttentionMaskInterface.register(LATENT_ATTENTION, explicit_causal_mask)
