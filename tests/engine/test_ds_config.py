"""ds_config files: what is refused, how `auto` is resolved, and that DeepSpeed itself
takes the result."""

import json
import re
import typing
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from launch import CONFIGS

from dsvae.config import PhaseConfig
from dsvae.engine import ds_config
from dsvae.errors import UserError

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
PHASE = PhaseConfig(
    lr=2e-4, adam_betas=[0.8, 0.95], adam_eps=1e-7, weight_decay=0.02, max_grad_norm=0.5
)
OTHERS = {"betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.02}
shipped = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def resolve(raw, **options):
    run = {"phase": PHASE, "precision": "auto", "world_size": 1}
    batch = {"batch_size": 24, "micro_batches": 3}
    machine = {"bf16_supported": True, "fp16_supported": True}
    return ds_config.resolve(raw, **{**run, **batch, **machine, **options})


def written(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def file(name):
    return ds_config.load(next(path for path in FILES if path.stem == name))


def test_all_files_are_there():
    names = "zero0 zero1 zero2 zero3 zero2_offload zero3_offload zero3_nvme fp16"
    assert {path.stem for path in FILES} == set(names.split())


@shipped
def test_deepspeed_takes_every_shipped_file_as_resolved(path):
    resolved = resolve(ds_config.load(path))
    assert '"auto"' not in json.dumps(resolved)
    theirs = DeepSpeedConfig(json.loads(json.dumps(resolved)))
    assert theirs.train_batch_size == 24
    assert (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps) == (8, 3)
    assert theirs.gradient_clipping == 0.5
    assert theirs.optimizer_name == "adamw"
    assert theirs.optimizer_params == {"lr": 2e-4, **OTHERS}
    stage = int(next(c for c in path.stem if c.isdigit())) if path.stem.startswith("zero") else 2
    assert theirs.zero_optimization_stage == stage == ds_config.zero_stage(resolved)
    enabled = {
        "fp16": theirs.float16_config.enabled,
        "bf16": theirs.bfloat16_config.enabled or bool(theirs.torch_autocast_enabled),
    }
    assert [name for name, on in enabled.items() if on] == [ds_config.precision_of(resolved)]
    assert ds_config.precision_of(resolved) == ("fp16" if path.stem == "fp16" else "bf16")
    offload = theirs.zero_config.offload_optimizer
    device = {"offload": "cpu", "nvme": "nvme"}.get(path.stem.split("_")[-1])
    assert (offload.device if offload else None) == device


@shipped
def test_bf16_accumulates_gradients_in_fp32(path):
    resolved = resolve(ds_config.load(path))
    if resolved.get("bf16", {}).get("enabled"):
        assert DeepSpeedConfig(resolved).grad_accum_dtype == "fp32"
    else:  # autocast's parameters, and their gradients, are fp32
        assert path.stem in ("zero0", "fp16")


@shipped
def test_fp32_is_one_flag_away(path):
    if path.stem == "fp16":
        with pytest.raises(UserError, match="--precision fp32, but the ds_config gives fp16"):
            resolve(ds_config.load(path), precision="fp32")
        return
    resolved = resolve(
        ds_config.load(path), precision="fp32", bf16_supported=False, fp16_supported=False
    )
    assert ds_config.precision_of(resolved) == "fp32"
    theirs = DeepSpeedConfig(resolved)
    assert not theirs.bfloat16_config.enabled
    assert not theirs.float16_config.enabled
    assert not theirs.torch_autocast_enabled


def test_resolving_leaves_the_input_as_it_was():
    raw = file("zero2")
    before = json.dumps(raw)
    resolve(raw)
    assert json.dumps(raw) == before


def test_what_the_file_says_beats_the_phase():
    raw = {
        "optimizer": {"type": "AdamW", "params": {"lr": 5.0, "betas": "auto"}},
        "gradient_clipping": 9.0,
    }
    resolved = resolve(raw)
    assert resolved["optimizer"]["params"] == {"lr": 5.0, **OTHERS}
    assert resolved["gradient_clipping"] == 9.0


def test_an_empty_file_is_plain_fp32():
    resolved = resolve({}, bf16_supported=False, fp16_supported=False)
    assert ds_config.precision_of(resolved) == "fp32"
    assert ds_config.zero_stage(resolved) == DeepSpeedConfig(resolved).zero_optimization_stage == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimisation": {}},
            r"unknown key zero_optimisation; did you mean zero_optimization\?",
        ),
        ({"qqqq": 1}, "unknown key qqqq$"),
        ({"scheduler": {}}, r"scheduler is not taken from here: .*--phase1\.lr_schedule"),
        ({"activation_checkpointing": {}}, r"--model\.gradient_checkpointing"),
        ({"tensorboard": {"enabled": True}}, "dsvae writes TensorBoard itself"),
        ({"bfloat16": {"enabled": True}}, "its name is bf16"),
        ({"optimizer": {"type": "Muon", "params": {}}}, "optimizer must be AdamW.*Muon"),
        (
            {"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}},
            "unknown optimizer parameter momentum; known: betas",
        ),
        ({"optimizer": {"kind": "AdamW"}}, "optimizer must be AdamW"),
        ({"bf16": True}, "bf16 must be an object, not True"),
        ({"zero_optimization": 2}, "zero_optimization must be an object"),
        ({"flops_profiler": 5}, "flops_profiler must be an object"),
        ('{"bf16": {', "not valid JSON"),
        ("[1, 2]", "must hold a JSON object"),
        ("", "not valid JSON"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        ds_config.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_directory_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match="No such file.*zero2_offload"):
        ds_config.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="directory"):
        ds_config.load(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        ds_config.load(tmp_path / "bytes.json")


@pytest.mark.parametrize("key", sorted(ds_config.ELSEWHERE))
def test_no_key_is_both_taken_and_refused(key):
    assert key not in ds_config.KEYS


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            r"zero_optimization\.reduce_bucket_size",
        ),
        ({"aio": {"block_size": "auto"}}, r"aio\.block_size"),
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"flops_profiler": {"x": [1, {"y": "auto"}]}}, r"flops_profiler\.x\.1\.y"),
    ],
)
def test_an_auto_that_nothing_resolves_is_named(raw, path):
    with pytest.raises(UserError, match=f"{path} is auto"):
        resolve(raw)


@pytest.mark.parametrize(
    ("raw", "world_size", "expected"),
    [
        ({}, 1, (24, 8, 3)),
        ({}, 2, (24, 4, 3)),
        ({}, 5, (30, 2, 3)),  # rounded up: an upper bound
        ({"gradient_accumulation_steps": 2}, 1, (24, 12, 2)),
        ({"train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 1}, 2, (24, 12, 1)),
        (
            {
                "train_batch_size": 24,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 3,
            },
            2,
            (24, 4, 3),
        ),
    ],
)
def test_batch_numbers_fit_together(raw, world_size, expected):
    resolved = resolve(raw, world_size=world_size)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(resolved[name] for name in names) == expected
    total, micro, accumulation = expected
    assert total == micro * accumulation * world_size >= min(24, total)


@pytest.mark.parametrize(
    "raw",
    [
        {"train_batch_size": 25},
        {"train_micro_batch_size_per_gpu": 4},
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4},
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
        },
    ],
)
def test_batch_numbers_that_contradict_each_other_or_the_runs_batch(raw):
    with pytest.raises(
        UserError, match=r"train_\w*batch_size\w* \d+ .*is not .*--data\.batch_size"
    ):
        resolve(raw)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"optimizer": {"params": {"lr": "0.001"}}}, "optimizer.params.lr"),
        ({"optimizer": {"params": {"lr": -1}}}, "optimizer.params.lr"),
        ({"optimizer": {"params": {"eps": None}}}, "optimizer.params.eps"),
        ({"optimizer": {"params": {"weight_decay": "auto "}}}, "optimizer.params.weight_decay"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, "optimizer.params.betas"),
        ({"optimizer": {"params": {"betas": [0.9, 1]}}}, "optimizer.params.betas"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping"),
        ({"gradient_clipping": -1}, "gradient_clipping"),
        ({"gradient_clipping": True}, "gradient_clipping"),
        (
            {"data_types": {"grad_accum_dtype": "fp33"}, "bf16": {"enabled": True}},
            "data_types.grad_accum_dtype",
        ),
        ({"steps_per_print": "x"}, "steps_per_print"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
    ],
)
def test_a_value_that_is_none_is_told_with_its_name(raw, name):
    with pytest.raises(UserError, match=rf"ds_config: {re.escape(name)} must be") as caught:
        resolve(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_accumulation_must_be_a_positive_whole_number(value):
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        resolve({"gradient_accumulation_steps": value})


@pytest.mark.parametrize("section", ["fp16", "torch_autocast"])
def test_float16_at_stage_0_is_refused(section):
    """Its loss scale would never come down, and nothing would train."""
    raw = {section: {"enabled": True}}
    if section == "torch_autocast":
        raw[section]["dtype"] = "float16"
    for zero in ({}, {"zero_optimization": {"stage": 0}}):
        with pytest.raises(
            UserError,
            match=rf"{section} in float16 needs stage 1, 2 or 3: use --ds_config fp16",
        ):
            resolve({**raw, **zero})
    resolve({**raw, "zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(
    ("section", "key"),
    [("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")],
)
@pytest.mark.parametrize("value", [False, "auto", 1])
def test_what_skips_steps_that_are_not_finite_cannot_be_switched_off(section, key, value):
    """DeepSpeed would then step on gradients that are not finite."""
    raw = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_clipping": 0}
    raw[section][key] = value
    with pytest.raises(UserError, match=rf"{section}\.{key} must be true") as caught:
        resolve(raw)
    assert "\n" not in str(caught.value)
    raw[section][key] = True
    resolve(raw)


AUTO_BF16, ON_BF16 = {"bf16": {"enabled": "auto"}}, {"bf16": {"enabled": True}}
STAGE_1 = {"zero_optimization": {"stage": 1}}
AUTO_FP16 = {"fp16": {"enabled": "auto"}, **STAGE_1}
ON_FP16 = {"fp16": {"enabled": True}, **STAGE_1}
CAST = {"torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}}
CAST_FP16 = {"torch_autocast": {"enabled": "auto", "dtype": "float16"}, **STAGE_1}


@pytest.mark.parametrize(
    ("raw", "expected"),  # by --precision; None: refused
    [
        (AUTO_BF16, {"auto": "bf16", "bf16": "bf16", "fp16": None, "fp32": "fp32"}),
        (AUTO_FP16, {"auto": "fp32", "bf16": None, "fp16": "fp16", "fp32": "fp32"}),
        (
            {**AUTO_BF16, **AUTO_FP16},
            {"auto": "bf16", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"},
        ),
        (ON_BF16, {"auto": "bf16", "bf16": "bf16", "fp16": None, "fp32": None}),
        (ON_FP16, {"auto": "fp16", "bf16": None, "fp16": "fp16", "fp32": None}),
        (CAST, {"auto": "bf16", "bf16": "bf16", "fp16": None, "fp32": "fp32"}),
        (CAST_FP16, {"auto": "fp32", "bf16": None, "fp16": "fp16", "fp32": "fp32"}),
        ({}, {"auto": "fp32", "bf16": None, "fp16": None, "fp32": "fp32"}),
    ],
)
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_precision(raw, expected, precision):
    if expected[precision] is None:
        with pytest.raises(UserError, match=f"--precision {precision}, but the ds_config gives"):
            resolve(raw, precision=precision)
    else:
        resolved = resolve(raw, precision=precision)
        assert ds_config.precision_of(resolved) == expected[precision]
        assert all(
            isinstance(section["enabled"], bool)
            for name, section in resolved.items()
            if "enabled" in raw.get(name, ())
        )


@pytest.mark.parametrize(
    "raw",
    [
        {**ON_BF16, **ON_FP16},
        {**AUTO_BF16, **ON_FP16},
        {**AUTO_BF16, **CAST},
        {**ON_BF16, "torch_autocast": {"enabled": True}},
    ],
)
def test_two_precisions_at_once(raw):
    with pytest.raises(UserError, match="are both enabled"):
        resolve(raw)


def test_what_the_machine_cannot_do():
    with pytest.raises(UserError, match="fp16 needs a GPU: on CPU use bf16"):
        resolve(file("fp16"), fp16_supported=False)
    with pytest.raises(UserError, match="no bf16"):
        resolve(file("zero2"), bf16_supported=False)
    assert ds_config.precision_of(resolve(file("fp16"), bf16_supported=False)) == "fp16"


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_auto_is_float32_if_bf16_is_slow(name):
    slow = resolve(file(name), bf16_fast=False)
    assert ds_config.precision_of(slow) == "fp32"
    asked = resolve(file(name), bf16_fast=False, precision="bf16")
    assert ds_config.precision_of(asked) == ds_config.precision_of(resolve(file(name))) == "bf16"


def test_precisions_are_those_of_the_command_line():
    from dsvae.config import field_types

    assert set(typing.get_args(field_types()["precision"])) == {"auto", "bf16", "fp16", "fp32"}


@pytest.mark.parametrize(
    ("zero", "size"),
    [
        ({"stage": 2, "reduce_bucket_size": 100}, 100),
        ({"stage": 2, "reduce_bucket_size": 5000}, 1000),
        ({"stage": 3}, 1000),  # DeepSpeed's default is 5e8
    ],
)
def test_a_bucket_is_no_larger_than_the_gradients(zero, size):
    resolved = resolve({"zero_optimization": zero})
    ds_config.fit_bucket(resolved, 1000)
    assert resolved["zero_optimization"] == {**zero, "reduce_bucket_size": size}


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "fp16"])
def test_buckets_overlap_for_t5_base_and_are_small_for_a_small_model(name):
    """One bucket for all gradients would leave nothing to reduce while others are computed."""
    gradients = 220e6  # of t5-base; without cross-attention a few less
    bucket = ds_config.load(CONFIGS / f"{name}.json")["zero_optimization"]["reduce_bucket_size"]
    assert gradients / bucket > 8
    assert 2 * 4 * bucket < 0.2e9  # bytes of two buckets in float32
