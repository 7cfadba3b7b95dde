"""The weights of an engine: which of them train, and the whole model as plain
safetensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from torch import Tensor, nn

from dsvae.engine.model_directory import MAX_SHARD_BYTES, ModelDirectory
from dsvae.errors import UserError
from dsvae.modeling.lora import is_adapter, merged
from dsvae.modeling.t5_vae import LATENT_PATH, T5VAE
from dsvae.modeling.weight_source import Origin

if TYPE_CHECKING:
    from dsvae.parallel.world import World

EMBEDDINGS = (
    *("shared", "encoder_embedding", "relative_attention_bias", ".positions", ".queries"),
    *("denoiser.counts", "denoiser.labels", "denoiser.nothing"),
)
"""Words in the names of embeddings and position biases, which do not decay."""

PUT_BACK = "put it back, and repeat the command, which continues from the last checkpoint"


def freeze_pretrained(model: T5VAE) -> None:
    """Freezes everything but the adapters and the latent path, if the T5 has
    adapters."""
    for name, parameter in model.named_parameters():
        if model.config.lora and not is_adapter(name) and not name.startswith(LATENT_PATH):
            parameter.requires_grad_(False)


def freeze_decoder(model: T5VAE) -> None:
    """Freezes everything but the encoder and the latent path: the posterior, the head
    of a learned prior, and the injection with its random projection.

    Cross-attention to a condition is part of the decoder, and stays as pretrained. So
    do the adapters of the decoder.

    The embedding that encoder and decoder share is frozen too: it is the decoder's
    input, and in T5 v1.0 its output.
    """
    for part in (model.shared, model.decoder, model.lm_head):
        part.requires_grad_(False)


def freeze_autoencoder(model: T5VAE) -> None:
    """Freezes everything but the denoiser."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("denoiser."))


SCALE_FLOOR = 1e-3
"""The smallest scale of a tensor's learning rate, so that a tensor of zeros moves."""

SCALE_RATIO = 1.25
"""Tensors whose scales differ by at most this factor share a group of the optimizer."""


def measure_lr_scales(model: nn.Module, origin: Origin | None, world: World) -> dict[str, float]:
    """Computes the factor of the learning rate of every parameter that trains. It is
    the root mean square (RMS) of the parameter's tensor, at least `SCALE_FLOOR`, as in
    Adafactor (Shazeer & Stern 2018), which trained T5. Collective.

    A partition of ZeRO holds all tensors of a group end to end, so tensors need a group
    each, or one in common. Tensors of like RMS share one: its factor is the middle
    between the smallest and the largest RMS in it, on a logarithmic scale.

    Args:
        origin: the source of the weights, on rank 0: its float32 values give the same
            groups at every ZeRO stage and precision. None: the model has them itself.
    """

    def measure() -> dict[str, float]:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        parameters = dict(model.named_parameters())
        rms = {}
        for name in names:
            value = origin.tensor(name) if origin else parameters[name].detach().float()
            rms[name] = max(SCALE_FLOOR, float(value.square().mean().sqrt()))
        scales: dict[str, float] = {}
        left = sorted(names, key=rms.__getitem__)
        while left:
            group = [name for name in left if rms[name] <= SCALE_RATIO * rms[left[0]]]
            middle = math.sqrt(rms[group[0]] * rms[group[-1]])
            scales |= dict.fromkeys(group, middle)
            left = left[len(group) :]
        return scales

    return world.run_on_rank0(measure)


def parameter_names(model: nn.Module) -> list[list[str]]:
    """Returns the names of the parameters that train, by their weight decay: matrices;
    norms, biases, embeddings and position biases.

    The same before and after an engine has sharded the model.
    """
    matrices: list[str] = []
    others: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO 3 leaves parameters without their elements
        shape = getattr(parameter, "ds_shape", parameter.shape)
        matrix = len(shape) >= 2 and not any(each in name for each in EMBEDDINGS)
        (matrices if matrix else others).append(name)
    return [matrices, others]


@dataclass(frozen=True)
class ParameterGroup:
    """A group of AdamW: names of parameters with one weight decay and one factor of the
    learning rate."""

    names: list[str]
    weight_decay: float
    lr_scale: float

    def settings(self, model: nn.Module, lr: float) -> dict[str, Any]:
        """Returns the group as `torch.optim` takes it."""
        parameters = dict(model.named_parameters())
        return {
            "params": [parameters[name] for name in self.names],
            "lr": lr * self.lr_scale,
            "weight_decay": self.weight_decay,
        }


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: dict[str, float] | None = None
) -> list[ParameterGroup]:
    """Returns AdamW's groups of the parameters that train: matrices with decay, the
    others without; each divided by the factors of `lr_scales`."""
    groups = []
    for names, decay in zip(parameter_names(model), (weight_decay, 0.0), strict=True):
        by_scale: dict[float, list[str]] = {}
        for name in names:
            by_scale.setdefault(lr_scales[name] if lr_scales else 1.0, []).append(name)
        groups += [ParameterGroup(part, decay, scale) for scale, part in by_scale.items()]
    return groups


def full_weights(
    model: nn.Module, origin: Origin | None, world: World
) -> Iterator[tuple[str, Tensor | None]]:
    """Yields every parameter whole and in float32, one at a time: on rank 0 a CPU
    tensor, elsewhere None.

    Collective: every rank must iterate to the end. Trained weights come from the
    optimizer's float32 copies. Frozen ones are read again from their source and
    compared with the engine's: the engine may have cast them, and a copy would cost as
    much memory as the model.

    Raises:
        UserError: on every rank: the files of the frozen weights are gone or have
            changed.
    """
    world.run_on_rank0(lambda: _check_frozen(model, origin))
    for name, parameter in model.named_parameters():
        world.heartbeat(f"export, {name}")  # many weights, each fast
        if not parameter.requires_grad:
            yield name, _frozen(name, parameter, origin, world)
            continue
        # None at ZeRO 0, whose parameters are float32 themselves.
        value = safe_get_full_fp32_param(parameter)
        value = parameter.detach() if value is None else value
        yield name, value.to("cpu", torch.float32, copy=True) if world.is_main else None


def frozen_digest(model: nn.Module, origin: Origin | None, world: World) -> str | None:
    """Returns a digest of the frozen weights at the start of the phase, before the
    engine casts them; None if all train.

    Collective. Rank 0 reads them once, one tensor at a time.

    Raises:
        UserError: on every rank: their files no longer exist.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not frozen:
        return None

    def digest() -> str:
        total = hashlib.sha256()
        for name in frozen:
            total.update(name.encode() + b"\0")
            total.update(_read(cast(Origin, origin), name).numpy().data)
        return total.hexdigest()

    return world.run_on_rank0(digest)


def _frozen(
    name: str, parameter: nn.Parameter, origin: Origin | None, world: World
) -> Tensor | None:
    """Returns a frozen weight from its source, on rank 0; None elsewhere. Collective.

    It is compared with the engine's, which may come from a checkpoint older than this
    process: `check_unchanged` only notices changes since the process began.
    """
    values: list[Tensor] = []

    def compare() -> None:
        value = _read(cast(Origin, origin), name)
        if not torch.equal(value.to(parameter.dtype), parameter.detach().cpu()):
            raise UserError(
                f"{name} is frozen, and differs from that of the model it came from: the model "
                f"has changed since the run began; {PUT_BACK}"
            )
        values.append(value)

    with deepspeed.zero.GatheredParameters([parameter]):  # below ZeRO 3 it does nothing
        world.run_on_rank0(compare)
    return values[0] if values else None


def _read(origin: Origin, name: str) -> Tensor:
    try:
        return origin.tensor(name)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is frozen, and the model it came from can no longer be read ({reason}): "
            f"{PUT_BACK}"
        ) from error


def _check_frozen(model: nn.Module, origin: Origin | None) -> None:
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    try:
        cast(Origin, origin).check_unchanged()
    except OSError as error:
        raise UserError(f"{error}: the frozen weights are exported from it; {PUT_BACK}") from error


def export(
    model: T5VAE,
    origin: Origin | None,
    world: World,
    directory: Path,
    extras: Callable[[Path], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    merge: bool = True,
) -> None:
    """Writes the model as a transformers directory. Rank 0 never holds more than one
    shard.

    Args:
        origin: the source of the weights that the run began with; on rank 0, if weights
            are frozen.
        extras: called on rank 0 with the directory, to add the tokenizer and the model
            card.
        merge: add the adapters to their matrices, and write a model without them.

    Collective. The directory appears whole or not at all.

    Raises:
        OSError: on every rank: the disk is full.
        UserError: on every rank: the source of frozen weights has changed or is gone.
    """
    writer = ModelDirectory(directory, max_shard_bytes)
    world.run_on_rank0(writer.begin)
    try:
        weights = full_weights(model, origin, world)
        lora = model.config.lora if merge else None
        for name, tensor in merged(weights, lora) if lora else weights:
            if tensor is not None:
                with world.suspend_hang_detection():  # a whole shard may go to a slow disk
                    writer.add(name, tensor)
    except UserError:
        world.run_on_rank0(writer.abandon)
        raise
    world.run_on_rank0(lambda: writer.finish(model, extras, merge=merge))
