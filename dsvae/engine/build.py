"""The model that a configuration asks for, the same on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase

from dsvae.config import ModelConfig
from dsvae.engine.distributed import World
from dsvae.errors import UserError
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig

LATENT_FIELDS = ("latent_dim", "pooling", "injection", "memory_slots")


def build_model(
    settings: ModelConfig, tokenizer: PreTrainedTokenizerBase, weights: Path | None, seed: int, world: World
) -> T5VAE:
    """A T5VAE in float32 on CPU.

    Args:
        settings: a pretrained model by name, or a new T5 from its configuration.
        weights: a T5VAE directory to take instead (between the phases).
        seed: of fresh weights: the same on every rank, and whatever was drawn before.

    Raises:
        UserError: on every rank: no such model, no weights in it, no T5, or a tokenizer too large for its vocabulary.
    """
    built: list[T5VAE] = []

    def build() -> None:
        torch.manual_seed(seed)
        try:
            built.append(_build(settings, len(tokenizer), tokenizer, weights))
        except (OSError, ValueError, TypeError, KeyError, HFValidationError, SafetensorError) as error:
            what = weights or settings.name or "model.t5"
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"model {what}: {first_line}") from error

    world.on_main(build)  # rank 0 first: it downloads, and its error is everyone's
    if not world.is_main:
        build()
    model = built[0]
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} pieces, the model {settings.name} a vocabulary of {model.config.vocab_size}"
        )
    return model


def _build(settings: ModelConfig, vocab_size: int, tokenizer: PreTrainedTokenizerBase, weights: Path | None) -> T5VAE:
    latent = {name: getattr(settings, name) for name in LATENT_FIELDS}
    if weights is not None:
        return T5VAE.from_pretrained(weights, dtype=torch.float32)
    if settings.name is None:
        t5 = {"model_type": "t5", **settings.t5, "vocab_size": vocab_size}
        t5 |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        t5.setdefault("decoder_start_token_id", tokenizer.pad_token_id)
        if settings.dropout is not None:
            t5["dropout_rate"] = settings.dropout
        return T5VAE(T5VAEConfig(t5=t5, **latent))
    config = AutoConfig.from_pretrained(settings.name)
    if config.model_type != T5VAEConfig.model_type:
        return T5VAE.from_t5(settings.name, dropout_rate=settings.dropout, **latent)
    if settings.dropout is not None:
        config.t5.dropout_rate = settings.dropout
    if settings.injection == "none":
        latent["latent_dim"] = 0
    if different := [name for name in LATENT_FIELDS if getattr(config, name) != latent[name]]:
        name = different[0]
        raise ValueError(f"its {name} is {getattr(config, name)}, not {latent[name]}: set --model.{name}")
    return T5VAE.from_pretrained(settings.name, config=config, dtype=torch.float32)
