"""The private names of transformers and DeepSpeed are what dsvae takes them for, and a
release that was not tried is refused before a run."""

import inspect
import pkgutil
import signal
import subprocess
import sys
import types
from importlib.metadata import version

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from launch import ROOT
from transformers.integrations import sdpa_attention

from dsvae import pretrained, private_names, train
from dsvae.errors import EXIT_USER_ERROR, UserError
from dsvae.export import export_checkpoint

STACK = "self inputs_embeds attention_mask use_cache encoder_hidden_states encoder_attention_mask"
ATTENTION = "ALL_ATTENTION_FUNCTIONS _attn_implementation layer_idx position_bias"
MASKS = "create_causal_mask create_bidirectional_mask"
PATHS = private_names.paths(private_names.TRANSFORMERS | private_names.DEEPSPEED)
PATHS = {path.split(":")[1]: path for path in PATHS}
TAKES = {
    "T5Stack.forward": STACK,
    "MT5Stack.forward": STACK,
    "UMT5Stack.forward": STACK,
    "T5GemmaEncoder.forward": "self inputs_embeds attention_mask",
    "T5GemmaDecoder.forward": "self inputs_embeds use_cache encoder_hidden_states "
    "encoder_attention_mask",
    "sdpa_attention_forward": "module query key value attention_mask is_causal position_bias",
    "sdpa_mask": "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask "
    "allow_is_causal_skip allow_is_bidirectional_skip device",
    "PreTrainedModel._init_weights": "self module",
    "cached_files": "path_or_repo_id filenames _raise_exceptions_for_missing_entries",
    "TorchCheckpointEngine.save": "self state_dict path",
    "DeepSpeedEngine.load_universal_checkpoint": "self",
    "main": "args",
    "DeepSpeedEngine.zero_nvme_offload_optimizer": "self",
    "TorchCheckpointEngine.load": "self path map_location",
    "DeepSpeedZeroOptimizer_Stage3.state_dict": "self",
    "DeepSpeedZeroOptimizer_Stage3._rigid_load_state_dict": "self state_dict load_optimizer_states",
    "DeepSpeedZeroOptimizer_Stage3._rigid_state_dict": "self",
    "DeepSpeedZeroOptimizer_Stage3._set_fp32_optimizer_param_groups": "self",
    "DeepSpeedZeroOptimizer_Stage3._clear_fp32_optimizer_param_groups": "self",
    "DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup": "self sub_group_id",
    "DeepSpeedZeroOptimizer_Stage3._prepare_sub_group": "self sub_group_id timer_names",
    "DeepSpeedZeroOptimizer_Stage3._release_sub_group": "self sub_group_id timer_names",
    "DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters": "self "
    "sub_group_id",
    "OptimizerSwapper._adjust_for_misaligned_lengths": "self tensors offsets",
    "OptimizerSwapper.is_swappable_tensor": "self tensor numel",
    "DeepSpeedEngine.backward": "self loss scale_wrt_gas",
    "DeepSpeedZeroOptimizer.check_overflow": "self partition_gradients",
    "DeepSpeedZeroOptimizer.update_offload_overflow_tracker": "self grad",
}
"""Parameters that the function must have; any others must have defaults."""

USES = {
    "T5Attention.forward": ATTENTION,
    "MT5Attention.forward": ATTENTION,
    "UMT5Attention.forward": ATTENTION,
    "T5Stack.forward": MASKS,
    "MT5Stack.forward": MASKS,
    "UMT5Stack.forward": MASKS,
    "T5GemmaEncoder.forward": "rotary_emb",
    "T5GemmaDecoder.forward": "rotary_emb",
    "DeepSpeedEngine._save_checkpoint": "checkpoint_engine save",
    "DeepSpeedEngine._save_zero_checkpoint": "checkpoint_engine save",
    "DeepSpeedEngine.load_universal_checkpoint": "_config",
    "DeepSpeedEngine.load_checkpoint": "load_universal_checkpoint zero_nvme_offload_optimizer",
    "DeepSpeedConfig._initialize_params": "load_universal_checkpoint",
    "parse_arguments": "--input_folder --output_folder --num_extract_workers --num_merge_workers "
    "--keep_temp_folder strict --inject_missing_state",
    "DeepSpeedEngine.save_checkpoint": "zero_nvme_offload_optimizer",
    "DeepSpeedEngine._load_zero_checkpoint": "load_state_dict",
    "DeepSpeedZeroOptimizer_Stage3.load_state_dict": "_rigid_load_state_dict",
    "OptimizerSwapper._swap_out_gradients": "_adjust_for_misaligned_lengths",
    "Init._convert_to_deepspeed_param": "convert_to_zero_parameters",
    "DeepSpeedZeroOptimizer.step": "check_overflow check_grad_overflow is_invalid_grad_norm "
    "overflow",
    "build_shm_op": "__compatible_ops__",
}
"""Names that the body must use: what is put under a name that nothing calls any more is
lost in silence."""


def undecorated(value):
    """The function below its decorators; those of DeepSpeed hide its signature."""
    value = inspect.unwrap(value)
    while inspect.isfunction(value) and value.__code__.co_freevars == ("func",):
        value = inspect.unwrap(inspect.getclosurevars(value).nonlocals["func"])
    return value


def words_of(code):
    """The names and string constants of a function and of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from words_of(constant)
        # the names of keyword arguments are a tuple
        yield from constant if isinstance(constant, tuple) else (constant,)


@pytest.mark.parametrize("name", TAKES)
def test_a_function_takes_what_dsvae_gives_it(name):
    found = inspect.signature(undecorated(pkgutil.resolve_name(PATHS[name]))).parameters.values()
    named = {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    given = set(TAKES[name].split())
    assert given <= set(named)
    assert {p.name for p in named.values() if p.default is p.empty} <= given


@pytest.mark.parametrize("name", USES)
def test_a_function_uses_what_dsvae_replaces(name):
    assert set(USES[name].split()) <= set(
        words_of(undecorated(pkgutil.resolve_name(PATHS[name])).__code__)
    )


def test_every_name_is_looked_up_before_a_run():
    private_names.check()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(sdpa_attention, "sdpa_attention_forward"), (DeepSpeedEngine, "_save_zero_checkpoint")],
)
def test_a_name_that_is_gone_is_refused(owner, name, monkeypatch, tmp_path):
    monkeypatch.delattr(owner, name)
    loads = [lambda: private_names.check(), lambda: export_checkpoint(tmp_path, "latest", None, id)]
    loads += [lambda: pretrained.load(tmp_path)] * (owner is sdpa_attention)
    for load in loads:
        with pytest.raises(
            UserError, match=rf"^(transformers|deepspeed) \d.*{name} does not exist"
        ):
            load()


def test_a_run_does_not_start_without_a_name(monkeypatch, capsys):
    monkeypatch.delattr(sdpa_attention, "sdpa_attention_forward")
    settings = types.SimpleNamespace(ds_config="x.json", hang_timeout=1.0, report_to="none")
    monkeypatch.setattr(train.configuration, "read", lambda _: settings)
    monkeypatch.setattr(train.ds_config, "load", lambda _: {})
    monkeypatch.setattr(train, "join", lambda _: pytest.fail("the run has started"))
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        assert train.main([]) == EXIT_USER_ERROR
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsvae: error: transformers ")
    assert "sdpa_attention_forward does not exist" in line


def test_the_bounds_are_those_of_the_package():
    for library in ("transformers", "deepspeed"):
        assert str(private_names.requirement(library)).startswith(library)
        assert version(library) in private_names.requirement(library).specifier


OTHER = """if True:
    import importlib.metadata, runpy, sys
    original = importlib.metadata.version
    importlib.metadata.version = lambda name: "{version}" if name == "{library}" else original(name)
    sys.modules["{library}"] = None  # as in a release whose modules have other names
    sys.argv = {words}
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("words", [["dsvae/train.py"], ["dsvae/cli.py", "plan", "t5-small"]])
@pytest.mark.parametrize(("library", "other"), [("transformers", "5.99.0"), ("deepspeed", "0.1")])
def test_a_release_that_was_not_tried_is_one_line(words, library, other):
    code = OTHER.format(version=other, library=library, words=words)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"dsvae: error: {library} {other} does not fit dsvae")
    assert str(private_names.requirement(library)) in line
