"""What an engine holds beside the dry run: weights, gradients, optimizer states and
buffers, by ZeRO stage and moment.

Read off DeepSpeed 0.19's sources and checked against live tensors of real runs
(docs/plan.md). P: trained weights, F: frozen ones, N = P + F, W: ranks, S: a rank's
part of P, c: bytes of a weight as the engine computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dsvae.engine import ds_config
from dsvae.engine.weights import MAX_SHARD_BYTES
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
    """c, bytes of a weight."""
    accumulate: int
    """Bytes of a gradient where it is kept until the step."""
    autocast: bool
    optimizer_on: str
    """gpu, cpu or nvme."""
    parameters_on: str
    immediate: bool
    """Whether bf16 gradients go at once (bf16.immediate_grad_update)."""

    @classmethod
    def of(cls, resolved: dict[str, Any]) -> Engine:
        """Raises UserError for a combination that is not planned for."""
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
        accumulate = (
            4
            if resolved.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
            else compute
        )
        places = {}
        for name in ("optimizer", "param"):
            offload = getattr(zero, f"offload_{name}")
            device = (
                "none" if offload is None else str(getattr(offload.device, "value", offload.device))
            )
            places[name] = {"none": "gpu"}.get(device, device)
        kind = {0: "plain", 3: "zero3"}.get(stage, "zero12")
        if stage == 1 and precision == "bf16" and accumulate == 4 and places["optimizer"] == "gpu":
            kind = "bf16"
        immediate = bool(resolved.get("bf16", {}).get("immediate_grad_update", False))
        return cls(
            kind,
            zero,
            precision,
            compute,
            accumulate,
            autocast,
            places["optimizer"],
            places["param"],
            immediate,
        )


@dataclass(frozen=True)
class Ranks:
    """How many processes there are."""

    world: int
    per_node: int


@dataclass
class Estimate:
    """Bytes of tensors on one GPU, in the memory of one node for all its ranks, and on
    its disk."""

    gpu: dict[str, int]
    """What is always there, by name."""
    moments: dict[str, int]
    """Peak of each moment, what is always there included."""
    host: dict[str, int]
    """What is always there on a node, all ranks together."""
    host_moments: dict[str, int]
    """Peaks of a node."""
    disk: int
    """Bytes a node."""

    @property
    def gpu_peak(self) -> int:
        """The largest moment."""
        return max(self.moments.values())

    @property
    def host_peak(self) -> int:
        """The largest moment of a node."""
        return max(self.host_moments.values())


def groups_of(weights: Iterable[Weight]) -> list[list[int]]:
    """Elements of the trained weights in AdamW's groups, in their order; an empty group
    is none."""
    trained = [w for w in weights if w.trains]
    groups = [[w.numel for w in trained if w.decays], [w.numel for w in trained if not w.decays]]
    return [group for group in groups if group]


def estimate(
    engine: Engine, weights: list[Weight], run: DryRun, ranks: Ranks, *, accumulates: bool
) -> Estimate:
    """The peaks of a phase.

    Args:
        accumulates: whether a step has several micro-batches: then gradients lie beside
            the activations of the next.
    """
    states = _States(engine, weights, ranks)
    static, backward = states.static(), _Backward(engine, weights, states, accumulates)
    moments = {}
    always = sum(static.values())
    peak, held = backward.walk(run)
    moments["forward and backward"] = always + peak
    moments["optimizer step"] = always + held + run.kept + states.step_scratch()
    if run.evaluation:
        moments["evaluation"] = always + run.evaluation + backward.gathered
    host, disk = states.host(accumulates)
    everywhere = {name: size * ranks.per_node for name, size in host.items()}
    resident = sum(everywhere.values())
    largest = max(w.numel for w in weights)
    if engine.kind == "zero3":
        # Tensor by tensor through one buffer a rank; rank 0 also has in float32 what it
        # draws. The parts stay where they belong.
        building = (
            engine.compute * largest + host.get("weights", 0)
        ) * ranks.per_node + 4 * largest
    else:
        # Every rank has the whole model in float32, until the engine casts it and moves
        # it to its GPU.
        building = 4 * states.total * ranks.per_node
    host_moments = {
        "building the model": building,
        "training": resident,
        # Rank 0 fills one file after the other; a tensor larger than a file has its
        # own.
        "export": resident + min(4 * states.total, MAX_SHARD_BYTES + 4 * largest),
    }
    return Estimate(static, moments, everywhere, host_moments, disk * ranks.per_node)


class _States:
    """Sizes of what lives from step to step."""

    def __init__(self, engine: Engine, weights: list[Weight], ranks: Ranks) -> None:
        self.engine, self.world = engine, ranks.world
        self.groups = groups_of(weights)
        self.trained = sum(map(sum, self.groups))
        self.total = sum(w.numel for w in weights)
        self.frozen = self.total - self.trained
        self.widest = max(w.numel for w in weights)
        self.largest = max((n for group in self.groups for n in group), default=0)
        if engine.kind == "zero3":
            self.parts = [sum(math.ceil(n / self.world) for n in group) for group in self.groups]
            self.frozen_part = sum(math.ceil(w.numel / self.world) for w in weights if not w.trains)
        else:
            align = 2 * self.world  # DeepSpeed's alignment of a group, in elements
            self.parts = [
                math.ceil(sum(group) / align) * align // self.world for group in self.groups
            ]
        self.part = sum(self.parts)
        self.persistent = [w.numel <= engine.zero.param_persistence_threshold for w in weights]
        self.persistent_numel = sum(
            w.numel for w, keep in zip(weights, self.persistent, strict=True) if keep
        )

    @property
    def alone(self) -> bool:
        """Whether ZeRO-3 gathers nothing: a single rank's part is the whole weight, and
        lies where it is computed with."""
        return self.world == 1 and self.engine.parameters_on == "gpu"

    @property
    def compact(self) -> bool:
        """Whether ZeRO-2 adds gradients up in one float32 buffer of the rank's part."""
        return self.engine.accumulate == 4 and self.engine.compute == 2

    def in_partition(self) -> int:
        """Elements of the parameters of which some rank's part has a piece, for the
        rank that has most: whole parameters."""
        most = 0
        for rank in range(self.world):
            held = 0
            for group, part in zip(self.groups, self.parts, strict=True):
                start = 0
                for n in group:
                    if start < (rank + 1) * part and start + n > rank * part:
                        held += n
                    start += n
            most = max(most, held)
        return most

    def static(self) -> dict[str, int]:
        e, c = self.engine, self.engine.compute
        if e.kind == "plain":
            return {"weights": 4 * self.total, "Adam moments": 8 * self.trained}
        if e.kind == "bf16":
            return {
                "weights": c * self.total,
                "float32 weights": 4 * self.part,
                "float32 gradients": 4 * self.trained,
                "Adam moments": 8 * self.part,
            }
        found = {}
        if e.kind == "zero12":
            found["weights"] = c * self.total
            if e.optimizer_on == "gpu":
                found |= {"float32 weights": 4 * self.part, "Adam moments": 8 * self.part}
            else:
                found["copy buffer"] = c * self.largest
            return found
        if e.parameters_on == "gpu":
            found["weights"] = c * (self.part + self.frozen_part)
        if e.optimizer_on == "gpu":
            found |= {
                "float32 weights": 4 * self.part,
                "gradients": e.accumulate * self.part,
                "Adam moments": 8 * self.part,
            }
        if not self.alone:
            found["small weights, whole"] = c * self.persistent_numel
        if e.zero.contiguous_gradients:
            found["reduce bucket"] = c * e.zero.reduce_bucket_size
        return found

    def host(self, accumulates: bool) -> tuple[dict[str, int], int]:
        """(in memory, on disk) of one rank."""
        e, c = self.engine, self.engine.compute
        found: dict[str, int] = {}
        disk = 0
        if e.optimizer_on != "gpu":
            states = {
                "float32 weights": 4 * self.part,
                "float32 gradients": 4 * self.part,
                "Adam moments": 8 * self.part,
            }
            if e.optimizer_on == "nvme":
                disk += sum(states.values())
                offload = e.zero.offload_optimizer
                subgroup = min(max(self.parts), int(e.zero.sub_group_size))
                found["optimizer swap buffers"] = (
                    4 * subgroup * int(offload.buffer_count if offload else 4)
                )
            else:
                found |= states
            if e.kind == "zero12":
                found |= {
                    "copies of the weights": c * self.part,
                    "gradient copy buffer": c * self.largest,
                }
                if accumulates and not self.compact:
                    found["gradients of earlier micro-batches"] = c * self.in_partition()
            else:
                found["gradients"] = e.accumulate * self.part
        if e.parameters_on == "cpu":
            found["weights"] = c * (self.part + self.frozen_part)
        elif e.parameters_on == "nvme":
            disk += c * (self.part + self.frozen_part)
            offload_param = e.zero.offload_param
            if offload_param is not None:
                # As `engine.nvme` sizes them where the ds_config does not.
                given = "buffer_size" in offload_param.model_fields_set
                size = (
                    int(offload_param.buffer_size) if given else math.ceil(self.widest / self.world)
                )
                found["parameter swap buffers"] = c * int(offload_param.buffer_count) * size
        return found, disk

    def step_scratch(self) -> int:
        """What the optimizer step allocates for a moment; AdamW itself is fused and
        needs nothing."""
        e = self.engine
        if e.optimizer_on != "gpu" or e.kind in ("plain", "bf16"):
            return 0
        # A group's gradients are laid end to end in float32 (ZeRO-2 with float32
        # accumulation has them so already); before that the norm is taken of one
        # gradient at a time, in float64.
        pieces = [
            min(n, part) for group, part in zip(self.groups, self.parts, strict=True) for n in group
        ]
        if e.kind == "zero3":
            pieces = [math.ceil(n / self.world) for group in self.groups for n in group]
        norm = 8 * max(pieces)
        if e.kind == "zero12" and self.compact:
            return norm
        return max(norm, 4 * min(max(self.parts), int(e.zero.sub_group_size)))


class _Backward:
    """Follows a dry run event by event, with what the engine adds to each."""

    def __init__(
        self, engine: Engine, weights: list[Weight], states: _States, accumulates: bool
    ) -> None:
        self.engine, self.weights, self.states, self.accumulates = (
            engine,
            weights,
            states,
            accumulates,
        )
        self.gathered = 0
        """Bytes of the most weights that ZeRO-3 has gathered at once."""

    def walk(self, run: DryRun) -> tuple[int, int]:
        """(peak, what lies there when the optimizer steps), bytes beside what is always
        there."""
        walk = {
            "plain": self._plain,
            "bf16": self._bf16,
            "zero12": self._zero12,
            "zero3": self._zero3,
        }
        return walk[self.engine.kind](run)

    def _plain(self, run: DryRun) -> tuple[int, int]:
        all_gradients = 4 * self.states.trained
        extra = all_gradients if self.accumulates else 0
        peak = 0
        for event in run.events:
            peak = max(peak, event.before + extra)
            if event.kind == "gradient" and not self.accumulates:
                extra += 4 * self._numel(event.weights)
        flat = 4 * min(self.states.trained, ALLREDUCE_ELEMENTS + self.states.largest)
        return max(peak, run.kept + all_gradients + flat), all_gradients

    def _bf16(self, run: DryRun) -> tuple[int, int]:
        c, trained = self.engine.compute, self.states.trained
        kept = 0 if self.engine.immediate else c * trained
        extra = kept if self.accumulates else 0
        peak = 0
        for event in run.events:
            peak = max(peak, event.before + extra)
            if event.kind == "gradient":
                n = self._numel(event.weights)
                if self.engine.immediate:
                    peak = max(peak, event.now + extra + 4 * n)
                elif not self.accumulates:
                    extra += c * n
        # The float32 gradients are there for good. The engine lays them end to end,
        # unless a group fills its buffer by itself, and all-reduces a copy in the
        # compute dtype.
        groups = [sum(group) for group in self.states.groups]
        together = len(groups) > 1 and groups[0] <= ALLREDUCE_ELEMENTS
        flat = (4 + c) * trained if together else c * max(groups)
        return max(peak, run.kept + kept + max(flat, 4 * self.states.largest)), kept

    def _zero12(self, run: DryRun) -> tuple[int, int]:
        e, states, c = self.engine, self.states, self.engine.compute
        bucket = int(e.zero.reduce_bucket_size)
        buffers = (
            c * bucket * (2 if e.zero.overlap_comm else 1)
            if e.zero.contiguous_gradients or e.optimizer_on != "gpu"
            else 0
        )
        # What a reduction leaves behind until the step: the rank's part in float32, or
        # its parameters' gradients whole.
        left = (
            4 * states.part
            if states.compact
            else 0
            if e.optimizer_on != "gpu"
            else c * states.in_partition()
        )
        peak = filled = oversized = 0
        extra = left if self.accumulates else 0
        started = reduced = False
        for event in run.events:
            peak = max(peak, event.before + extra)
            if event.kind not in ("gradient", "end"):
                continue
            n = self._numel(event.weights)
            if event.kind == "gradient" and not started:
                started, extra = True, extra + buffers
            if filled and (event.kind == "end" or filled + n > bucket):
                if not reduced:
                    # In whole parameters, gradients of the next micro-batch come beside
                    # those that are summed already.
                    reduced, extra = (
                        True,
                        extra + (left if not self.accumulates or not states.compact else 0),
                    )
                # the reduction works on a flat copy
                peak = max(peak, event.now + extra + c * filled)
                extra, filled, oversized = extra - oversized, 0, 0
            if event.kind == "gradient":
                filled += n
                if n > bucket:
                    oversized = c * n
                    extra += oversized
        return peak, left

    def _zero3(self, run: DryRun) -> tuple[int, int]:
        e, states, c, world = self.engine, self.states, self.engine.compute, self.states.world
        bucket = int(e.zero.reduce_bucket_size)
        gathered = _Gathered(
            e,
            self.weights,
            states.persistent,
            [event.weights for event in run.events if event.kind == "enter"],
        )
        whole = 0 if states.alone else c  # bytes of a gathered weight
        peak = filled = oversized = 0
        for event in run.events:
            peak = max(peak, event.before + whole * gathered.numel + oversized)
            if event.kind == "enter":
                gathered.enter(event.weights)
            elif event.kind == "leave":
                gathered.leave(event.weights)
            self.gathered = max(self.gathered, whole * gathered.numel)
            if event.kind not in ("gradient", "end"):
                continue
            n = self._numel(event.weights)
            if filled and (event.kind == "end" or filled + n > bucket):
                share = math.ceil(filled / world)
                scratch = (
                    c * filled + c * share + (e.accumulate * share if e.accumulate != c else 0)
                )
                peak = max(peak, event.now + whole * gathered.numel + oversized + scratch)
                filled = oversized = 0
            if event.kind == "gradient":
                filled += n
                if n > bucket:
                    oversized = c * n
        return peak, 0

    def _numel(self, places: tuple[int, ...]) -> int:
        return sum(self.weights[i].numel for i in places)


class _Gathered:
    """Which weights ZeRO-3 has gathered: fetched when a module begins, fetched ahead,
    kept where they are soon used again."""

    def __init__(
        self,
        engine: Engine,
        weights: list[Weight],
        persistent: list[bool],
        order: list[tuple[int, ...]],
    ) -> None:
        self.zero, self.sizes, self.persistent, self.order = (
            engine.zero,
            [w.numel for w in weights],
            persistent,
            order,
        )
        self.here: set[int] = set()
        self.numel = 0
        self.position = 0

    def enter(self, own: tuple[int, ...]) -> None:
        self._fetch(own)
        self.position += 1
        room = min(
            int(self.zero.max_live_parameters) - self.numel, int(self.zero.prefetch_bucket_size)
        )
        fetched = 0
        for upcoming in self.order[self.position :]:
            if fetched >= room:
                break
            before = self.numel
            self._fetch(upcoming)
            fetched += self.numel - before

    def leave(self, own: tuple[int, ...]) -> None:
        keep: set[int] = set()
        distance = 0
        for upcoming in self.order[self.position :]:
            if distance >= int(self.zero.max_reuse_distance):
                break
            keep.update(upcoming)
            distance += sum(self.sizes[i] for i in upcoming)
        for i in own:
            if i in self.here and i not in keep:
                self.here.discard(i)
                self.numel -= self.sizes[i]

    def _fetch(self, own: tuple[int, ...]) -> None:
        for i in own:
            if not self.persistent[i] and i not in self.here:
                self.here.add(i)
                self.numel += self.sizes[i]
