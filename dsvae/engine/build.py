"""The model that a configuration asks for: whole on every rank, or partitioned at ZeRO
3."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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
from dsvae.modeling.settings import LatentConfig, declared
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig, read_config
from dsvae.modeling.weight_source import Origin, slots
from dsvae.parallel.world import World


@dataclass(frozen=True)
class Annotations:
    """What a model has heads for: what the records of a run have besides their text."""

    conditional: bool = False
    classes: Sequence[str] = ()
    """The labels of the training records."""
    tags: Sequence[str] = ()
    """The tags of their words."""
    align: bool = False
    """Whether z is aligned with the states of the first encoder."""


def latent_fields(settings: ModelConfig, columns: Annotations) -> dict[str, Any]:
    """Returns the fields of `T5VAEConfig` that a run decides. A T5VAE to start from
    must share them."""
    return {name: getattr(settings, name) for name in declared(LatentConfig)} | {
        "conditional": columns.conditional,
        "classes": list(columns.classes),
        "tags": list(columns.tags),
        "align": columns.align,
        "lora": dataclasses.asdict(settings.lora) if settings.lora.rank else None,
    }


def build_model(
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Path | None,
    seed: int,
    world: World,
    ds_config: dict[str, Any],
    columns: Annotations = Annotations(),
    denoiser: dict[str, Any] | None = None,
) -> tuple[T5VAE, Origin | None]:
    """Builds a T5VAE; returns it and, on rank 0, the source of its weights. Collective.

    Below ZeRO 3 the model is whole, in float32 on CPU, on every rank. At ZeRO 3 its
    parameters are partitioned as they are made, in the engine's dtype. Rank 0 reads or
    draws one tensor after the other, and no rank ever holds more than one.

    Args:
        settings: a pretrained model by name, or a new T5 from its configuration.
        weights: a T5VAE directory to use instead (between the phases).
        seed: of fresh weights, which are the same on every rank and at every stage,
            whatever was drawn before.
        ds_config: resolved; the size of buffers that depend on the model is added.
        columns: of the records.
        denoiser: a new one, for the phase `prior`: its `DenoiserFields`.

    Raises:
        UserError: on every rank: no such model, no safetensors in it, not a T5, weights
            missing or damaged, or a tokenizer too large for its vocabulary.
        RunStopped: on every rank: no room on the disk that the weights go to.
    """
    origins: list[Origin] = []
    arguments = (settings, tokenizer, weights, seed, columns, denoiser)

    def find_first() -> tuple[Any, Any]:
        origins.append(find_origin(*arguments))
        model = origins[0].skeleton()
        return model.config, model.generation_config

    # Rank 0 first: it downloads, and its error is raised on every rank.
    config, generation_config = world.run_on_rank0(find_first)
    origin = origins[0] if origins else None
    if zero_stage(ds_config) < 3:
        # Every rank reads: the path may not exist on another node.
        model = world.run_on_all(lambda: (origin or find_origin(*arguments)).build())
        return cast(T5VAE, model), origin
    # The other ranks need only the configuration: rank 0 alone reads files.
    with torch.device("meta"):
        model = T5VAE(copy.deepcopy(config))
    model.generation_config = generation_config
    nvme.make_room(ds_config, model, world)
    _partition(model, origin, ds_config)
    return model, origin


def find_origin(
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Path | None,
    seed: int,
    columns: Annotations = Annotations(),
    denoiser: dict[str, Any] | None = None,
) -> Origin:
    """Returns the source of the weights of `build_model`, with the same arguments and
    errors. Runs on this process alone."""
    try:
        if denoiser is None:
            origin = _origin(settings, tokenizer, weights, seed, columns)
        else:
            origin = _with_denoiser(str(weights or settings.name), seed, columns, denoiser)
    # Its first line is a field's name alone; the next says what is wrong with the value.
    except StrictDataclassError as error:
        raise UserError(
            f"model {settings.name or 'model.t5'}: {' '.join(str(error).split())}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, HFValidationError, SafetensorError) as error:
        what = weights or settings.name or "model.t5"
        raise UserError(f"model {what}: {first_line(error)}") from error
    if len(tokenizer) > origin.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} pieces, but the vocabulary of the model "
            f"{settings.name} has {origin.config.vocab_size}"
        )
    return origin


def _partition(model: T5VAE, origin: Origin | None, ds_config: dict[str, Any]) -> None:
    """Fills a model on the meta device. Each weight is partitioned over the ranks
    before the next one is read. Collective.

    Args:
        origin: the source of the weights, on rank 0; DeepSpeed sends its values to the
            others.
    """
    # All weights pass through one buffer: temporaries between the parts that stay would
    # fragment the heap.
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
            # The same zero.Init, as DeepSpeed does with parameters added later.
            first.convert_to_zero_parameters(param_list=[new])
        put(new)


def new_vae(
    settings: ModelConfig, columns: Annotations, vocabulary: int, pad: int = 0, eos: int = 1
) -> T5VAEConfig:
    """Returns the T5VAE of a run that makes a new T5.

    Raises:
        ValueError: `model.t5` has an unknown field, or values that do not go together.
    """
    t5 = {"model_type": "t5", **settings.t5, "vocab_size": vocabulary}
    if t5["model_type"] == "t5gemma":
        raise ValueError(
            "a new t5gemma needs sizes for each side: make it with transformers, save it, and "
            "name its directory in --model"
        )
    # transformers accepts and keeps any name.
    known = {
        *AutoConfig.for_model(t5["model_type"]).to_dict(),
        "decoder_start_token_id",
        "tie_word_embeddings",
    }
    if unknown := sorted(set(t5) - known):
        raise ValueError(f"unknown field {unknown[0]}{did_you_mean(unknown[0], known)}")
    t5 = {"decoder_start_token_id": pad, **t5, "pad_token_id": pad, "eos_token_id": eos}
    if settings.dropout is not None:
        t5["dropout_rate"] = settings.dropout
    return T5VAEConfig(t5=t5, **latent_fields(settings, columns))


def _origin(
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Path | None,
    seed: int,
    columns: Annotations,
) -> Origin:
    latent = latent_fields(settings, columns)
    if weights is not None:
        return T5VAE.origin_in(str(weights))
    if settings.name is None:
        special = tokenizer.pad_token_id, tokenizer.eos_token_id
        fresh = new_vae(settings, columns, len(tokenizer), *special)
        return Origin(lambda: T5VAE(copy.deepcopy(fresh)), seed)
    config = read_config(settings.name)
    if not isinstance(config, T5VAEConfig):
        return T5VAE.origin_in_t5(settings.name, seed=seed, dropout_rate=settings.dropout, **latent)
    if settings.dropout is not None:
        config.t5.dropout_rate = settings.dropout
    _check_conditions(config, columns)
    config.denoiser = None  # a prior does not fit another posterior
    asked = T5VAEConfig(t5=config.t5, **latent)
    config.lora = config.lora or asked.lora  # adapters may be added, not lost
    config.align = asked.align
    for name in latent:
        has, wanted = getattr(config, name), getattr(asked, name)
        if has == wanted:
            continue
        if name in ("classes", "tags"):
            raise ValueError(
                f"its {name} are {', '.join(has) or 'none'}, and those of the training records "
                f"are {', '.join(wanted) or 'none'}: give records that have the same ones"
            )
        if name == "lora":
            raise ValueError(
                f"its lora is {has}, not {wanted}: set --model.lora.rank, --model.lora.alpha and "
                f"--model.lora.targets"
            )
        raise ValueError(f"its {name} is {has}, not {wanted}: set --model.{name}")
    return T5VAE.origin_in(settings.name, config, seed=seed)


def _with_denoiser(name: str, seed: int, columns: Annotations, denoiser: dict[str, Any]) -> Origin:
    """Returns the weights of a finished T5VAE, with a new denoiser."""
    config = read_config(name)
    if not isinstance(config, T5VAEConfig):
        raise ValueError(f"it is a {config.model_type} model: phase prior is for a finished T5VAE")
    _check_conditions(config, columns)
    if not config.has_latent or config.discrete:
        raise ValueError("it has no continuous latent, and phase prior needs one")
    config.denoiser = denoiser
    return T5VAE.origin_in(name, config, seed=seed)


def _check_conditions(config: T5VAEConfig, columns: Annotations) -> None:
    if config.conditional != columns.conditional:
        raise ValueError(
            "it reads conditions: set --data.condition_column"
            if config.conditional
            else "it reads no conditions, and --data.condition_column is set"
        )
