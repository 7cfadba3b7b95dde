"""The model that a configuration asks for: whole on every rank, or, at ZeRO 3, on
none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from dsvae.config import ModelConfig
from dsvae.engine import nvme
from dsvae.engine.ds_config import parameter_dtype, zero_stage
from dsvae.errors import UserError, did_you_mean, first_line
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig, read_config
from dsvae.modeling.weight_source import Origin, slots
from dsvae.parallel.world import World

LATENT_FIELDS = (
    "family",
    "latent_dim",
    "categories",
    "spike_prior",
    "pooling",
    "injection",
    "memory_slots",
)


def build_model(
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Path | None,
    seed: int,
    world: World,
    ds_config: dict[str, Any],
) -> tuple[T5VAE, Origin | None]:
    """A T5VAE, and on rank 0 where its weights came from.

    Below ZeRO 3 it is whole, in float32 on CPU, on every rank. At ZeRO 3 its parameters
    are partitioned as they are made, in the engine's dtype: rank 0 reads or draws one
    tensor after the other, and no rank ever holds more than one.

    Args:
        settings: a pretrained model by name, or a new T5 from its configuration.
        weights: a T5VAE directory to take instead (between the phases).
        seed: of fresh weights: the same on every rank, at every stage, and whatever was
            drawn before.
        ds_config: resolved; gets the size of buffers that depend on the model.

    Raises:
        UserError: on every rank: no such model, no safetensors in it, no T5, weights
            missing or damaged, or a tokenizer too large for its vocabulary.
        RunStopped: on every rank: no room on the disk that the weights go to.
    """
    origins: list[Origin] = []

    def find_first() -> tuple[Any, Any]:
        origins.append(find_origin(settings, tokenizer, weights, seed))
        model = origins[0].skeleton()
        return model.config, model.generation_config

    # rank 0 first: it downloads, and its error is everyone's
    config, generation_config = world.run_on_rank0(find_first)
    origin = origins[0] if origins else None
    if zero_stage(ds_config) < 3:
        # Every rank reads: on another node the same path may have no model.
        model = world.run_on_all(
            lambda: (origin or find_origin(settings, tokenizer, weights, seed)).build()
        )
        return cast(T5VAE, model), origin
    # The other ranks need nothing but the configuration: only rank 0 reads files.
    with torch.device("meta"):
        model = T5VAE(copy.deepcopy(config))
    model.generation_config = generation_config
    nvme.make_room(ds_config, model, world)
    _partition(model, origin, ds_config)
    return model, origin


def find_origin(
    settings: ModelConfig, tokenizer: PreTrainedTokenizerBase, weights: Path | None, seed: int
) -> Origin:
    """Where the weights that `build_model` gives a model come from; arguments and
    errors are its own. On this process alone."""
    try:
        origin = _origin(settings, tokenizer, weights, seed)
    # a field's name, and below it what is wrong with its value
    except StrictDataclassError as error:
        raise UserError(
            f"model {settings.name or 'model.t5'}: {' '.join(str(error).split())}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, HFValidationError, SafetensorError) as error:
        what = weights or settings.name or "model.t5"
        raise UserError(f"model {what}: {first_line(error)}") from error
    if len(tokenizer) > origin.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} pieces, the model {settings.name} a vocabulary "
            f"of {origin.config.vocab_size}"
        )
    return origin


def _partition(model: T5VAE, origin: Origin | None, ds_config: dict[str, Any]) -> None:
    """Gives a model on the meta device its weights, each partitioned over the ranks
    before the next one is read. Collective.

    Args:
        origin: of the weights, on rank 0, which DeepSpeed lets send its values to the
            others.
    """
    # All pass through one buffer: large temporaries between the parts that stay would
    # leave the heap full of holes.
    buffer = torch.empty(
        max(p.numel() for p in model.parameters()), dtype=parameter_dtype(ds_config)
    )
    first: Any = None
    for name, parameter, put in slots(model):
        value = buffer[: parameter.numel()].view(parameter.shape)
        if origin is not None:
            origin.copy(name, value)
        new = nn.Parameter(value, requires_grad=parameter.requires_grad)
        if first is None:
            holder = nn.Module()
            holder.weight = first = new
            deepspeed.zero.Init(module=holder, config_dict_or_path=ds_config)
        else:
            # by the same zero.Init, as DeepSpeed does with latecomers
            first.convert_to_zero_parameters(param_list=[new])
        put(new)


def _origin(
    settings: ModelConfig, tokenizer: PreTrainedTokenizerBase, weights: Path | None, seed: int
) -> Origin:
    latent = {name: getattr(settings, name) for name in LATENT_FIELDS}
    if weights is not None:
        return T5VAE.origin_in(str(weights))
    if settings.name is None:
        t5 = {"model_type": "t5", **settings.t5, "vocab_size": len(tokenizer)}
        # transformers takes any name, and keeps what it does not know.
        known = {
            *AutoConfig.for_model(t5["model_type"]).to_dict(),
            "decoder_start_token_id",
            "tie_word_embeddings",
        }
        if unknown := sorted(set(t5) - known):
            raise ValueError(f"unknown field {unknown[0]}{did_you_mean(unknown[0], known)}")
        t5 |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        t5.setdefault("decoder_start_token_id", tokenizer.pad_token_id)
        if settings.dropout is not None:
            t5["dropout_rate"] = settings.dropout
        fresh = T5VAEConfig(t5=t5, **latent)
        return Origin(lambda: T5VAE(copy.deepcopy(fresh)), seed)
    config = read_config(settings.name)
    if not isinstance(config, T5VAEConfig):
        return T5VAE.origin_in_t5(settings.name, seed=seed, dropout_rate=settings.dropout, **latent)
    if settings.dropout is not None:
        config.t5.dropout_rate = settings.dropout
    if settings.injection == "none":
        latent["latent_dim"] = 0
    if different := [name for name in LATENT_FIELDS if getattr(config, name) != latent[name]]:
        name = different[0]
        raise ValueError(
            f"its {name} is {getattr(config, name)}, not {latent[name]}: set --model.{name}"
        )
    return T5VAE.origin_in(settings.name, config)
