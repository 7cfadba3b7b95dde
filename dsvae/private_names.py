"""The private names of transformers and DeepSpeed on which dsvae depends.

A release may rename them without notice. Some renames fail silently: a method that is
replaced under a name that nothing calls any more, or an argument that `**kwargs`
swallows. The decoder then no longer sees z, or a checkpoint holds the wrong states.
Therefore only releases that were tried are allowed (the bounds in pyproject.toml), and
every name is looked up before a run begins. tests/test_private_names.py says what must
be true of each name, and checks it in the releases at both ends of the bounds.
"""

from __future__ import annotations

import functools
import pkgutil
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from dsvae.errors import UserError

TRANSFORMERS = {
    # modeling/attention.py: memory slots
    "transformers.models.t5.modeling_t5": "T5Attention.forward T5Stack.forward",
    "transformers.models.mt5.modeling_mt5": "MT5Attention.forward MT5Stack.forward",
    "transformers.models.umt5.modeling_umt5": "UMT5Attention.forward UMT5Stack.forward",
    "transformers.integrations.sdpa_attention": "sdpa_attention_forward",
    "transformers.masking_utils": "sdpa_mask",
    "transformers:PreTrainedConfig": "_attn_implementation",
    # modeling/backbone.py: T5Gemma, whose frequencies stay float32
    "transformers.models.t5gemma.modeling_t5gemma": "T5GemmaEncoder.forward T5GemmaDecoder.forward",
    # modeling/t5_vae.py: what transformers reads off a model class
    "transformers:PreTrainedModel": "_init_weights _input_embed_layer _keep_in_fp32_modules "
    "_keep_in_fp32_modules_strict _no_split_modules _supports_sdpa _tied_weights_keys",
    # modeling/weight_source.py: which files hold the weights
    "transformers.utils.hub": "cached_files",
}
"""Module, or module:class -> names in it."""

DEEPSPEED = {
    # engine/checkpoint.py: failures to write are collected
    "deepspeed.runtime.engine:DeepSpeedEngine": "_save_checkpoint _save_zero_checkpoint "
    # engine/reshape_checkpoint.py: `load_universal` for one load
    "load_universal_checkpoint load_checkpoint "
    # engine/nvme.py: states as though in memory; engine/engine.py: gradients of exact scale
    "zero_nvme_offload_optimizer save_checkpoint _load_zero_checkpoint backward",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine": "save "
    "load",
    "deepspeed.runtime.config:DeepSpeedConfig": "_initialize_params",
    "deepspeed.checkpoint.ds_to_universal": "main parse_arguments",
    # engine/engine.py: steps are skipped by the norm alone
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": "step check_overflow "
    "update_offload_overflow_tracker",
    # engine/engine.py: the trace of a pass without a backward pass is dropped
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator": (
        "is_invalid_trace _invalidate_trace"
    ),
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload": "get_param_coordinator",
    # engine/nvme.py: gradients at aligned addresses
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": "state_dict load_state_dict "
    "_rigid_load_state_dict _rigid_state_dict _set_fp32_optimizer_param_groups "
    "_clear_fp32_optimizer_param_groups _swappable_optimizer_subgroup _prepare_sub_group "
    "_release_sub_group _reassign_or_swap_out_partitioned_parameters",
    "deepspeed.runtime.swap_tensor.optimizer_utils:OptimizerSwapper": "is_swappable_tensor "
    "_adjust_for_misaligned_lengths _swap_out_gradients",
    # engine/build.py: parameters join a partitioned model one by one
    "deepspeed.runtime.zero.partition_parameters:Init": "_convert_to_deepspeed_param",
    # engine/process_group.py: no kernel is compiled for the CPU
    "deepspeed.ops": "__compatible_ops__",
    "deepspeed.comm.torch": "build_shm_op",
}
"""Module, or module:class -> names in it."""


def paths(names: Mapping[str, str]) -> list[str]:
    """Returns `module:name` or `module:class.name` for every name of a table."""
    separators = {place: "." if ":" in place else ":" for place in names}
    return [f"{place}{separators[place]}{name}" for place in names for name in names[place].split()]


@functools.cache
def requirement(library: str) -> Requirement:
    """Returns the releases of a library that dsvae allows; `str` is what pip takes."""
    return next(each for each in map(Requirement, requires("dsvae") or ()) if each.name == library)


def check_versions(*libraries: str) -> None:
    """Raises UserError if transformers or DeepSpeed is not a release that dsvae allows.
    Imports neither."""
    for library in libraries or ("transformers", "deepspeed"):
        try:
            found, allowed = version(library), requirement(library)
        except PackageNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install dsvae") from None
        if not allowed.specifier.contains(found, prereleases=True):
            raise UserError(f'{library} {found} does not fit dsvae: pip install "{allowed}"')


def check(names: Mapping[str, str] = TRANSFORMERS | DEEPSPEED) -> None:
    """Imports the modules of all names; raises UserError if one does not exist, or its
    library is not a release that dsvae allows."""
    libraries = {path: re.split("[.:]", path)[0] for path in paths(names)}
    check_versions(*sorted(set(libraries.values())))
    for path, library in libraries.items():
        try:
            pkgutil.resolve_name(path)
        except (ImportError, AttributeError):
            raise UserError(
                f"{library} {version(library)} does not fit dsvae: {path.replace(':', '.')} does "
                f'not exist; pip install "{requirement(library)}"'
            ) from None
