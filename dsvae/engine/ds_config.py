"""The DeepSpeed configuration of a phase: read, checked, `auto` resolved.

DeepSpeed ignores unknown top-level keys, drops `"enabled": "auto"` silently and fails
on other `auto`s with a TypeError. So the file is checked here before DeepSpeed sees it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from dsvae.config import OptimizerConfig
from dsvae.errors import UserError, did_you_mean
from dsvae.shipped import ds_configs

ELSEWHERE = {
    "scheduler": "the learning-rate schedule is --phase1.lr_schedule and --phase2.lr_schedule",
    "activation_checkpointing": "use --model.gradient_checkpointing",
    "tensorboard": "dsvae writes TensorBoard itself, under output_dir",
    "csv_monitor": "dsvae writes metrics.jsonl, under output_dir",
    "wandb": "use --report_to wandb",
    "amp": "use bf16 or fp16",
    "bfloat16": "its name is bf16",
    "checkpoint": "checkpoints are dsvae's: --checkpoint_every, --keep_checkpoints",
}
"""Keys of DeepSpeed that dsvae refuses, and what to do instead."""

NESTED = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype",),
}
"""The known keys of each section: a tuple, or a pydantic model with a field per key."""

OBJECTS = (*NESTED, "optimizer", "aio", "flops_profiler", "comms_logger")
KEYS = {
    *OBJECTS,
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_allgather",
    "log_level",
}
"""Top-level keys that are passed on to DeepSpeed."""
PRECISIONS = ("bf16", "fp16", "torch_autocast")
"""The sections that set a precision."""
OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay"}


def load(path: str | Path) -> dict[str, Any]:
    """Reads a ds_config file as it is; a shipped one also by its name (`zero2`).

    Raises:
        UserError: no such file, not JSON, an unknown key, or an optimizer other than
            AdamW.
    """
    where = f"--ds_config {path}"
    path = ds_configs().get(str(path), Path(path))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(
            f"{where}: {error.strerror}; the shipped ones are {', '.join(ds_configs())}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must hold a JSON object")
    for key in raw:
        if key in ELSEWHERE:
            raise UserError(f"{where}: {key} is not taken from here: {ELSEWHERE[key]}")
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key}{did_you_mean(key, KEYS)}")
    for section in OBJECTS:
        if not isinstance(raw.get(section, {}), dict):
            raise UserError(f"{where}: {section} must be an object, not {raw[section]!r}")
    for section, names in ((name, _names(model)) for name, model in NESTED.items()):
        for key in raw.get(section, {}):
            if key not in names:
                raise UserError(f"{where}: unknown key {section}.{key}{did_you_mean(key, names)}")
    optimizer = raw.get("optimizer", {})
    if not isinstance(optimizer.get("params", {}), dict):
        raise UserError(f"{where}: optimizer.params must be an object")
    if (
        optimizer.get("type", "AdamW") not in ("AdamW", "Adam")
        or not {"type", "params"} >= optimizer.keys()
    ):
        raise UserError(
            f"{where}: optimizer must be AdamW with params, not {json.dumps(optimizer)}"
        )
    if unknown := set(optimizer.get("params", {})) - OPTIMIZER_PARAMS:
        raise UserError(
            f"{where}: unknown optimizer parameter {min(unknown)}; known: "
            f"{', '.join(sorted(OPTIMIZER_PARAMS))}"
        )
    return raw


def fit_bucket(resolved: dict[str, Any], trained: int) -> None:
    """Makes the reduce bucket of a resolved configuration no larger than the model's
    gradients, `trained` elements: DeepSpeed allocates whole buckets."""
    if zero_stage(resolved) > 0:
        zero = resolved["zero_optimization"]
        given = DeepSpeedZeroConfig(**zero).reduce_bucket_size
        zero["reduce_bucket_size"] = min(given, trained)


def check_with_deepspeed(resolved: dict[str, Any]) -> None:
    """Lets DeepSpeed itself read a resolved configuration, in a started process group.
    Its error becomes one line.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(resolved))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"ds_config: {where}: {first['msg']} (got {first['input']!r})") from None
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"ds_config: DeepSpeed refuses it: {' '.join(str(error).split())}"
        ) from None


def resolve(
    raw: dict[str, Any],
    *,
    phase: OptimizerConfig,
    precision: str,
    batch_size: int,
    micro_batches: int,
    world_size: int,
    bf16_supported: bool,
    fp16_supported: bool,
    bf16_fast: bool = True,
) -> dict[str, Any]:
    """Returns the configuration that DeepSpeed gets, every `auto` replaced.

    Args:
        raw: from `load`.
        precision: auto, bf16, fp16 or fp32; fills `enabled: auto` of bf16, fp16 and
            torch_autocast.
        bf16_fast: whether auto is bf16; otherwise it is fp32.
        batch_size: sentences per optimizer step over all ranks.
        micro_batches: the largest number of micro-batches per step. Batches are cut by
            tokens, so the batch sizes are upper bounds to DeepSpeed; gradients are
            scaled by the true number of sentences.

    Raises:
        UserError: an `auto` that nothing resolves, precisions that exclude each other
            or that the machine does not have.
    """
    config = copy.deepcopy(raw)
    params = config.setdefault("optimizer", {}).setdefault("params", {})
    config["optimizer"].setdefault("type", "AdamW")
    at_least_0 = "a number of at least 0, or auto"
    for name, default, fits, wanted in (
        ("lr", phase.lr, _is_not_negative, at_least_0),
        ("betas", phase.adam_betas, _are_betas, "two numbers in [0, 1), or auto"),
        ("eps", phase.adam_eps, _is_not_negative, at_least_0),
        ("weight_decay", phase.weight_decay, _is_not_negative, at_least_0),
    ):
        _check(f"optimizer.params.{name}", _fill(params, name, default), fits, wanted)
    clipping = _fill(config, "gradient_clipping", phase.max_grad_norm)
    _check("gradient_clipping", clipping, _is_not_negative, "a number, 0 for none")
    _resolve_batch(config, batch_size, micro_batches, world_size)
    _resolve_precision(config, precision, bf16_supported, fp16_supported, bf16_fast)
    dtypes = ("fp32", "bf16", "fp16")
    dtype = config.get("data_types", {}).get("grad_accum_dtype", "fp32")
    _check("data_types.grad_accum_dtype", dtype, dtypes.__contains__, "fp32, bf16 or fp16")
    # DeepSpeed skips steps whose gradients are not finite by their norm; in bf16 at stage
    # 2 it looks at the norm only if it is told to check.
    for section, key in (
        ("zero_optimization", "compute_grad_norm"),
        ("bf16", "check_grad_overflow"),
    ):
        if config.get(section, {}).get(key, True) is not True:
            raise UserError(
                f"ds_config: {section}.{key} must be true: without it, steps whose gradients are "
                f"not finite are not skipped"
            )
    # By default DeepSpeed prints nothing of its own into the progress bar.
    if (every := config.setdefault("steps_per_print", None)) is not None:
        _check("steps_per_print", every, _is_positive, "a positive whole number or null")
    # DeepSpeed's timer of throughput, whose numbers only such lines show, makes the host wait
    # for the device at every micro-batch.
    config.setdefault("timers", {"throughput": {"enabled": config["steps_per_print"] is not None}})
    # The optimizer is torch's own AdamW, which needs no compiler; DeepSpeed's check is
    # for its CPU Adam.
    if config.setdefault("zero_force_ds_cpu_optimizer", False) is not False:
        raise UserError(
            "ds_config: zero_force_ds_cpu_optimizer must be false: the optimizer is torch's AdamW"
        )
    for path in _autos(config):
        raise UserError(
            f"ds_config: {path} is auto, and nothing says what it should be: write a value"
        )
    return config


def _fill(section: dict[str, Any], name: str, value: Any) -> Any:
    """Replaces a value that is missing or `auto`; returns the value that is there
    then."""
    if section.setdefault(name, "auto") == "auto":
        section[name] = value
    return section[name]


def _check(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    if not fits(value):
        raise UserError(f"ds_config: {name} must be {wanted}, not {value!r}")


def _is_not_negative(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_betas(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(_is_not_negative(beta) and beta < 1 for beta in value)
    )


def _resolve_batch(
    config: dict[str, Any], batch_size: int, micro_batches: int, world_size: int
) -> None:
    """Fills DeepSpeed's batch sizes; they follow from `data.batch_size` and only have
    to be consistent."""
    accumulation = _fill(config, "gradient_accumulation_steps", micro_batches)
    _check("gradient_accumulation_steps", accumulation, _is_positive, "a positive whole number")
    micro = -(-batch_size // (accumulation * world_size))
    total = micro * accumulation * world_size
    for name, value in (("train_micro_batch_size_per_gpu", micro), ("train_batch_size", total)):
        if (given := _fill(config, name, value)) != value:
            raise UserError(
                f"ds_config: {name} {given!r} is not {value}, which follows from data.batch_size "
                f"{batch_size}, gradient_accumulation_steps {accumulation} and {world_size} "
                f"rank(s): leave it auto, and set --data.batch_size"
            )


def _resolve_precision(
    config: dict[str, Any],
    precision: str,
    bf16_supported: bool,
    fp16_supported: bool,
    bf16_fast: bool,
) -> None:
    wanted = ("bf16" if bf16_fast else "fp32") if precision == "auto" else precision
    for name in (name for name in PRECISIONS if name in config):
        enabled = config[name].get("enabled", False)
        if enabled == "auto":
            config[name]["enabled"] = _kind(config, name) == wanted
        else:
            of_three = 'true, false or "auto"'
            _check(f"{name}.enabled", enabled, lambda value: isinstance(value, bool), of_three)
    on = _enabled(config)
    if len(on) > 1:
        raise UserError(f"ds_config: {' and '.join(on)} are both enabled: keep one")
    got = precision_of(config)
    if precision not in ("auto", got):
        raise UserError(
            f'--precision {precision}, but the ds_config gives {got}: set its "enabled" to "auto"'
        )
    if got == "fp16" and zero_stage(config) == 0:
        # The engine looks at the gradients before DeepSpeed's step. At stage 0 they are
        # still multiplied by the loss scale, which would never fall.
        raise UserError(
            f"ds_config: {on[0]} in float16 needs stage 1, 2 or 3: use --ds_config fp16"
        )
    if got == "fp16" and not fp16_supported:
        raise UserError("fp16 needs a GPU: on CPU use bf16 (--ds_config zero2) or --precision fp32")
    if got == "bf16" and not bf16_supported:
        raise UserError("this GPU has no bf16: use --ds_config fp16 or --precision fp32")
    if got == "fp32":
        # Float32 gradients are what bf16 needs; beside float32 weights DeepSpeed refuses
        # the section.
        config.pop("data_types", None)


def _kind(config: dict[str, Any], section: str) -> str:
    """Returns bf16 or fp16, the precision of a section that is enabled."""
    if section != "torch_autocast":
        return section
    name = str(config[section].get("dtype", "bfloat16"))
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    try:
        return kinds[DtypeEnum(name).value]
    except (ValueError, KeyError):
        raise UserError(
            f"ds_config: torch_autocast.dtype is {name!r}, not bfloat16 or float16"
        ) from None


def _enabled(config: dict[str, Any]) -> list[str]:
    return [name for name in PRECISIONS if config.get(name, {}).get("enabled", False)]


def precision_of(resolved: dict[str, Any]) -> str:
    """Returns the precision of a resolved configuration: bf16, fp16 or fp32."""
    return next((_kind(resolved, name) for name in _enabled(resolved)), "fp32")


def parameter_dtype(resolved: dict[str, Any]) -> torch.dtype:
    """Returns the dtype of the engine's parameters: float32 under `torch_autocast`,
    which casts copies of them."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "torch_autocast": torch.float32}
    return next((dtypes[name] for name in _enabled(resolved)), torch.float32)


def zero_stage(resolved: dict[str, Any]) -> int:
    """Returns the ZeRO stage, 0 to 3."""
    return int(resolved.get("zero_optimization", {}).get("stage", 0))


def _names(section: Any) -> set[str]:
    """Returns the keys that a section may have, aliases of a pydantic model
    included."""
    if isinstance(section, tuple):
        return set(section)
    fields = section.model_fields
    return set(fields) | {str(field.alias) for field in fields.values() if field.alias}


def _autos(tree: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the places where a configuration still has `auto`."""
    if tree == "auto":
        yield ".".join(path)
    branches = (
        tree if isinstance(tree, dict) else dict(enumerate(tree if isinstance(tree, list) else ()))
    )
    for key, value in branches.items():
        yield from _autos(value, (*path, str(key)))
