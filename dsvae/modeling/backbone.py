"""What a T5VAE asks of the pretrained encoder-decoder that it is built on.

`backbone(config)` is the only way in. A new kind of model is one class with the members
of `T5Backbone` and its entry in `BACKBONES`.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.t5.modeling_t5 import T5LayerNorm, T5Stack
from transformers.models.t5gemma.modeling_t5gemma import (
    T5GemmaDecoder,
    T5GemmaEncoder,
    T5GemmaRMSNorm,
    T5GemmaRotaryEmbedding,
)
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from dsvae.modeling.attention import (
    EAGER_ATTENTION,
    ENCODER_ATTENTION,
    LATENT_ATTENTION,
    mask_bias,
)
from dsvae.modeling.packing import Packing


class T5Backbone:
    """A T5, v1.0 or v1.1; ByT5 is a T5 or mT5 with a byte vocabulary.

    Args:
        config: the configuration of the pretrained model, as transformers reads it.
    """

    architecture = "T5ForConditionalGeneration"
    """The architecture that a config.json names."""
    blocks: tuple[str, ...] = ("T5Block",)
    """The classes of the layers, which are never split over devices."""
    stack: type[PreTrainedModel] = T5Stack

    attentions: Mapping[str, tuple[str, str]] = {
        "sdpa": (ENCODER_ATTENTION, LATENT_ATTENTION),
        "eager": (EAGER_ATTENTION, EAGER_ATTENTION),
    }
    """The attention of encoder and decoder by its name in transformers; the default is the
    first."""
    own_embeddings = False
    """Whether encoder and decoder have an input embedding each."""
    needs_cross_attention = False
    """Whether the decoder cannot do without encoder states, and has no memory slots."""
    embedding_keys: tuple[str, ...] = (
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    )
    """Names that a pretrained file may have for the decoder's input embedding. A file holds tied
    weights only once."""
    head_key = "lm_head.weight"
    """The name of the output projection in a pretrained model."""
    norm_key = "encoder.final_layer_norm.weight"
    """The name that the weight of `norm` has in a pretrained model."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # Sizes

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding and of the output projection."""
        return self.config.vocab_size

    @property
    def encoder_width(self) -> int:
        """Width of the encoder's states and input embeddings."""
        return self.config.d_model

    @property
    def decoder_width(self) -> int:
        """Width of the decoder's states and input embeddings."""
        return self.config.d_model

    @property
    def encoder_layers(self) -> int:
        return self.config.num_layers

    @property
    def decoder_layers(self) -> int:
        return self.config.num_decoder_layers

    @property
    def query_heads(self) -> int:
        """Heads of the queries in self-attention."""
        return self.config.num_heads

    @property
    def encoder_heads(self) -> int:
        """Heads of the queries in the encoder."""
        return self.query_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of the keys and values in self-attention."""
        return self.config.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head.

        In t5-3b, t5-11b, flan-t5-small and v1.1-small it is not `d_model / num_heads`.
        """
        return self.config.d_kv

    # Tokens and numbers

    @property
    def start_token(self) -> int:
        """The token that decoding starts from: the padding token unless the
        configuration names another."""
        start = getattr(self.config, "decoder_start_token_id", None)
        return self.config.pad_token_id if start is None else start

    @property
    def initializer_factor(self) -> float:
        """Scale of freshly drawn weights."""
        return self.config.initializer_factor

    @property
    def embedding_deviation(self) -> float:
        """Standard deviation of a freshly drawn embedding."""
        return self.config.initializer_factor

    @property
    def logit_cap(self) -> float | None:
        """The logits l become cap tanh(l / cap). None: they stay."""
        return None

    @property
    def tied_by_default(self) -> bool:
        """Whether the output projection is the input embedding, by the configuration
        alone.

        transformers sets `tie_word_embeddings` to True in every T5 configuration. What
        the file said survives in `scale_decoder_outputs`.
        """
        return self.config.scale_decoder_outputs

    def output_scale(self, tied: bool) -> float:
        """Returns the factor on the decoder's output before the projection to logits.

        Args:
            tied: whether the output projection is the input embedding.
        """
        return self._scale(getattr(self.config, "scale_decoder_outputs", False))

    def _scale(self, scaled: bool) -> float:
        return self.config.d_model**-0.5 if scaled else 1.0

    # Modules

    def encoder(self) -> nn.Module:
        """Makes a fresh encoder stack without an embedding. It is called with
        `inputs_embeds`."""
        return self._stack(is_decoder=False)

    def packs(self, *, cross_attention: bool) -> bool:
        """Returns whether the stacks take packed sentences (`dsvae.modeling.packing`), if
        the decoder has cross-attention or not."""
        return True

    def packed(self, stack: Any, packing: Packing) -> dict[str, Any]:
        """Returns what the layers of a stack take for packed sentences, as keywords of its
        call: the packing, and the position bias, (1, H, T, T)."""
        length, device = packing.longest, packing.rows.device
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(length, length, device)
        return {"packing": packing, "bias": bias}

    def shared_by_layers(
        self, encoder: Any, attention_mask: Tensor, packing: Packing | None = None
    ) -> dict[str, Any]:
        """Returns what all layers of an encoder from `encoder` share, as keywords of
        its call: the sum of the position bias and a mask (B, S); with `packing`, that of
        each group, and what `packed` returns."""
        if packing is not None:
            shared = self.packed(encoder, packing)
            shared["masked_bias"] = [
                None
                if group.full or mask is None
                else mask_bias(
                    shared["bias"][:, :, : group.width, : group.width], mask[:, : group.width]
                )
                for group, mask in zip(packing.groups, packing.split(attention_mask), strict=True)
            ]
            return shared
        first, length = encoder.block[0].layer[0].SelfAttention, attention_mask.shape[1]
        with torch.no_grad():
            bias = first.compute_bias(length, length, device=attention_mask.device)
        return {"masked_bias": mask_bias(bias, attention_mask)}

    def norm(self) -> nn.Module:
        """Makes a fresh norm like the one that the encoder applies to its states
        last."""
        return T5LayerNorm(self.encoder_width, eps=self.config.layer_norm_epsilon)

    def decoder(self, *, cross_attention: bool = False) -> nn.Module:
        """Makes a fresh decoder stack that attends to memory slots
        (`dsvae.modeling.attention`), without an embedding.

        Args:
            cross_attention: keep the pretrained model's cross-attention to encoder
                states.
        """
        decoder: Any = self._stack(is_decoder=True)
        for block in decoder.block:
            # Says which of them has slots. Some releases of transformers do not set the
            # flag for umT5.
            block.layer[0].SelfAttention.is_causal = True
            block.layer[1].EncDecAttention.is_causal = False
            if not cross_attention:
                # The feed-forward stays `layer[-1]`, which is how the block calls it.
                del block.layer[1]
        return decoder

    def _stack(self, *, is_decoder: bool) -> nn.Module:
        config = copy.deepcopy(self.config)
        config.is_decoder = is_decoder
        config.is_encoder_decoder = False  # so that the decoder's cache is a plain one
        config.use_cache = is_decoder
        if is_decoder:
            config.num_layers = self.decoder_layers
        config._attn_implementation = self.attentions["sdpa"][is_decoder]
        stack = self.stack(config)
        del stack.embed_tokens
        return stack

    # Names of weights

    def embedding_key(self, keys: Container[str]) -> str:
        """Returns the name of the input embedding among the weights of a pretrained
        model."""
        names = (key for key in self.embedding_keys if key in keys)
        return next(names, self.embedding_keys[0])

    def pretrained_key(self, name: str, *, cross_attention: bool = False) -> str:
        """Returns the name that a weight of a stack or of `lm_head` has in a pretrained
        model.

        There, cross-attention lies between self-attention and the feed-forward.

        Args:
            cross_attention: whether the decoder here has it, too.
        """
        moved = name.startswith("decoder.block.") and not cross_attention
        return name.replace(".layer.1.", ".layer.2.") if moved else name


class MT5Backbone(T5Backbone):
    """An mT5, whose output projection always is a matrix apart from the embedding."""

    architecture = "MT5ForConditionalGeneration"
    blocks = ("MT5Block",)
    stack = MT5Stack

    @property
    def tied_by_default(self) -> bool:
        return False

    def output_scale(self, tied: bool) -> float:
        return self._scale(False)


class UMT5Backbone(T5Backbone):
    """A umT5. The released ones are untied."""

    architecture = "UMT5ForConditionalGeneration"
    blocks = ("UMT5Block",)
    stack = UMT5Stack

    @property
    def tied_by_default(self) -> bool:
        return False

    def packs(self, *, cross_attention: bool) -> bool:
        return not cross_attention  # which would read as many states as there are tokens

    def packed(self, stack: Any, packing: Packing) -> dict[str, Any]:
        return {"packing": packing}

    def shared_by_layers(
        self, encoder: Any, attention_mask: Tensor, packing: Packing | None = None
    ) -> dict[str, Any]:
        # each layer has a position bias of its own
        return {} if packing is None else self.packed(encoder, packing)

    def output_scale(self, tied: bool) -> float:
        # As it was trained: with the scale if the projection is the embedding. Its
        # configuration does not say so: transformers 5 calls all of them tied.
        return self._scale(tied)


class T5GemmaBackbone(T5Backbone):
    """A T5Gemma: encoder and decoder of Gemma 2, which may differ in size.

    The scores of its attention are capped. SDPA cannot do that, so its attention is
    transformers' own, without memory slots. The stacks scale their input embeddings.
    """

    architecture = "T5GemmaForConditionalGeneration"
    blocks = ("T5GemmaEncoderLayer", "T5GemmaDecoderLayer")
    attentions: Mapping[str, tuple[str, str]] = {"eager": ("eager", "eager")}
    own_embeddings = True
    needs_cross_attention = True
    embedding_keys = ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight")
    head_key = "lm_head.out_proj.weight"
    norm_key = "model.encoder.norm.weight"

    @property
    def vocabulary(self) -> int:
        return self.config.decoder.vocab_size

    @property
    def encoder_width(self) -> int:
        return self.config.encoder.hidden_size

    @property
    def decoder_width(self) -> int:
        return self.config.decoder.hidden_size

    @property
    def encoder_layers(self) -> int:
        return self.config.encoder.num_hidden_layers

    @property
    def decoder_layers(self) -> int:
        return self.config.decoder.num_hidden_layers

    @property
    def encoder_heads(self) -> int:
        return self.config.encoder.num_attention_heads

    @property
    def query_heads(self) -> int:
        return self.config.decoder.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.config.decoder.num_key_value_heads

    @property
    def head_width(self) -> int:
        return self.config.decoder.head_dim

    @property
    def start_token(self) -> int:
        return self.config.decoder.bos_token_id

    @property
    def initializer_factor(self) -> float:
        return 1.0

    @property
    def embedding_deviation(self) -> float:
        return self.config.decoder.initializer_range

    @property
    def tied_by_default(self) -> bool:
        return self.config.tie_word_embeddings

    @property
    def logit_cap(self) -> float | None:
        return self.config.decoder.final_logit_softcapping

    def output_scale(self, tied: bool) -> float:
        return 1.0

    def packs(self, *, cross_attention: bool) -> bool:
        return False

    def shared_by_layers(
        self, encoder: Any, attention_mask: Tensor, packing: Packing | None = None
    ) -> dict[str, Any]:
        return {}  # rotary positions, no bias

    def norm(self) -> nn.Module:
        return T5GemmaRMSNorm(self.encoder_width, eps=self.config.encoder.rms_norm_eps)

    def encoder(self) -> nn.Module:
        return self._fresh(T5GemmaEncoder, self.config.encoder)

    def decoder(self, *, cross_attention: bool = False) -> nn.Module:
        return self._fresh(T5GemmaDecoder, self.config.decoder)

    def _fresh(self, stack: type[PreTrainedModel], side: Any) -> nn.Module:
        config = copy.deepcopy(side)
        config.dropout_rate = self.config.dropout_rate
        config._attn_implementation = "eager"
        fresh: Any = stack(config)
        del fresh.embed_tokens
        with torch.device("cpu"):  # not weights: nothing would fill its numbers
            fresh.rotary_emb = _RotaryEmbedding(config)
        return fresh

    def pretrained_key(self, name: str, *, cross_attention: bool = False) -> str:
        if name == "encoder_embedding.weight":
            return "model.encoder.embed_tokens.weight"
        return self.head_key if name == "lm_head.weight" else f"model.{name}"


class _RotaryEmbedding(T5GemmaRotaryEmbedding):
    """Rotary positions whose frequencies stay float32, in whatever dtype the weights
    are.

    `from_pretrained` fills them again if the name of the class contains
    "RotaryEmbedding".
    """

    def _apply(self, fn: Any, recurse: bool = True) -> _RotaryEmbedding:
        return self


BACKBONES: dict[str, type[T5Backbone]] = {
    "t5": T5Backbone,
    "mt5": MT5Backbone,
    "umt5": UMT5Backbone,
    "t5gemma": T5GemmaBackbone,
}
"""The backbone of every supported `model_type`."""


def backbone(config: Any) -> T5Backbone:
    """Returns the backbone of a pretrained model's configuration.

    Raises:
        ValueError: its `model_type` is not supported.
    """
    if config.model_type not in BACKBONES:
        raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(BACKBONES)}")
    return BACKBONES[config.model_type](config)
