"""What an engine holds beside the dry run: weights, gradients, optimizer states and
buffers, in closed form per ZeRO stage.

Read off DeepSpeed 0.19's sources; docs/plan.md compares the sums with live tensors of
real runs. Every size is in bytes, every count in elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dsvae.engine import ds_config
from dsvae.engine.model_directory import MAX_SHARD_BYTES
from dsvae.errors import UserError
from dsvae.planning.dry_run import DryRun, Weight

ALLREDUCE_ELEMENTS = 500_000_000
"""Elements of the buffer in which DeepSpeed's engine (not ZeRO) all-reduces
gradients."""


@dataclass(frozen=True)
class Engine:
    """A resolved DeepSpeed configuration, as far as memory goes."""

    kind: str
    """plain (stage 0), bf16 (stage 1, float32 accumulation), zero12, zero3."""
    zero: DeepSpeedZeroConfig
    precision: str
    compute: int
    """Bytes of a weight as the engine computes with it."""
    accumulate: int
    """Bytes of a gradient as it is kept until the step."""
    autocast: bool
    optimizer_on: str
    """gpu, cpu or nvme."""
    parameters_on: str

    @classmethod
    def of(cls, resolved: dict[str, Any]) -> Engine:
        """Returns the engine of a resolved configuration. Raises UserError for a
        combination that is not planned for."""
        zero = DeepSpeedZeroConfig(**resolved.get("zero_optimization", {}))
        stage, precision = ds_config.zero_stage(resolved), ds_config.precision_of(resolved)
        autocast = bool(resolved.get("torch_autocast", {}).get("enabled", False))
        compute = 2 if precision != "fp32" and not autocast else 4
        if stage == 0 and compute == 2:
            raise UserError(
                f"dsvae plan: stage 0 with {precision} weights is not planned for: use "
                f"torch_autocast, as zero0.json does"
            )
        if stage > 0 and autocast:
            raise UserError(
                "dsvae plan: torch_autocast is planned for at stage 0 only: use bf16, as the "
                "other shipped files do"
            )
        in_float32 = resolved.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        accumulate = 4 if in_float32 else compute
        places = _place(zero.offload_optimizer), _place(zero.offload_param)
        kind = {0: "plain", 3: "zero3"}.get(stage, "zero12")
        if stage == 1 and precision == "bf16" and accumulate == 4 and places[0] == "gpu":
            kind = "bf16"
        return cls(kind, zero, precision, compute, accumulate, autocast, *places)


def _place(offload: Any) -> str:
    """Returns where an offload section of a ds_config puts its states."""
    device = "none" if offload is None else str(getattr(offload.device, "value", offload.device))
    return "gpu" if device == "none" else device


@dataclass(frozen=True)
class Ranks:
    """How many processes there are."""

    world: int
    per_node: int


@dataclass
class Estimate:
    """Bytes on one GPU, in the memory of one node for all its ranks, and on its
    disk."""

    gpu: dict[str, int]
    """What stays from step to step, by name."""
    moments: dict[str, int]
    """Peak of each moment, what stays included."""
    host: dict[str, int]
    """What stays from step to step on a node, all ranks together."""
    host_moments: dict[str, int]
    """Peaks of a node."""
    disk: int
    """Bytes per node."""

    @property
    def gpu_peak(self) -> int:
        """The largest moment."""
        return max(self.moments.values())

    @property
    def host_peak(self) -> int:
        """The largest moment of a node."""
        return max(self.host_moments.values())


@dataclass(frozen=True)
class _Counts:
    """Elements of a model's weights, and of one rank's part of them."""

    total: int
    trained: int
    part: int
    """Of the trained weights."""
    frozen_part: int
    largest: int
    largest_trained: int
    small: int
    """Of weights that ZeRO-3 never shards."""

    @classmethod
    def of(cls, weights: list[Weight], engine: Engine, world: int) -> _Counts:
        total = sum(w.numel for w in weights)
        trained = sum(w.numel for w in weights if w.trains)
        threshold = engine.zero.param_persistence_threshold
        return cls(
            total,
            trained,
            math.ceil(trained / world),
            math.ceil((total - trained) / world),
            max(w.numel for w in weights),
            max((w.numel for w in weights if w.trains), default=0),
            sum(w.numel for w in weights if w.numel <= threshold),
        )


def estimate(
    engine: Engine,
    weights: list[Weight],
    run: DryRun,
    ranks: Ranks,
    *,
    accumulates: bool,
    frozen_encoder: int = 0,
) -> Estimate:
    """Returns the peaks of a phase.

    Args:
        accumulates: whether a step has several micro-batches: then gradients lie beside
            the activations of the next one.
        frozen_encoder: elements of the encoder that z is aligned with; 0: it is not.
    """
    n = _Counts.of(weights, engine, ranks.world)
    # A single rank's part is the whole weight, and lies in the memory that computes.
    alone = ranks.world == 1 and engine.parameters_on == "gpu"
    gathered = 0 if engine.kind != "zero3" or alone else _gathered(engine, n)
    gpu = _on_gpu(engine, n, alone)
    if frozen_encoder:
        gpu["frozen encoder"] = engine.compute * frozen_encoder
    always = sum(gpu.values())
    peak, gradients = _training(engine, n, run, ranks.world, gathered, accumulates)
    moments = {
        "forward and backward": always + peak,
        "optimizer step": always + gradients + _step_scratch(engine, n, ranks.world),
    }
    if run.evaluation:
        moments["evaluation"] = always + gathered + run.evaluation
    per_rank, disk = _on_host(engine, n, ranks.world, accumulates)
    host = {name: size * ranks.per_node for name, size in per_rank.items()}
    resident = sum(host.values())
    # Every rank has the whole model in float32, until the engine casts and moves it.
    building = 4 * n.total * ranks.per_node
    if engine.kind == "zero3":
        # Tensor by tensor through one buffer per rank; rank 0 also has in float32 what
        # it draws. The parts stay where they belong.
        each = engine.compute * n.largest + per_rank.get("weights", 0)
        building = each * ranks.per_node + 4 * n.largest
    host_moments = {
        "building the model": building,
        "training": resident,
        # Rank 0 fills one file after the other; a tensor larger than a file has its
        # own.
        "export": resident + min(4 * n.total, MAX_SHARD_BYTES + 4 * n.largest),
    }
    return Estimate(gpu, moments, host, host_moments, disk * ranks.per_node)


def _on_gpu(e: Engine, n: _Counts, alone: bool) -> dict[str, int]:
    """Returns what stays on a GPU from step to step."""
    c = e.compute
    if e.kind == "plain":
        return {"weights": 4 * n.total, "Adam moments": 8 * n.trained}
    if e.kind == "bf16":
        return {
            "weights": c * n.total,
            "float32 weights": 4 * n.part,
            "float32 gradients": 4 * n.trained,
            "Adam moments": 8 * n.part,
        }
    states = {"float32 weights": 4 * n.part, "Adam moments": 8 * n.part}
    if e.kind == "zero12":
        if e.optimizer_on != "gpu":
            states = {"copy buffer": c * n.largest_trained}
        return {"weights": c * n.total, **states}
    sizes = {}
    if e.parameters_on == "gpu":
        sizes["weights"] = c * (n.part + n.frozen_part)
    if e.optimizer_on == "gpu":
        sizes |= {**states, "gradients": e.accumulate * n.part}
    if not alone:
        sizes["small weights, whole"] = c * n.small
    if e.zero.contiguous_gradients:
        sizes["reduce bucket"] = c * _bucket(e, n)
    return sizes


def _on_host(e: Engine, n: _Counts, world: int, accumulates: bool) -> tuple[dict[str, int], int]:
    """Returns (in memory by name, on disk), of one rank."""
    c, disk = e.compute, 0
    sizes: dict[str, int] = {}
    if e.optimizer_on != "gpu":
        states = {
            "float32 weights": 4 * n.part,
            "float32 gradients": 4 * n.part,
            "Adam moments": 8 * n.part,
        }
        if e.optimizer_on == "nvme":
            disk += sum(states.values())
            offload = e.zero.offload_optimizer
            group = min(n.part, int(e.zero.sub_group_size))
            buffers = int(offload.buffer_count if offload else 4)
            sizes["optimizer swap buffers"] = 4 * group * buffers
        else:
            sizes |= states
        if e.kind == "zero3":
            sizes["gradients"] = e.accumulate * n.part
        else:
            sizes["copies of the weights"] = c * n.part
            sizes["gradient copy buffer"] = c * n.largest_trained
            if accumulates and not _adds_up_in_float32(e):
                sizes["gradients of earlier micro-batches"] = c * n.part
    if e.parameters_on == "cpu":
        sizes["weights"] = c * (n.part + n.frozen_part)
    elif e.parameters_on == "nvme":
        disk += c * (n.part + n.frozen_part)
        offload_param = e.zero.offload_param
        if offload_param is not None:
            # As `engine.nvme` sizes them if the ds_config does not.
            given = "buffer_size" in offload_param.model_fields_set
            size = int(offload_param.buffer_size) if given else math.ceil(n.largest / world)
            sizes["parameter swap buffers"] = c * int(offload_param.buffer_count) * size
    return sizes, disk


def _training(
    e: Engine, n: _Counts, run: DryRun, world: int, gathered: int, accumulates: bool
) -> tuple[int, int]:
    """Returns (peak of forward and backward, gradients that lie there when the
    optimizer steps), beside what always stays.

    The peak is the largest of three: before the first gradient, during the backward
    pass, and in the last reduction, when all activations are gone.
    """
    c = e.compute
    if e.kind in ("plain", "bf16"):
        # Every rank keeps all gradients, and all-reduces a flat copy of them.
        gradients = c * n.trained
        flat = c * min(n.trained, ALLREDUCE_ELEMENTS + n.largest_trained)
        if e.kind == "bf16":
            # The float32 gradients are laid end to end first, unless one group of AdamW
            # fills the buffer by itself.
            together = n.trained <= ALLREDUCE_ELEMENTS
            flat = (c + (4 if together else 0)) * n.trained
        backward = max(run.forward, run.backward) + gradients if accumulates else run.with_gradients
        return max(backward, gradients + flat), gradients
    reduced = min(n.trained, max(int(e.zero.reduce_bucket_size), n.largest_trained))
    if e.kind == "zero3":
        share = math.ceil(reduced / world)
        # a flat copy of the bucket, and this rank's share of it in both dtypes
        scratch = c * (reduced + share) + (e.accumulate * share if e.accumulate != c else 0)
        return gathered + max(run.forward, run.backward, scratch), 0
    buckets = 0
    if e.zero.contiguous_gradients or e.optimizer_on != "gpu":
        buckets = c * _bucket(e, n) * (2 if e.zero.overlap_comm else 1)
    # The rank's part of the gradients, which a reduction leaves.
    gradients = c * n.part if e.optimizer_on == "gpu" else 0
    if _adds_up_in_float32(e):
        gradients = 4 * n.part
    before, after = gradients if accumulates else 0, gradients + buckets
    last = after + c * reduced
    return max(run.forward + before, run.backward + after, last), gradients


def _bucket(e: Engine, n: _Counts) -> int:
    """Returns the elements of a reduce bucket, as `ds_config.fit_bucket` sets them."""
    return min(int(e.zero.reduce_bucket_size), n.trained)


def _gathered(e: Engine, n: _Counts) -> int:
    """Returns the bytes of the weights that ZeRO-3, which fetches ahead, gathers at
    most."""
    return e.compute * min(n.total - n.small, max(int(e.zero.max_live_parameters), n.largest))


def _step_scratch(e: Engine, n: _Counts, world: int) -> int:
    """Returns what the optimizer step allocates for a moment; AdamW itself is fused."""
    if e.optimizer_on != "gpu" or e.kind in ("plain", "bf16"):
        return 0
    # The norm is taken of one gradient at a time, in float64. Then a group's gradients
    # are laid end to end in float32, unless they lie so already.
    whole = n.largest_trained
    norm = 8 * (math.ceil(whole / world) if e.kind == "zero3" else min(n.part, whole))
    if e.kind == "zero12" and _adds_up_in_float32(e):
        return norm
    return max(norm, 4 * min(n.part, int(e.zero.sub_group_size)))


def _adds_up_in_float32(e: Engine) -> bool:
    """Returns whether ZeRO-2 adds gradients up in one float32 buffer of the rank's
    part."""
    return e.accumulate == 4 and e.compute == 2
