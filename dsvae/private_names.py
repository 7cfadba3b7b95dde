"""The private names of transformers and DeepSpeed on which dsvae depends.

A release may rename them without notice. Some renames fail silently: a method that is
replaced under a name that nothing calls any more, or an argument that `**kwargs`
swallows. The decoder then no longer sees z, or a checkpoint holds the wrong states.
Therefore every such name is looked up before a run begins.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, TracebackType
from typing import Any

from dsvae.errors import EXIT_USER_ERROR, UserError


@dataclass(frozen=True)
class Name:
    """An attribute, and what must be true of it."""

    path: str
    """`package.module:Class.attribute`."""
    parameters: tuple[str, ...] | None = None
    """Parameters that the function must have; any others must have defaults. None: not
    checked."""
    mentions: tuple[str, ...] = ()
    """Names that the body of the function must use."""

    def problem(self) -> str | None:
        """What is wrong with it, None if nothing is."""
        module, _, attributes = self.path.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for attribute in attributes.split("."):
                value = getattr(value, attribute)
        except (ImportError, AttributeError):
            return "does not exist"
        value = _undecorated(value)
        if self.parameters is not None:
            if not callable(value):
                return "is not a function"
            named = {
                name: parameter
                for name, parameter in inspect.signature(value).parameters.items()
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            }
            if missing := [name for name in self.parameters if name not in named]:
                return f"has no parameter {missing[0]}"
            required = [name for name, p in named.items() if p.default is p.empty]
            if more := [name for name in required if name not in self.parameters]:
                return f"has another required parameter, {more[0]}"
        if self.mentions:
            used = set(_words(value.__code__)) if inspect.isfunction(value) else set()
            if unused := [name for name in self.mentions if name not in used]:
                return f"does not use {unused[0]}"
        return None


def _undecorated(value: Any) -> Any:
    """The function below its decorators; those of DeepSpeed hide its signature."""
    value = inspect.unwrap(value)
    while inspect.isfunction(value) and value.__code__.co_freevars == ("func",):
        value = inspect.unwrap(inspect.getclosurevars(value).nonlocals["func"])
    return value


def _words(code: CodeType) -> Iterator[str]:
    """The names and string constants of a function and of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        # the names of keyword arguments are a tuple
        for word in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(word, str):
                yield word


def _name(path: str, takes: str | None = None, uses: str = "") -> Name:
    """A `Name` whose parameters and mentions are words in a string."""
    return Name(path, None if takes is None else tuple(takes.split()), tuple(uses.split()))


_MODELS = (
    "transformers.models.t5.modeling_t5:T5",
    "transformers.models.mt5.modeling_mt5:MT5",
    "transformers.models.umt5.modeling_umt5:UMT5",
)

TRANSFORMERS = (
    # modeling/attention.py: memory slots
    *(
        _name(
            f"{model}Attention.forward",
            uses="ALL_ATTENTION_FUNCTIONS _attn_implementation layer_idx position_bias",
        )
        for model in _MODELS
    ),
    *(
        _name(
            f"{model}Stack.forward",
            takes="self inputs_embeds attention_mask use_cache encoder_hidden_states "
            "encoder_attention_mask",
            uses="create_causal_mask create_bidirectional_mask",
        )
        for model in _MODELS
    ),
    # modeling/backbone.py: T5Gemma, whose frequencies stay float32
    _name(
        "transformers.models.t5gemma.modeling_t5gemma:T5GemmaEncoder.forward",
        takes="self inputs_embeds attention_mask",
        uses="rotary_emb",
    ),
    _name(
        "transformers.models.t5gemma.modeling_t5gemma:T5GemmaDecoder.forward",
        takes="self inputs_embeds use_cache encoder_hidden_states encoder_attention_mask",
        uses="rotary_emb",
    ),
    _name("transformers:PreTrainedConfig._attn_implementation"),
    _name(
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        takes="module query key value attention_mask is_causal position_bias",
    ),
    _name(
        "transformers.masking_utils:sdpa_mask",
        takes="batch_size q_length kv_length q_offset kv_offset mask_function attention_mask "
        "allow_is_causal_skip allow_is_bidirectional_skip device",
    ),
    # modeling/t5_vae.py: what transformers reads off a model class
    _name("transformers:PreTrainedModel._input_embed_layer"),
    _name("transformers:PreTrainedModel._keep_in_fp32_modules"),
    _name("transformers:PreTrainedModel._keep_in_fp32_modules_strict"),
    _name("transformers:PreTrainedModel._no_split_modules"),
    _name("transformers:PreTrainedModel._supports_sdpa"),
    _name("transformers:PreTrainedModel._tied_weights_keys"),
    _name("transformers:PreTrainedModel._init_weights", takes="self module"),
    # modeling/weight_source.py: which files hold the weights
    _name(
        "transformers.utils.hub:cached_files",
        takes="path_or_repo_id filenames _raise_exceptions_for_missing_entries",
    ),
)

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_STAGE2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_SWAPPER = "deepspeed.runtime.swap_tensor.optimizer_utils:OptimizerSwapper"
_WRITER = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine"
_CONVERSION = "deepspeed.checkpoint.ds_to_universal"

DEEPSPEED = (
    # engine/checkpoint.py: failures to write are collected
    _name(f"{_ENGINE}._save_checkpoint", uses="checkpoint_engine save"),
    _name(f"{_ENGINE}._save_zero_checkpoint", uses="checkpoint_engine save"),
    _name(f"{_WRITER}.save", takes="self state_dict path"),
    # engine/reshape_checkpoint.py: the section `load_universal` of a ds_config, for one load
    _name(f"{_ENGINE}.load_universal_checkpoint", takes="self", uses="_config"),
    _name(f"{_ENGINE}.load_checkpoint", uses="load_universal_checkpoint"),
    _name(
        "deepspeed.runtime.config:DeepSpeedConfig._initialize_params",
        uses="load_universal_checkpoint",
    ),
    _name(f"{_CONVERSION}:main", takes="args"),
    _name(
        f"{_CONVERSION}:parse_arguments",
        uses="--input_folder --output_folder --num_extract_workers --num_merge_workers "
        "--keep_temp_folder strict --inject_missing_state",
    ),
    # engine/nvme.py: gradients at aligned addresses, states as though in memory
    _name(f"{_ENGINE}.zero_nvme_offload_optimizer", takes="self"),
    _name(f"{_ENGINE}.save_checkpoint", uses="zero_nvme_offload_optimizer"),
    _name(f"{_ENGINE}.load_checkpoint", uses="zero_nvme_offload_optimizer"),
    _name(f"{_ENGINE}._load_zero_checkpoint", uses="load_state_dict"),
    _name(f"{_WRITER}.load", takes="self path map_location"),
    _name(f"{_STAGE3}.state_dict", takes="self"),
    _name(f"{_STAGE3}.load_state_dict", uses="_rigid_load_state_dict"),
    _name(f"{_STAGE3}._rigid_load_state_dict", takes="self state_dict load_optimizer_states"),
    _name(f"{_STAGE3}._rigid_state_dict", takes="self"),
    _name(f"{_STAGE3}._set_fp32_optimizer_param_groups", takes="self"),
    _name(f"{_STAGE3}._clear_fp32_optimizer_param_groups", takes="self"),
    _name(f"{_STAGE3}._swappable_optimizer_subgroup", takes="self sub_group_id"),
    _name(f"{_STAGE3}._prepare_sub_group", takes="self sub_group_id timer_names"),
    _name(f"{_STAGE3}._release_sub_group", takes="self sub_group_id timer_names"),
    _name(f"{_STAGE3}._reassign_or_swap_out_partitioned_parameters", takes="self sub_group_id"),
    _name(f"{_SWAPPER}._adjust_for_misaligned_lengths", takes="self tensors offsets"),
    _name(f"{_SWAPPER}._swap_out_gradients", uses="_adjust_for_misaligned_lengths"),
    _name(f"{_SWAPPER}.is_swappable_tensor", takes="self tensor numel"),
    # engine/build.py: parameters join a partitioned model one by one
    _name(
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
        uses="convert_to_zero_parameters",
    ),
    # engine/engine.py: gradients of exact scale; steps are skipped by the norm alone
    _name(f"{_ENGINE}.backward", takes="self loss scale_wrt_gas"),
    _name(
        f"{_STAGE2}.step", uses="check_overflow check_grad_overflow is_invalid_grad_norm overflow"
    ),
    _name(f"{_STAGE2}.check_overflow", takes="self partition_gradients"),
    _name(f"{_STAGE2}.update_offload_overflow_tracker", takes="self grad"),
    # engine/process_group.py: no kernel is compiled for the CPU
    _name("deepspeed.ops:__compatible_ops__"),
    _name("deepspeed.comm.torch:build_shm_op", uses="__compatible_ops__"),
)


def check(names: tuple[Name, ...] = TRANSFORMERS + DEEPSPEED) -> None:
    """Imports the modules of all names; raises UserError where one does not fit."""
    for name in names:
        if problem := name.problem():
            raise _misfit(name.path.replace(":", "."), problem)


def explain(error: ImportError) -> UserError | None:
    """The error for a failed import from transformers or DeepSpeed; None for others."""
    if (error.name or "").partition(".")[0] not in ("deepspeed", "transformers"):
        return None
    if isinstance(error, ModuleNotFoundError):
        return _misfit(str(error.name), "does not exist")
    return _misfit(str(error.name), f"has changed ({error.msg})")


def _misfit(name: str, problem: str) -> UserError:
    package = name.partition(".")[0]
    try:
        release = f"{package} {version(package)}"
    except PackageNotFoundError:
        release = f"{package} (not installed)"
    return UserError(
        f"{release} does not fit dsvae: {name} {problem}; install a version that dsvae's "
        f"pyproject.toml allows"
    )


def except_hook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """In place of `sys.excepthook` while dsvae/train.py imports its modules: ends the
    process with one line where transformers or DeepSpeed lacks a module."""
    refusal = explain(error) if isinstance(error, ImportError) else None
    if refusal is None:
        traceback.print_exception(kind, error, trace)
        return
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"dsvae: error: {refusal}", file=sys.stderr, flush=True)
    os._exit(EXIT_USER_ERROR)  # a hook cannot choose the exit code otherwise
