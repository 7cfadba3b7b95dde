"""A checkpoint at another number of ranks, ZeRO stage or precision than it was written
with.

DeepSpeed's own converter (`ds_to_universal`) turns the shards of the ranks into whole
parameters, each with its float32 weight and its two AdamW moments. DeepSpeed's
universal loader then gives every rank its part of them. Two gaps are filled here: each
stage's loader reads only files that the same stage wrote, and the loaders leave some
values of the optimizer wrong. ZeRO 0 keeps everything whole on every rank and has no
place in DeepSpeed's format: its one file is read and written here.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    DS_VERSION,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
)
from torch import Tensor, nn

from dsvae.engine import nvme
from dsvae.errors import EXIT_DISK, RunStopped, UserError
from dsvae.files import no_output
from dsvae.parallel.world import World

SCRATCH = ".universal"
"""The directory of a conversion, inside `checkpoints`; it exists only during one."""
WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
CONVERTED = "converted"
"""The directory that is loaded, inside `SCRATCH`: DeepSpeed's converter also writes a
file beside its output."""


def shape_of(engine: Any, world: World) -> dict[str, Any]:
    """Returns everything that decides how a checkpoint of a DeepSpeed engine is cut. It
    is recorded with the checkpoint, and compared when that is loaded."""
    stage = int(engine.zero_optimization_stage())
    return {
        "world_size": world.size,
        "zero_stage": stage,
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "optimizer": type(engine.optimizer).__name__,
        # The order and the padding of the parameters inside a flat partition.
        "layout": {
            "sub_group_size": engine.zero_sub_group_size() if stage == 3 else None,
            "round_robin": engine.zero_round_robin_gradients() if stage in (1, 2) else None,
            "alignment": engine.zero_parameter_alignment() if stage in (1, 2) else None,
        },
    }


def fits(meta: dict[str, Any], now: dict[str, Any]) -> bool:
    """Returns whether an engine of shape `now` loads a checkpoint of shape `meta`
    unconverted, bit by bit."""
    # At ZeRO 0 every rank holds everything, and one file holds it too.
    whole = meta["zero_stage"] == now["zero_stage"] == 0
    return all(
        meta.get(name, value) == value
        for name, value in now.items()
        if not (whole and name == "world_size")
    )


def clean(root: Path) -> None:
    """Removes what a killed conversion left in `root`, the directory of the
    checkpoints."""
    shutil.rmtree(root / SCRATCH, ignore_errors=True)


def load(
    engine: Any,
    source: Path,
    meta: dict[str, Any],
    world: World,
    root: Path,
    names: list[list[str]],
) -> tuple[str, dict[str, Any] | None]:
    """Puts an engine into the state of a checkpoint of another shape. Collective.

    Args:
        source: the checkpoint's directory; it is only read.
        meta: its shape.
        root: where the conversion may write (the run's own `checkpoints`): for a while
            twice the size of the checkpoint, and one shard more from ZeRO 3.
        names: of the parameters that train, by the optimizer's groups.

    Returns:
        One line that says what was converted, carried and reset; and the checkpoint's
        client state, None if DeepSpeed loaded nothing.

    Raises:
        UserError: a shape that cannot be converted, or DeepSpeed's converter failed.
        RunStopped: no room for the conversion.

    Whatever is raised, the checkpoint stays as it is.
    """
    now = shape_of(engine, world)
    _refuse(engine, source, meta, now, names, world)
    directory = root / SCRATCH / CONVERTED
    try:
        world.run_on_rank0(lambda: _convert(source, meta, now, directory, names, engine.module))
        state = _load_converted(engine, directory, now)
        world.barrier()
    finally:
        if world.is_main:
            clean(root)
    return _line(source, meta, now), state


def _refuse(
    engine: Any,
    source: Path,
    meta: dict[str, Any],
    now: dict[str, Any],
    names: list[list[str]],
    world: World,
) -> None:
    """Raises UserError on every rank for what DeepSpeed cannot do. Collective."""
    advice = f"resume with {_describe(meta)}, or start anew from exported weights with --model"
    if nvme.sections(engine.config):
        raise UserError(
            f"{source}: a checkpoint cannot be converted while states are offloaded to a disk "
            f"(nvme): {advice}"
        )
    for shape, optimizer in ((meta, meta.get("optimizer", "AdamW")), (now, now["optimizer"])):
        if shape["zero_stage"] == 0 and optimizer != "AdamW":
            raise UserError(
                f"{source}: {_way(meta, now)}: ZeRO 0 converts with float32 weights only "
                f"(torch_autocast, as in --ds_config zero0, or --precision fp32): {advice}"
            )
    if now["zero_stage"] in (1, 2):
        # The loader fails on a rank that has no part of one of AdamW's groups: a small
        # group cannot be cut into that many parts.
        parameters = dict(engine.module.named_parameters())
        without = any(
            all(parameters[name]._hp_mapping is None for name in group) for group in names
        )
        if world.sum(torch.tensor(float(without), device=world.device)) > 0:
            raise UserError(
                f"{source}: too many ranks to convert it to ZeRO {now['zero_stage']}: use fewer, "
                f"or ZeRO 3"
            )


def _convert(
    source: Path,
    meta: dict[str, Any],
    now: dict[str, Any],
    directory: Path,
    names: list[list[str]],
    module: nn.Module,
) -> None:
    """Writes the checkpoint as an engine of shape `now` reads it. Rank 0 alone."""
    root = directory.parent.parent
    clean(root)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    # Fragments and whole parameters lie side by side until the end of the conversion.
    needed = 2 * size
    if meta["zero_stage"] == 3:  # and a copy of rank 0's states
        shards = source.glob("*_optim_states.pt")
        needed += max((path.stat().st_size for path in shards), default=0)
    free = shutil.disk_usage(root.parent).free
    if free < needed:
        raise RunStopped(
            EXIT_DISK,
            f"error: {source}: converting it {_way(meta, now)} takes about {needed / 1e9:.1f} GB "
            f"in {root} for a while, and {free / 1e9:.1f} GB are free: make room, or resume with "
            f"{_describe(meta)}",
        )
    try:
        directory.mkdir(parents=True)
        common = _read(source / _common_file(meta["zero_stage"]), mmap=True)
        if meta["zero_stage"] == 0:
            groups, step, scaler = _from_whole(common, directory, names)
        else:
            groups, step, scaler = _from_shards(source, directory, meta["zero_stage"])
        missing = [
            name
            for group in names
            for name in group
            if not _file(directory, name, MOMENTS[1]).is_file()
        ]
        if missing or len(groups) != len(names):
            what = missing[0] if missing else "a parameter group"
            raise ValueError(f"it lacks the optimizer's states of {what}")
        dropped = {"module", "optimizer", "param_shapes", "shared_params"}
        dropped |= {"frozen_param_shapes", "frozen_param_fragments"}
        common = {key: value for key, value in common.items() if key not in dropped}
        if now["zero_stage"] == 0:
            _to_whole(common, directory, names, groups, step, module)
        else:
            # A loss scale belongs to its precision.
            same = meta.get("dtype", now["dtype"]) == now["dtype"]
            _to_shards(common, directory, groups, step, scaler if same else {}, now["zero_stage"])
    except Exception as error:  # any: the other ranks wait for an answer
        clean(root)
        what = " ".join(str(error).split()) or type(error).__name__
        line = (
            f"{source}: converting it {_way(meta, now)} failed ({what}); the checkpoint itself "
            f"is unchanged: resume with {_describe(meta)}"
        )
        # torch's writer raises RuntimeError on a full disk
        if isinstance(error, OSError) or "PytorchStreamWriter" in what:
            raise RunStopped(EXIT_DISK, f"error: {line}, or make room in {root}") from error
        raise UserError(line) from error


def _from_shards(
    source: Path, directory: Path, stage: int
) -> tuple[list[dict], float, dict[str, Any]]:
    """Converts a checkpoint of ZeRO 1 to 3 with DeepSpeed; returns (hyperparameters by
    group, AdamW's step, the loss scaler)."""
    # No worker processes: a process that has threads of gloo, NCCL and OpenMP may hang
    # when it forks.
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(directory),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with no_output():
        ds_to_universal.main(arguments)
    if stage == 3:  # whose tensors are written bare
        for key in (WEIGHT, *MOMENTS):
            for path in (directory / "zero").glob(f"*/{key}.pt"):
                torch.save({PARAM: torch.load(path, map_location="cpu")}, path)
    saved = _read(directory / "zero" / "optimizer_state.pt")
    # ZeRO 3 has the optimizer's state here; 1 and 2 leave the step beside the parameters.
    state = saved.get(OPTIMIZER_STATE_DICT, saved.get(BASE_OPTIMIZER_STATE, {})).get("state")
    if state:
        step = next(iter(state.values()))["step"]
    else:
        step = torch.load(next((directory / "zero").glob("*/step.pt")))
    scaler = {
        key: saved[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in saved
    }
    return _without_params(saved[PARAM_GROUPS]), float(step), scaler


def _from_whole(
    common: dict[str, Any], directory: Path, names: list[list[str]]
) -> tuple[list[dict], float, dict[str, Any]]:
    """Does the same from the one file of ZeRO 0."""
    saved = common["optimizer"]
    step = 0.0
    for group, group_names in zip(saved[PARAM_GROUPS], names, strict=True):
        for index, name in zip(group["params"], group_names, strict=True):
            state = saved["state"][index]
            (directory / "zero" / name).mkdir(parents=True)
            values = {WEIGHT: common["module"][name], **{key: state[key] for key in MOMENTS}}
            for key, value in values.items():
                value = value.to("cpu", torch.float32, copy=True)
                torch.save({PARAM: value}, _file(directory, name, key))
            step = float(state["step"])
    return _without_params(saved[PARAM_GROUPS]), step, {}


def _without_params(groups: list[dict]) -> list[dict]:
    """Returns the hyperparameters alone of AdamW's groups."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _file(directory: Path, name: str, key: str) -> Path:
    """Returns where a conversion keeps the weight or a moment of a parameter."""
    return directory / "zero" / name / f"{key}.pt"


def _read(path: Path, mmap: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)


def _to_shards(
    common: dict[str, Any],
    directory: Path,
    groups: list[dict],
    step: float,
    scaler: dict[str, Any],
    stage: int,
) -> None:
    """Completes a conversion so that the loaders of ZeRO 1, 2 and 3 all read it."""
    state = {
        **scaler,
        DS_VERSION: common[DS_VERSION],
        PARAM_GROUPS: groups,  # for ZeRO 1 and 2
        # for ZeRO 3
        OPTIMIZER_STATE_DICT: {"state": {0: {"step": torch.tensor(step)}}, PARAM_GROUPS: groups},
    }
    torch.save(state, directory / "zero" / "optimizer_state.pt")
    torch.save({**common, "module": {}}, directory / _common_file(stage))


def _to_whole(
    common: dict[str, Any],
    directory: Path,
    names: list[list[str]],
    groups: list[dict],
    step: float,
    module: nn.Module,
) -> None:
    """Writes a converted checkpoint as the one file of ZeRO 0."""

    def read(name: str, key: str) -> Tensor:
        return _read(_file(directory, name, key))[PARAM].float().view(parameters[name].shape)

    parameters = dict(module.named_parameters())
    order = [name for group in names for name in group]
    trained = {id(parameters[name]): name for name in order}
    weights = {name: read(name, WEIGHT) for name in order}
    # Tied weights have several names; frozen ones are those of the model that the run
    # begins with.
    states = {
        name: weights[trained[id(value)]] if id(value) in trained else value.detach().cpu()
        for name, value in module.state_dict(keep_vars=True).items()
    }
    moments = {
        index: {"step": torch.tensor(step), **{key: read(name, key) for key in MOMENTS}}
        for index, name in enumerate(order)
    }
    indices = iter(moments)
    counted = [
        {**group, "params": list(islice(indices, len(group_names)))}
        for group, group_names in zip(groups, names, strict=True)
    ]
    whole = {**common, "module": states, "optimizer": {"state": moments, PARAM_GROUPS: counted}}
    torch.save(whole, directory / _common_file(0))


def _common_file(stage: int) -> str:
    """Returns the name of the file beside the optimizer's; of rank 0's at ZeRO 3."""
    return f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"


def _load_converted(engine: Any, directory: Path, now: dict[str, Any]) -> dict[str, Any] | None:
    """Loads a conversion with DeepSpeed's loaders; returns the client state.
    Collective."""
    if now["zero_stage"] == 0:
        return engine.load_checkpoint(str(directory.parent), tag=directory.name)[1]
    # The same as `checkpoint: {load_universal: true}` in a ds_config, but for this load
    # alone: the next engine of the run, or the next start, loads a plain checkpoint.
    engine._config.load_universal_checkpoint = True
    try:
        _, state = engine.load_checkpoint(str(directory.parent), tag=directory.name)
    finally:
        engine._config.load_universal_checkpoint = False
    saved = _read(directory / "zero" / "optimizer_state.pt")
    optimizer = engine.basic_optimizer
    # ZeRO 3's loader gives every group the values of the first, so the second would have
    # weight decay.
    for group, values in zip(optimizer.param_groups, saved[PARAM_GROUPS], strict=True):
        group.update(values)
    # It also gives all partitions one tensor for the step, which each of them then
    # increments. The loaders of ZeRO 1 and 2 leave it on the CPU.
    step = float(saved[OPTIMIZER_STATE_DICT]["state"][0]["step"])
    for partition, values in optimizer.state.items():
        values["step"] = torch.tensor(step, dtype=torch.float32, device=partition.device)
    return state


def _describe(shape: dict[str, Any]) -> str:
    dtype = f", {shape['dtype']} weights" if "dtype" in shape else ""
    return f"{shape['world_size']} rank(s) at ZeRO {shape['zero_stage']}{dtype}"


def _way(meta: dict[str, Any], now: dict[str, Any]) -> str:
    return f"from {_describe(meta)} to {_describe(now)}"


def _line(source: Path, meta: dict[str, Any], now: dict[str, Any]) -> str:
    scaled = "float16" in (meta.get("dtype"), now["dtype"]) and meta.get("dtype") != now["dtype"]
    reset = "the loss scale of fp16" if scaled else "nothing"
    return (
        f"{source} converted {_way(meta, now)}: carried over: weights in float32, AdamW's moments "
        f"and step, learning-rate schedule, place in the data; reset: {reset}"
    )
