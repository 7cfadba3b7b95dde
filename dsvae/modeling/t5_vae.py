"""T5VAE: the T5 stacks of transformers around a latent bottleneck (Park & Lee 2021)."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from dsvae.modeling.backbone import BACKBONES, T5Backbone, backbone
from dsvae.modeling.crf import CRF, IGNORE, TagHead
from dsvae.modeling.denoiser import Denoiser, DenoiserFields, FlowDraws, flow_errors, initialize
from dsvae.modeling.families import Distribution, Family, make_family, masked, present
from dsvae.modeling.injection import INJECTIONS, make_injection
from dsvae.modeling.lora import add_adapters, checked, is_adapter
from dsvae.modeling.packing import Packed, Packing
from dsvae.modeling.posterior import Float32Linear, PosteriorHead, make_pooling
from dsvae.modeling.settings import LatentConfig, convert, declared
from dsvae.modeling.vocabulary import VocabularyHead
from dsvae.modeling.weight_source import Origin, SafetensorsFiles, refuse_pickles

CACHE = (
    "cache"
    if "cache" in {field.name for field in fields(CausalLMOutputWithPast)}
    else "past_key_values"
)
"""The name of the decoder's cache in the installed transformers: `cache` since 5.24,
`past_key_values` before. `generate` passes and reads it under this name."""

LATENT_PATH = (
    *("posterior.", "prior_head.", "class_head.", "tag_head.", "align_head.", "injection."),
)
"""How the names of the parameters begin that no T5 has."""


HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""What says where a model of the hub is read from, as in transformers."""


def read_config(name_or_path: str, **hub: Any) -> PreTrainedConfig:
    """Reads the configuration of a T5 or T5VAE.

    A config.json without `model_type`, such as that of google/umt5-small, is read by
    the architecture that it names.

    Args:
        name_or_path: a hub id, or a directory.
        hub: arguments of `HUB`.

    Raises:
        OSError: no such model.
        ValueError: its config.json has neither.
    """
    read, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
    if "model_type" in read:
        return AutoConfig.from_pretrained(name_or_path, **hub)
    for kind, each in BACKBONES.items():
        if each.architecture in (read.get("architectures") or ()):
            return type(AutoConfig.for_model(kind)).from_dict(read)
    raise ValueError(
        f'the config.json of {name_or_path} has no "model_type": copy the model to a directory '
        f'and add "model_type": "t5", "mt5", "umt5" or "t5gemma" there'
    )


@dataclass
class T5VAEFields(LatentConfig):
    """The fields of a T5VAE's configuration that a PreTrainedConfig does not have."""

    t5: Any = None
    """The configuration of the T5, of a `model_type` in `BACKBONES`, as an object or a
    dict."""
    conditional: bool = False
    """Whether the decoder also reads a condition c: a text that goes through the encoder,
    to the decoder's cross-attention."""
    prior: Literal["learned", "fixed"] | None = "fixed"
    """As in `LatentConfig`. None becomes learned or fixed."""
    vector_counts: list[int] = field(default_factory=list)
    """How many training texts have 1, 2, .. `latent_vectors` vectors. The fixed prior
    draws the number of vectors of a text from it. Empty: all texts have all."""
    classes: list[str] = field(default_factory=list)
    """The names of the classes of a class head; empty: no such head."""
    tags: list[str] = field(default_factory=list)
    """The names of the tags of a tag head, in IOB2; empty: no such head."""
    align: bool = False
    """Whether there is a linear map from z to the states of another encoder, which only
    training reads (`heads.align_weight`)."""
    lora: dict[str, Any] | None = None
    """The fields of `LoraConfig`; None: no adapters. The final model of a run has none:
    they are added to their matrices."""
    denoiser: dict[str, Any] | None = None
    """The fields of `DenoiserFields`; None: no prior by flow matching."""
    tie_word_embeddings: bool | None = None
    """Whether the output projection is the input embedding (T5 v1.0) or another matrix
    (v1.1, flan, mT5, umT5). None: what the T5's configuration implies. `T5VAE.from_t5`
    sets it by the weights."""
    beta: float = 1.0
    """Weight of the KL in the `loss` of `T5VAE.forward`, which a plain training loop and
    transformers' Trainer minimize. 1: the negative ELBO. The training of `dsvae` has a
    schedule of its own."""
    max_tokens: int | None = None
    """Longest sentence of the training in tokens, EOS included, which is the default of
    the evaluation. The model has no limit. None: not known."""


class T5VAEConfig(T5VAEFields, PreTrainedConfig):
    """Configuration of a T5VAE: the one of its T5, and the latent path.

    Its fields are those of `T5VAEFields`. With injection none, latent_dim is 0, family
    is gaussian and prior is fixed, whatever was given.

    Raises:
        ValueError: a value that does not fit its field, or the others.
    """

    model_type = "t5_vae"
    sub_configs = {"t5": AutoConfig}
    # The Trainer's predictions are the logits alone.
    keys_to_ignore_at_inference = [
        *("nats", "latent", "posterior", "prior", "clusters", "class_logits", "class_nats"),
        *("tag_nats", "tags", "distance", "cache", "past_key_values"),
    ]

    # For `generate`, this is a decoder conditioned on z, and on encoder states that are
    # made before.
    is_encoder_decoder: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.t5 is None:
            self.t5 = AutoConfig.for_model("t5")
        elif isinstance(self.t5, dict):
            fields = dict(self.t5)
            self.t5 = AutoConfig.for_model(fields.pop("model_type", "t5"), **fields)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.backbone.tied_by_default
        if not self.has_latent:
            self.latent_dim, self.family, self.prior = LatentConfig.latent_dim, "gaussian", "fixed"
        for name, kind in declared(T5VAEFields).items():
            setattr(self, name, convert(getattr(self, name), kind, name))
        if not self.has_latent:
            self.latent_dim = 0
        self.check_latent(self.conditional, bool(self.classes or self.tags))
        self.prior = "learned" if self.has_learned_prior(self.conditional) else "fixed"
        reads_z = not self.has_latent or INJECTIONS[self.injection].in_cross_attention
        if self.backbone.needs_cross_attention and not (reads_z and self.cross_attention):
            raise ValueError(
                f"injection {self.injection} does not work with a {self.t5.model_type}, whose "
                f"decoder has no memory slots and always reads encoder states: use injection cross"
            )
        self.lora = checked(self.lora) if self.lora else None
        if self.denoiser is not None:
            self.denoiser = vars(DenoiserFields.of(self.denoiser))
        kwargs.setdefault("pad_token_id", self.t5.pad_token_id)
        end = self.t5.eos_token_id
        kwargs.setdefault("eos_token_id", end[0] if isinstance(end, list) else end)
        kwargs.setdefault("decoder_start_token_id", self.backbone.start_token)
        super().__post_init__(**kwargs)

    @property
    def backbone(self) -> T5Backbone:
        """What is known of the T5.

        Raises:
            ValueError: its `model_type` is not supported.
        """
        return backbone(self.t5)

    @property
    def room(self) -> int | None:
        """Longest sentence, and longest condition, that the posterior can read, in tokens
        with EOS. None: there is no limit."""
        if self.pooling != "chunks" or not self.has_latent:
            return None
        return self.latent_vectors * self.chunk // (2 if self.conditional else 1)

    @property
    def cross_attention(self) -> bool:
        """Whether the decoder keeps its cross-attention, for a condition or for z."""
        return self.conditional or INJECTIONS[self.injection].in_cross_attention

    def check_packing(self) -> None:
        """Raises ValueError if the stacks do not take packed texts."""
        if not self.backbone.packs(cross_attention=self.cross_attention):
            across = " with cross-attention" if self.backbone.packs(cross_attention=False) else ""
            raise ValueError(f"a {self.t5.model_type}{across} cannot do without padding")

    # `generate` reads these to set the size of its cache.
    @property
    def vocab_size(self) -> int:
        return self.backbone.vocabulary

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        # `resize_token_embeddings` sets it after it has made the new matrices.
        self.t5.vocab_size = value

    @property
    def hidden_size(self) -> int:
        return self.backbone.decoder_width

    @property
    def num_hidden_layers(self) -> int:
        return self.backbone.decoder_layers

    @property
    def num_attention_heads(self) -> int:
        return self.backbone.key_value_heads


@dataclass
class T5VAEOutput(CausalLMOutputWithPast):
    """What `T5VAE.forward` returns.

    loss: the mean over the B sentences of nats + `config.beta` * KL(posterior ||
        prior), the negative ELBO in nats per sentence for beta 1. Only if labels were
        given, and no latent.
    logits: (B, T, V).
    hidden_states, attentions: of the decoder, if they were asked for. So are those of
        the encoder, and the decoder's cross_attentions.
    nats: (B,), -log p(x|z) of each sentence, if labels were given.
    weighted_nats: their sum by `sentence_weights`, if these were given. The logits are
        then None, and `nats` have no gradient.
    right: (B,), how many tokens of each sentence are the likeliest ones, given z and the
        tokens before; only for `count_right`.
    latent: (B, Z), the z that was decoded.
    posterior: q(z|x) of each sentence; None if `latent` was given.
    prior: p(z) in one row, or the learned p(z|c) of each sentence, whose condition was
        encoded; None if `latent` was given.
    condition_states: (B, C, d), for `encode_only` alone.
    clusters: (B, R) probabilities, and class_logits: (B, K), if there are such heads.
    class_nats, tag_nats: (B,), -log p of the class and of the tags that were given, 0
        where there are none. They are not in the loss.
    flow_errors, flow_numbers: (B,), the squared error of the denoiser, summed over the
        numbers of the vectors that the sentence has, and how many numbers these are; only
        for `flow`.
    tags: (B, S), the most probable tags where `tag_labels` has some, -100 elsewhere;
        only in evaluation.
    distance: (B,), 1 - cos(P z, h), only with `align_states`; not in the loss.

    The decoder's cache has the name `CACHE`, and is there if `use_cache` was set.
    """

    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    nats: Tensor | None = None
    weighted_nats: Tensor | None = None
    right: Tensor | None = None
    latent: Tensor | None = None
    posterior: Distribution | None = None
    prior: Distribution | None = None
    condition_states: Tensor | None = None
    clusters: Tensor | None = None
    class_logits: Tensor | None = None
    class_nats: Tensor | None = None
    tag_nats: Tensor | None = None
    tags: Tensor | None = None
    distance: Tensor | None = None
    flow_errors: Tensor | None = None
    flow_numbers: Tensor | None = None


class T5VAE(PreTrainedModel, GenerationMixin):
    """A T5 as a variational autoencoder of sentences.

    encoder -> masked pooling -> q(z|x) -> z -> injection -> decoder. The decoder has no
    cross-attention to the sentence, so z is the only way from there.

    With a condition c, the same encoder also reads c alone. The decoder attends to
    these states with T5's own cross-attention, after the vectors made of z if z enters
    there too. The pooling of these states gives the learned prior p(z|c). The posterior
    reads the packed text `c EOS x EOS`. So z stays the only way from x.
    """

    config_class = T5VAEConfig
    base_model_prefix = "t5_vae"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer need not pass `num_items_in_batch`
    _supports_sdpa = True
    _no_split_modules = [name for each in BACKBONES.values() for name in each.blocks]
    _keep_in_fp32_modules_strict = [
        *("posterior", "prior_head", "class_head", "tag_head", "align_head", "denoiser"),
    ]
    # In float16. And no quantizer of transformers touches these: integers for weights would
    # round z to integers.
    _keep_in_fp32_modules = ["wo", "injection", *_keep_in_fp32_modules_strict]
    _tied_weights_keys = {"lm_head.weight": "shared.weight"}
    _input_embed_layer = "shared"

    def __init__(self, config: T5VAEConfig) -> None:
        base = config.backbone
        attention = config._attn_implementation or next(iter(base.attentions))
        super().__init__(config)
        self.family: Family = make_family(config)
        self.shared = nn.Embedding(base.vocabulary, base.decoder_width)
        if config.has_latent or config.conditional:
            self.encoder = base.encoder()
            if base.own_embeddings:
                self.encoder_embedding = nn.Embedding(base.vocabulary, base.encoder_width)
        if config.has_latent:
            self.posterior = PosteriorHead(
                base.encoder_width, self.family.head_width, make_pooling(config), config.clusters
            )
        if config.classes:
            self.class_head = Float32Linear(base.encoder_width, len(config.classes))
        if config.tags:
            self.tag_head = TagHead(base.encoder_width, config.tags)
        if config.align:
            read = self.family.latent_width // self.posterior.pooling.aligned
            self.align_head = Float32Linear(read, base.encoder_width)
        if config.prior == "learned":
            self.prior_head = Float32Linear(base.encoder_width, self.family.head_width)
        self.injection = make_injection(config, self.family.latent_width)
        if config.denoiser:
            self.denoiser = Denoiser(config)
        self.decoder = base.decoder(cross_attention=config.cross_attention)
        self.lm_head = VocabularyHead(base.decoder_width, base.vocabulary, base.logit_cap)
        self.output_scale = base.output_scale(bool(config.tie_word_embeddings))
        if config.lora:
            for name in ("encoder", "decoder"):
                if stack := getattr(self, name, None):
                    add_adapters(stack, config.lora)
        self.set_attn_implementation(attention)
        self.post_init()

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Sets the attention of both stacks: sdpa, or eager, which can return its
        weights.

        Raises:
            ValueError: another one, which would not see the vectors made of z.
        """
        attentions = self.config.backbone.attentions
        if attn_implementation not in list(attentions):
            raise ValueError(
                f"attention {attn_implementation!r} is not one of {', '.join(attentions)}: in "
                f"others, z would not reach the decoder"
            )
        stacks: tuple[Any, Any] = (getattr(self, "encoder", None), self.decoder)
        for stack, name in zip(stacks, attentions[attn_implementation], strict=True):
            if stack is not None:
                stack.config._attn_implementation = name
        self.config._attn_implementation = attn_implementation

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Makes the backward pass compute the activations of the layers again.

        Raises:
            ValueError: reentrant checkpoints were asked for, which pass no gradient to
                z.
        """
        given = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if given["use_reentrant"]:
            raise ValueError("use_reentrant: reentrant checkpoints pass no gradient to z")
        super().gradient_checkpointing_enable(given, **kwargs)

    @classmethod
    def from_t5(
        cls,
        name_or_path: str | Path,
        *,
        dropout_rate: float | None = None,
        dtype: torch.dtype | str | None = None,
        **latent: Any,
    ) -> T5VAE:
        """Makes a T5VAE of a pretrained T5 and a fresh latent path.

        Args:
            name_or_path: a hub id, or a directory in the format of transformers.
            dropout_rate: replaces that of the checkpoint.
            dtype: of the weights; posterior and heads stay in float32. `auto`: that of
                the checkpoint. None: float32.
            latent: fields of `T5VAEConfig` (latent_dim, pooling, injection and so on),
                and from where to read a model of the hub, as in transformers: revision,
                token, cache_dir, local_files_only, force_download, proxies, subfolder.

        Raises:
            OSError: no such model, or no safetensors in it.
            TypeError: an argument has another name.
            ValueError: it is not a T5, mT5, umT5 or T5Gemma, or weights are missing or
                have another shape.
        """
        # The seed of the latent path comes from torch's generator, as for any new module.
        seed = int(torch.randint(1 << 62, ()))
        name = str(name_or_path)
        origin = cls.origin_in_t5(name, seed=seed, dropout_rate=dropout_rate, **latent)
        if dtype == "auto":
            dtype = origin.config.t5.dtype
        if isinstance(dtype, str):
            dtype = cast(torch.dtype, getattr(torch, dtype))
        return cast(T5VAE, origin.build(dtype or torch.float32))

    @classmethod
    def origin_in_t5(
        cls, name_or_path: str, *, seed: int, dropout_rate: float | None = None, **latent: Any
    ) -> Origin:
        """Returns the weights of `from_t5`, tensor by tensor. The latent path is drawn
        from `seed`. Raises what `from_t5` raises."""
        hub = {name: latent.pop(name) for name in HUB if name in latent}
        every = {each.name for each in fields(PreTrainedConfig)} | {"t5", "tie_word_embeddings"}
        known = [each.name for each in fields(cls.config_class) if each.name not in every]
        for name in latent:
            if name not in known:
                close = difflib.get_close_matches(name, [*known, *HUB, "dropout_rate", "dtype"], 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"from_t5 has no argument {name}{hint}")
        t5_config = read_config(name_or_path, **hub)
        if t5_config.model_type not in BACKBONES:
            raise ValueError(
                f"{name_or_path} is a {t5_config.model_type} model, not one of "
                f"{', '.join(BACKBONES)}"
            )
        base = backbone(t5_config)
        files = SafetensorsFiles(name_or_path, **hub)
        # Only the weights say whether lm_head is tied. transformers reads "tied" for
        # every T5, and would tie v1.1 silently when it loads a state dict.
        embedding = base.embedding_key(files)
        head = base.head_key
        tied = head not in files or files.equal(embedding, head)
        if dropout_rate is not None:
            t5_config.dropout_rate = dropout_rate
        config = cls.config_class(t5=t5_config, tie_word_embeddings=tied, **latent)

        def key_of(name: str) -> str | None:
            if name == "shared.weight":
                return embedding
            if name == "injection.layer_norm.weight":
                return base.norm_key
            if name.startswith(LATENT_PATH) or is_adapter(name):
                return None
            return base.pretrained_key(name, cross_attention=config.cross_attention)

        return Origin(lambda: cls(copy.deepcopy(config)), seed, files, key_of)

    @classmethod
    def origin_in(
        cls, name_or_path: str, config: T5VAEConfig | None = None, *, seed: int = 0
    ) -> Origin:
        """Returns the weights of a saved T5VAE, tensor by tensor.

        Args:
            config: replaces that of the directory.
            seed: of what `config` has and the directory lacks: adapters, the `align` head,
                and a denoiser, which is always a new one.

        Raises:
            OSError: no such model, or no weights in it.
            ValueError: weights are missing, or have another shape.
        """
        own: T5VAEConfig = (
            cls.config_class.from_pretrained(name_or_path) if config is None else config
        )

        def make() -> T5VAE:
            model = cls(copy.deepcopy(own))
            with contextlib.suppress(OSError):  # the file is optional
                model.generation_config = GenerationConfig.from_pretrained(name_or_path)
            return model

        files = SafetensorsFiles(name_or_path)

        def key_of(name: str) -> str | None:
            added = is_adapter(name) or name.startswith("align_head.")
            drawn = config is not None and name.startswith("denoiser.")
            return None if drawn or added and name not in files else name

        return Origin(make, seed, files, key_of)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a model as transformers does, but only from safetensors.

        Raises:
            OSError: there are none.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("weights are read from safetensors only: pickles can run code")
        refuse_pickles(Path(str(name_or_path)))
        return super().from_pretrained(name_or_path, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.config.backbone.own_embeddings:
            raise ValueError(f"the vocabulary of a {self.config.t5.model_type} keeps its size")
        self.shared = cast(nn.Embedding, value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the weights of one module. transformers calls it for what a checkpoint
        does not contain; the stacks have their own."""
        factor = self.config.backbone.initializer_factor
        if self.config.denoiser and any(module is each for each in self.denoiser.modules()):
            initialize(module)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, self.config.backbone.embedding_deviation)
        elif module is self.lm_head:
            # Logits of unit scale. (transformers draws every untied head with deviation
            # 1, so that the logits of v1.1 start at sqrt(d).)
            module.weight.normal_(0.0, factor * module.in_features**-0.5 / self.output_scale)
        elif isinstance(module, nn.Linear):
            # Unit scale for unit-scale input, as T5 draws its own keys and values.
            module.weight.normal_(0.0, factor * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif module is getattr(self.injection, "layer_norm", None):
            module.weight.copy_(self.config.backbone.norm().weight)
        elif isinstance(module, CRF):
            module.reset_parameters()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Takes the linear layer that `resize_token_embeddings` has made."""
        size, width = new_embeddings.weight.shape
        self.lm_head = VocabularyHead(width, size, self.lm_head.cap, device="meta")
        self.lm_head.weight = new_embeddings.weight

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Distribution:
        """Encodes a batch of sentences to q(z|x).

        Args:
            input_ids: (B, S). With a condition: `c EOS x EOS`.
            attention_mask: (B, S), 1 = token, 0 = padding; None = no padding.

        Returns: a distribution of the model's family. The Gaussian has mean and logvar,
            (B, Z) each, float32.
        """
        return self._read(input_ids, attention_mask)["posterior"]

    def prior(
        self, condition_ids: Tensor | None = None, condition_mask: Tensor | None = None
    ) -> Distribution:
        """Returns the prior on the model's device: p(z), one row for all sentences, or
        a learned p(z|c), one row per condition.

        Args:
            condition_ids: (B, C), `c EOS`; only a learned prior reads it.
            condition_mask: (B, C), 1 = token, 0 = padding; None = no padding.
        """
        if self.config.prior == "fixed":
            return self.family.prior(self.device)
        if condition_ids is None:
            raise ValueError("the prior of this T5VAE is learned, and needs condition_ids")
        mask = _mask_of(condition_ids, condition_mask)
        states = self._encode(condition_ids, mask).last_hidden_state
        return self._learned_prior(states, mask)

    def _encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        packing: Packing | None = None,
        **capture: Any,
    ) -> Any:
        """Returns the encoder's output; its `last_hidden_state` is (B, S, d)."""
        base = self.config.backbone
        shared = base.shared_by_layers(self.encoder, attention_mask, packing)
        if packing is not None:
            input_ids, attention_mask = packing.pack(input_ids), _of_keys(attention_mask)
        embeddings = (self.encoder_embedding if base.own_embeddings else self.shared)(input_ids)
        encoded = self.encoder(
            inputs_embeds=embeddings, attention_mask=attention_mask, **shared, **capture
        )
        if packing is not None:
            encoded.last_hidden_state = packing.pad(encoded.last_hidden_state[:, 0])
        return encoded

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        class_labels: Tensor | None = None,
        tag_labels: Tensor | None = None,
        packing: Packing | None = None,
        **capture: Any,
    ) -> dict[str, Any]:
        """Returns what the encoder and its heads make of sentences, by the names of
        `T5VAEOutput`."""
        config = self.config
        out: dict[str, Any] = {}
        if config.prior == "fixed":
            out["prior"] = self.family.prior(input_ids.device)
        if not config.has_latent:
            nothing = torch.zeros(len(input_ids), 0, device=input_ids.device)
            return {**out, "posterior": self.family.of(nothing)}
        mask = _mask_of(input_ids, attention_mask)
        encoded = self._encode(input_ids, mask, packing, **capture)
        out["encoder_hidden_states"] = encoded.get("hidden_states")
        out["encoder_attentions"] = encoded.get("attentions")
        states = encoded.last_hidden_state
        pooled = self.posterior.pooling(states, mask)
        parameters = self.posterior.head(pooled)
        if config.clusters:
            parameters, out["clusters"] = parameters
        out["posterior"] = self._distribution(parameters, mask)
        if config.classes:
            if pooled.ndim == 3:  # the mean of the vectors that there are
                pooled = pooled.sum(1) / self.posterior.pooling.valid(mask).sum(1, keepdim=True)
            out["class_logits"] = logits = self.class_head(pooled)
            if class_labels is not None:
                out["class_nats"] = F.cross_entropy(logits, class_labels, reduction="none")
        if config.tags:
            emissions = self.tag_head(states)
            if tag_labels is not None:
                out["tag_nats"] = self.tag_head.crf.nll(emissions, tag_labels)
                if not self.training:
                    out["tags"] = self.tag_head.crf.decode(emissions, tag_labels != IGNORE)
        return out

    def _learned_prior(self, states: Tensor, mask: Tensor, *, alone: bool = False) -> Distribution:
        """Returns p(z|c) from the states of the conditions. With `alone`, only its head
        gets a gradient."""
        pooled = self.posterior.pooling(states, mask)
        return self._distribution(self.prior_head(pooled.detach() if alone else pooled), mask)

    def _distribution(self, parameters: Tensor, mask: Tensor) -> Distribution:
        """Returns the distributions of a head's output, (B, P) or (B, K, P), for the
        texts of a mask (B, S)."""
        if self.config.latent_vectors > 1:
            valid = self.posterior.pooling.valid(mask)
            parameters = torch.cat([parameters.flatten(1), valid.to(parameters)], dim=1)
        parameters = parameters.flatten(1)
        learned = self.config.prior == "learned"
        return self.family.of(self.family.bounded(parameters) if learned else parameters)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        latent: Tensor | None = None,
        latent_mask: Tensor | None = None,
        noise: Tensor | None = None,
        sample_latent: bool = True,
        decoder_input_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        encode_only: bool = False,
        flow: FlowDraws | None = None,
        denoiser: Denoiser | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        condition_states: Tensor | None = None,
        detach_prior: bool = False,
        sentence_weights: Tensor | None = None,
        count_right: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        class_labels: Tensor | None = None,
        tag_labels: Tensor | None = None,
        added: Tensor | None = None,
        factor: Tensor | None = None,
        align_states: Tensor | None = None,
        packed: Packed | None = None,
        **others: Any,
    ) -> T5VAEOutput:
        """Encodes, draws z, and decodes with teacher forcing.

        Args:
            input_ids, attention_mask: (B, S), the sentence as the encoder sees it; with
                a condition, the packed text `c EOS x EOS`.
            labels: (B, T), the sentence to reconstruct, -100 for padding. Shifted
                right, it is the decoder's input.
            latent: (B, Z), decoded as it is. The encoder is skipped. Of K vectors, those
                that are 0 are not there.
            latent_mask: (B, K), which vectors of `latent` there are; the others become 0.
            noise: (B, E), standard normal, from which the family makes its sample. Or
                (B, K, E), for K samples of each sentence: then `labels` are decoded K
                times, and latent, posterior and nats have B * K rows.
                None: it is drawn here in training. In evaluation nothing is drawn, and
                the posterior's point is decoded (the mean of a Gaussian).
            sample_latent: False decodes the posterior's point in training, too.
            decoder_input_ids: (B, T), instead of labels.
            cache, past_key_values: the decoder's cache, under its name in transformers
                5.24 or under the older one.
            use_cache: return a cache that includes these tokens.
            encode_only: stop before z. `logits` and `latent` stay None. Without
                input_ids, only the condition is encoded.
            flow: what is random in a step of flow matching. z is then not decoded, and
                only `flow_errors` and `flow_numbers` are returned.
            denoiser: in place of the model's own, for `flow`.
            condition_ids, condition_mask: (B, C), `c EOS`, for a conditional model.
            condition_states: (B, C, d), the encoder's states of the condition from an
                earlier call, instead of condition_ids.
            detach_prior: no gradient goes from the prior's parameters beyond the
                weights of the prior's head.
            sentence_weights: (B,). With them, `labels` give `nats` and their sum by
                these weights, `weighted_nats`, without all logits in memory, in place
                of `logits` and `loss`.
            count_right: with `sentence_weights`, also give `right`.
            num_items_in_batch: by how many sentences to divide the sum of the loss, if
                this batch is a part of a larger one. None: B.
            output_hidden_states, output_attentions: return those of each layer. None:
                as the configuration says.
            class_labels: (B,), the class of each sentence; -100: none is known.
            tag_labels: (B, S), the tag of each word at its first piece, -100 elsewhere.
            added, factor: (B, Z), what is added to z when it is decoded, and by what the sum
                is multiplied. Vectors that a text lacks stay 0. `latent` of the output is
                z itself.
            align_states: (B, S, d), states of `input_ids` of another encoder, to give
                `distance`.
            packed: where the tokens of texts and conditions lie. The layers then compute
                nothing for padding. It needs `sentence_weights`, unless `encode_only` or
                `flow` is set. The result is the same, but for rounding and dropout.
            others: must be None. To ignore an argument could change the text without an
                error.

        Returns: `T5VAEOutput`, or its tuple for `return_dict=False`.

        Raises:
            TypeError: an unknown keyword argument that is not None, or both names of
                the cache.
            ValueError: nothing to encode or decode, no condition for a conditional
                model, or one for another model.
        """
        unknown = sorted(name for name, value in others.items() if value is not None)
        if unknown:
            raise TypeError(f"T5VAE.forward has no argument {', '.join(unknown)}")
        if cache is not None and past_key_values is not None:
            raise TypeError("T5VAE.forward was given both cache and past_key_values")
        self._check_condition(condition_ids, condition_mask, condition_states)
        if packed is not None:
            self.config.check_packing()
            if sentence_weights is None and not encode_only and flow is None:
                raise ValueError(
                    "packed texts need sentence_weights: there are no logits (B, T, V)"
                )
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        capture = {
            name: True
            for name, value in asked.items()
            if (getattr(self.config, name) if value is None else value)
        }
        out: dict[str, Any] = {}
        if latent is None and input_ids is not None:
            packing = None if packed is None else packed.input
            labels_read = None if flow else class_labels
            out = self._read(input_ids, attention_mask, labels_read, tag_labels, packing, **capture)
        if condition_ids is not None:
            condition_mask = _mask_of(condition_ids, condition_mask)
            encoded = self._encode(condition_ids, condition_mask, packed and packed.condition)
            condition_states = encoded.last_hidden_state
            if latent is None and self.config.prior == "learned":
                out["prior"] = self._learned_prior(
                    condition_states, condition_mask, alone=detach_prior
                )
        if encode_only and (out or condition_states is not None):
            return T5VAEOutput(condition_states=condition_states, **out)
        posterior, prior = out.get("posterior"), out.get("prior")
        if flow is not None:
            if posterior is None or input_ids is None or noise is None:
                raise ValueError("flow is for input_ids, with the noise of z")
            valid = self.posterior.pooling.valid(_mask_of(input_ids, attention_mask))
            if self.config.pooling == "chunks":  # no text of the batch has more
                valid = valid[:, : -(-input_ids.shape[1] // self.config.chunk)]
            denoiser = self.denoiser if denoiser is None else denoiser
            data = denoiser.normalized(posterior.sample(noise))[:, : valid.shape[1]]
            condition = {"states": condition_states, "states_mask": condition_mask}
            condition["labels"] = class_labels
            errors = flow_errors(denoiser, data, valid, flow, **condition)
            numbers = valid.sum(1) * self.config.latent_dim
            return T5VAEOutput(flow_errors=errors, flow_numbers=numbers)
        if latent is None:
            if input_ids is None or posterior is None:
                raise ValueError("T5VAE needs input_ids to encode, or the latent to decode")
            if noise is None and self.training:
                width = self.family.noise_width
                noise = torch.randn(len(input_ids), width, device=input_ids.device)
            if noise is not None and noise.ndim == 3:  # K draws of each sentence
                draws, noise = noise.shape[1], noise.flatten(0, 1)
                posterior = posterior.repeat(draws)
                labels, sentence_weights, condition_states, condition_mask = (
                    None if each is None else each.repeat_interleave(draws, 0)
                    for each in (labels, sentence_weights, condition_states, condition_mask)
                )
            drawn = sample_latent and noise is not None
            latent = posterior.sample(noise) if drawn else posterior.point
        elif latent_mask is not None:
            latent = masked(latent, latent_mask)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("T5VAE needs labels, or decoder_input_ids, to decode")
            decoder_input_ids = self.shift_right(labels)
        if condition_states is not None and len(condition_states) != len(latent):
            raise ValueError(f"{len(condition_states)} conditions for {len(latent)} latents")

        if align_states is not None:
            out["distance"] = self._distance(
                latent, align_states, _mask_of(align_states[..., 0], attention_mask)
            )
        read = latent
        if added is not None:
            read = read + added
            if self.config.latent_vectors > 1:
                read = masked(read, present(latent, self.config.latent_vectors))
        if factor is not None:
            read = read * factor
        read = self.family.normalized(read) if self.config.normalize == "l2" else read
        packing = packed and packed.labels
        if packing is not None:
            decoder_input_ids = packing.pack(decoder_input_ids)
        embeddings, attention_kwargs = self.injection(
            read, self.shared(decoder_input_ids), packing and packing.rows
        )
        cache = past_key_values if cache is None else cache
        if self.config.cross_attention:
            vectors = attention_kwargs.get("encoder_hidden_states")
            attention_kwargs |= _cross_attended(
                (vectors, attention_kwargs.get("encoder_attention_mask")),
                (condition_states, condition_mask),
            )
            cache = _with_cross_attention(cache, use_cache)
        if packing is not None:
            attention_kwargs |= self.config.backbone.packed(self.decoder, packing)
            size = (1, 1, packing.longest, packing.longest)
            causal = torch.ones(size, dtype=torch.bool, device=latent.device).tril()
            attention_kwargs["attention_mask"] = causal
            if (mask := attention_kwargs.get("encoder_attention_mask")) is not None:
                attention_kwargs["encoder_attention_mask"] = _of_keys(mask)
        decoded = self.decoder(
            inputs_embeds=embeddings,
            use_cache=use_cache,
            **{CACHE: cache},
            **attention_kwargs,
            **capture,
        )
        for name in (CACHE, "hidden_states", "attentions", "cross_attentions"):
            out[name] = decoded.get(name)
        hidden = decoded.last_hidden_state * self.output_scale
        if sentence_weights is None:
            out["logits"] = self.lm_head(hidden)
            if labels is not None:
                out["nats"] = _nats(out["logits"], labels)
                if posterior is not None and prior is not None:
                    items = len(labels) if num_items_in_batch is None else num_items_in_batch
                    out["loss"] = self._loss(out["nats"], posterior.kl(prior)) / items
        elif labels is None:
            raise ValueError("sentence_weights weigh the nats of labels, and there are none")
        else:
            if packing is not None:  # each token is a row of its own
                labels, sentence_weights = packing.pack(labels), sentence_weights[packing.rows]
            right = torch.empty_like(labels).flatten() if count_right else None
            nats, out["weighted_nats"] = self.lm_head(hidden, labels, sentence_weights, right)
            out["nats"] = nats if packing is None else packing.pad(nats).sum(1)
            if right is not None:
                right = right.view(labels.shape) if packing is None else packing.pad(right)
                out["right"] = right.sum(1)
        return T5VAEOutput(latent=latent, **out)

    def _distance(self, latent: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Returns 1 - cos(P z, h), (B,), for z (B, Z) and the states (B, S, d) of which h
        are the means; a mean over the vectors, if each has its own states."""
        pooling = self.posterior.pooling
        targets, valid = pooling.means(states, mask), pooling.valid(mask)[:, : pooling.aligned]
        mapped = self.align_head(latent.unflatten(1, (pooling.aligned, -1)))
        distances = 1 - F.cosine_similarity(mapped, targets, dim=-1)
        return torch.where(valid, distances, 0.0).sum(1) / valid.sum(1)

    def _loss(self, nats: Tensor, kl: Tensor) -> Tensor:
        """Returns the sum over sentences of nats (B,) + beta * the KL of their units
        (B, U)."""
        beta = self.config.beta
        return (nats + beta * kl.sum(-1) if beta else nats).sum()

    def _check_condition(
        self, ids: Tensor | None, mask: Tensor | None, states: Tensor | None
    ) -> None:
        """Raises ValueError unless there is a condition exactly if the model reads
        one."""
        if not self.config.conditional and any(each is not None for each in (ids, mask, states)):
            raise ValueError("this T5VAE is not conditional, and reads no condition")
        if self.config.conditional and (ids is None) == (states is None):
            raise ValueError("this T5VAE is conditional: it needs condition_ids")

    def shift_right(self, labels: Tensor) -> Tensor:
        """Returns the decoder's input for `labels` (B, T): the start token, then all
        labels but the last. -100 becomes padding."""
        shifted = labels.new_full(labels.shape, self.config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["decoder_input_ids"] = inputs.pop("input_ids")
        # Every row has the same number of tokens so far, so there is no padding to mask
        # in the decoder.
        inputs.pop("attention_mask", None)
        return inputs

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        latent: Tensor | None = None,
        latent_mask: Tensor | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decodes z, or the posterior's points of sentences, with the `generate` of
        transformers (greedy, sampling, beams).

        Args:
            input_ids, attention_mask: (B, S), sentences to reconstruct from the points
                of their posteriors; or
            inputs: (B, S), the same as input_ids, by its name in transformers; or
            latent, latent_mask: (B, Z) and (B, K), as of `forward`.
            condition_ids, condition_mask: (B, C), `c EOS`, for a conditional model. It
                is encoded once.
            kwargs: everything that `GenerationMixin.generate` takes.

        Returns: token ids (B, <= 1 + max_new_tokens), the start token first. After EOS
            comes padding, or EOS again from beams.
        """
        if inputs is not None and input_ids is not None:
            raise ValueError("generate was given both inputs and input_ids")
        input_ids = inputs if input_ids is None else input_ids
        self._check_condition(condition_ids, condition_mask, None)
        if condition_ids is not None:
            condition_mask = _mask_of(condition_ids, condition_mask)
            states = self._encode(condition_ids, condition_mask).last_hidden_state
            kwargs["condition_states"] = states
            kwargs["condition_mask"] = condition_mask
        if latent is None:
            if input_ids is None and not self.config.has_latent:
                input_ids = condition_ids  # only their number matters
            if input_ids is None:
                raise ValueError("generate needs a latent, or input_ids to encode")
            latent = self.encode(input_ids, attention_mask).point
        elif latent_mask is not None:
            latent = masked(latent, latent_mask)
        start = torch.full(
            (latent.shape[0], 1),
            self.config.decoder_start_token_id,
            dtype=torch.long,
            device=latent.device,
        )
        with _no_padding_warning():
            return super().generate(start, latent=latent, **kwargs)


def _mask_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the mask of a batch of texts, (B, S); None means that there is no
    padding."""
    return torch.ones_like(ids, dtype=torch.long) if mask is None else mask


def _of_keys(mask: Tensor) -> Tensor:
    """Returns the mask of texts (B, S) as that of the keys of attention, which
    transformers leaves as it is."""
    return mask.bool()[:, None, None]


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns -log p of each sentence, (B,) float32, from all logits (B, T, V)."""
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE
    )
    return nats.view(labels.shape).sum(1)


def _cross_attended(*given: tuple[Tensor | None, Tensor | None]) -> dict[str, Tensor]:
    """Returns what cross-attention reads: states (B, C, d), each with its mask, one after
    the other. They are the vectors made of z, and the condition. No mask means that
    nothing is masked."""
    parts = [
        (states, _mask_of(states[..., 0], mask)) for states, mask in given if states is not None
    ]
    states, masks = zip(*parts, strict=True)
    return {
        "encoder_hidden_states": states[0] if len(states) == 1 else torch.cat(states, dim=1),
        "encoder_attention_mask": masks[0] if len(masks) == 1 else torch.cat(masks, dim=1),
    }


def _with_cross_attention(cache: Cache | None, use_cache: bool) -> Cache | None:
    """Returns a cache with a separate part for cross-attention, which would otherwise
    write its keys among those of the decoder's tokens."""
    if cache is None and not use_cache or isinstance(cache, EncoderDecoderCache):
        return cache
    return EncoderDecoderCache(DynamicCache() if cache is None else cache, DynamicCache())


@contextlib.contextmanager
def _no_padding_warning() -> Iterator[None]:
    """Silences a warning: T5 starts decoding from its padding token, which `generate`
    takes for right padding."""
    logger = logging.getLogger("transformers.generation.utils")

    def keep(record: logging.LogRecord) -> bool:
        return "right-padding was detected" not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


if __name__ == "dsvae.modeling.t5_vae":  # the copy in a package (dsvae/hub.py) has an auto_map
    AutoConfig.register(T5VAEConfig.model_type, T5VAEConfig)
    AutoModel.register(T5VAEConfig, T5VAE)
