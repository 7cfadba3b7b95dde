"""Attention of the decoder, whose self-attention can also look at latent memory slots.

transformers dispatches the attention of T5, mT5 and umT5 through
`ALL_ATTENTION_FUNCTIONS`, so memory slots need no copy of the model code. The function
registered here prepends the slots of its layer to the keys and values, and calls the
stock SDPA. Cross-attention to a condition calls the same function, without slots. The
attentions of transformers themselves would leave the slots out without an error.

The slots are a keyword argument of the decoder stack and not a part of its key/value
cache. Gradient checkpointing sets the cache to None, which would drop the latent. The
stock SDPA crops keys that are longer than the queries when it gets no mask, which would
shift causality by a slot. And outside the cache, relative positions stay those of the
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dsvae.modeling.packing import Packing

LATENT_ATTENTION = "dsvae_latent_sdpa"
"""Name under which transformers finds `latent_attention_forward`: the decoder's
`_attn_implementation`."""
ENCODER_ATTENTION = "dsvae_sdpa"
"""The encoder's, `encoder_attention_forward`, with a mask that is always written out."""
MASK_ALIGNMENT = 8
"""The memory-efficient kernel copies a bias whose rows do not begin at multiples of it."""
EAGER_ATTENTION = "dsvae_eager"
"""Of both stacks: `eager_attention_forward`, which returns its weights."""


def latent_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor,
    latent_memory: Tensor | None = None,
    latent_mask: Tensor | None = None,
    packing: Packing | None = None,
    bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes scaled dot-product attention over `[memory slots of this layer, tokens]`.

    Args:
        module: the attention module; `module.layer_idx` says which slots belong to it.
            Only self-attention, where `module.is_causal` is set, has slots.
        query: (B, H, Q, D).
        key, value: (B, H, K, D), the tokens seen so far, or those of the condition.
        attention_mask: (B or 1, 1, Q, K) boolean, True where a query may see a key.
        position_bias: (1, H, Q, K), T5's relative position bias, zeros in
            cross-attention.
        latent_memory: (B, L, 2, M, H, D), for each decoder layer the keys and values of
            M slots; or (B, 1, 2, M, H, D), of this layer alone. None: plain attention.
        latent_mask: (B, M) boolean, the slots that count. None: all.
        packing: the queries are packed, (N, H, 1, D); so are the keys of self-attention,
            whose position bias is then `bias`, as of `_within`.

    Every query sees every slot that counts. Slots have no position, so their bias is
    zero.
    """
    if packing is not None:
        bias = bias if module.is_causal else position_bias
        given = (query, key, value, attention_mask, bias, latent_memory, latent_mask)
        return _packed_decoder(module, packing, *given, kwargs)
    key, value, attention_mask, position_bias = _with_slots(
        module, key, value, attention_mask, position_bias, latent_memory, latent_mask
    )
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


def encoder_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor | None = None,
    masked_bias: Tensor | Sequence[Tensor | None] | None = None,
    packing: Packing | None = None,
    bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls the stock SDPA. With `masked_bias` of `mask_bias`, all layers use the same
    memory. Otherwise each layer makes (B, H, S, S) numbers, and keeps them for its
    backward pass. With `packing` and `bias`, as of the decoder, `masked_bias` has that of
    each group."""
    if packing is not None:
        given = (query, key, value, attention_mask, bias, masked_bias)
        return _packed_encoder(module, packing, *given, kwargs)
    assert masked_bias is None or isinstance(masked_bias, Tensor)
    if masked_bias is not None:
        attention_mask = _MaskedBias.apply(position_bias, attention_mask, masked_bias)
        position_bias = None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )


# What packed attention does depends on the lengths of the sentences: torch.compile would
# compile it for every step again.
@torch.compiler.disable
def _packed_decoder(
    module: nn.Module,
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    latent_memory: Tensor | None,
    latent_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Computes `latent_attention_forward` for packed queries."""
    attend = partial(latent_attention_forward, module, **kwargs)
    if not module.is_causal:
        keys, values = packing.split(key), packing.split(value)
        masks = packing.split(attention_mask)
        return _packed(attend, packing, query, keys, values, masks, [bias] * len(masks))
    keys, values, biases = _within(module, packing, key, value, bias)
    assert attention_mask is not None  # (1, 1, T, T)
    masks = [attention_mask[:, :, : each.width, : each.width] for each in packing.groups]
    more = {"latent_memory": latent_memory, "latent_mask": latent_mask}
    of_groups = {name: packing.split(each) for name, each in more.items()}
    return _packed(attend, packing, query, keys, values, masks, biases, **of_groups)


@torch.compiler.disable
def _packed_encoder(
    module: nn.Module,
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    masked_bias: Sequence[Tensor | None] | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Computes `encoder_attention_forward` for packed sentences."""
    keys, values, biases = _within(module, packing, key, value, bias)
    masks = [
        None if mask is None or group.full else mask[..., : group.width]
        for group, mask in zip(packing.groups, packing.split(attention_mask), strict=True)
    ]
    attend = partial(encoder_attention_forward, module, **kwargs)
    shared = masked_bias or [None] * len(keys)
    return _packed(attend, packing, query, keys, values, masks, biases, masked_bias=shared)


def _within(
    module: Any, packing: Packing, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns the keys, the values and the position bias of each group, for the
    self-attention of packed tokens.

    Args:
        key, value: (N, H, 1, D).
        bias: (1, H, T, T) of all layers; None: each layer has its own.
    """
    if bias is None:
        bias = cast(Tensor, module.compute_bias(packing.longest, packing.longest, key.device))
    keys, values = (packing.spread(each[:, :, 0]) for each in (key, value))
    return keys, values, [bias[:, :, : each.width, : each.width] for each in packing.groups]


def _packed(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    packing: Packing,
    query: Tensor,
    *of_groups: Sequence[Tensor | None],
    **more: Sequence[Tensor | None],
) -> tuple[Tensor, None]:
    """Computes the attention of packed tokens (N, H, 1, D), group by group; returns
    (N, 1, H, D).

    Args:
        of_groups: keys, values, masks and position biases of each group.
        more: other arguments of `attend`, of each group.
    """
    found = []
    for number, queries in enumerate(packing.spread(query[:, :, 0])):
        key, value, mask, bias = (each[number] for each in of_groups)
        named = {name: each[number] for name, each in more.items()}
        found.append(attend(queries, key, value, mask, position_bias=bias, **named)[0])
    return packing.gather(found)[:, None], None


@torch.no_grad()
def mask_bias(position_bias: Tensor, attention_mask: Tensor) -> Tensor:
    """Returns the sum of bias and mask that SDPA takes, (B, H, S, S), in the dtype that
    the layers compute in.

    Args:
        position_bias: (1, H, S, S).
        attention_mask: (B, S), 1 = token, 0 = padding.
    """
    device, length = position_bias.device.type, position_bias.shape[-1]
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    more = (0, -length % MASK_ALIGNMENT)
    kept = F.pad(attention_mask, more).bool()[:, None, None]
    bias = F.pad(position_bias, more).contiguous()
    lowest = torch.finfo(low or bias.dtype).min
    return torch.where(kept, bias, lowest).to(low or bias.dtype)[..., :length]


class _MaskedBias(torch.autograd.Function):
    """(position_bias (1, H, Q, K), mask (B, 1, Q, K) boolean, masked_bias (B, H, Q, K)) ->
    masked_bias, with the gradient that masking position_bias here would have."""

    @staticmethod
    def forward(ctx: Any, position_bias: Tensor, mask: Tensor, masked_bias: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dtype = position_bias.dtype
        return masked_bias.view_as(masked_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, gradient.to(ctx.dtype), 0).sum(0, keepdim=True), None, None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor,
    scaling: float,
    dropout: float = 0.0,
    latent_memory: Tensor | None = None,
    latent_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Computes the same in plain torch; returns the weights (B, H, Q, M + K) too, the
    slots first."""
    key, value, attention_mask, position_bias = _with_slots(
        module, key, value, attention_mask, position_bias, latent_memory, latent_mask
    )
    scores = query @ key.transpose(2, 3) * scaling + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def _with_slots(
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor,
    latent_memory: Tensor | None,
    latent_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Returns keys, values, mask and position bias, with the slots of this layer before
    the tokens if it has some."""
    if latent_memory is None or not module.is_causal:
        return key, value, attention_mask, position_bias
    layer = cast(int, module.layer_idx) if latent_memory.shape[1] > 1 else 0
    slots = latent_memory[:, layer].to(key.dtype).transpose(2, 3)  # (B, 2, H, M, D)
    count = slots.shape[3]
    if latent_mask is not None and attention_mask is not None:
        rows = latent_mask[:, None, None].expand(-1, 1, attention_mask.shape[2], -1)
        attention_mask = torch.cat([rows, attention_mask.expand(len(rows), -1, -1, -1)], dim=-1)
    elif attention_mask is not None:
        attention_mask = F.pad(attention_mask, (count, 0), value=True)
    return (
        torch.cat([slots[:, 0], key], dim=2),
        torch.cat([slots[:, 1], value], dim=2),
        attention_mask,
        F.pad(position_bias, (count, 0)),
    )


def explicit_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Returns a mask, (1 or B, 1, Q, K) boolean, always written out: causal over the
    decoder's own tokens, bidirectional over those of a sentence or a condition.

    The stock mask function may return None and leave causality to a flag. Memory slots
    would shift that causality, and umT5 sets the flag wrongly in some releases of
    transformers. And to see whether anything is padded, it makes the host wait for the
    GPU in every pass of the encoder. Without padding the decoder's batch shares one
    causal mask, so that the sum of bias and mask stays (1, H, Q, K).
    """
    if attention_mask is None and mask_function is causal_mask_function:
        queries = torch.arange(q_length, device=device)[:, None] + q_offset
        keys = torch.arange(kv_length, device=device)[None, :] + kv_offset
        return (keys <= queries)[None, None]
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    assert mask is not None  # skipping is off
    return mask


for _name, _attend in (
    (LATENT_ATTENTION, latent_attention_forward),
    (ENCODER_ATTENTION, encoder_attention_forward),
    (EAGER_ATTENTION, eager_attention_forward),
):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, explicit_mask)
