"""The plan: every shipped DeepSpeed configuration in the order of its expected speed,
what it needs, and the first that fits."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsvae import config as configuration
from dsvae.config import RunConfig
from dsvae.engine import ds_config
from dsvae.engine.build import Annotations, latent_fields, new_vae
from dsvae.errors import UserError, first_line
from dsvae.modeling.t5_vae import T5VAEConfig, read_config
from dsvae.planning import memory
from dsvae.planning.dry_run import DryRun, Weight, build, dry_run, weights_of
from dsvae.planning.sizes import configuration_of

RESIDENT = ("zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload", "zero3_nvme")
GPU_BASE = 1_500_000_000
"""Bytes of a GPU for the CUDA context, libraries and communication buffers: a usual
figure, not a measured one."""
CPUS_PER_GPU = 8
"""Processors for each rank of a job, as slurm/lib.sh asks for too: without a number,
SLURM gives one, and data and offloaded optimizers would wait for it."""
HOST_BASE = 3_000_000_000
"""Bytes of host memory of a process for Python, torch with CUDA and DeepSpeed: a usual
figure, not a measured one."""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpus: int
    gpu_memory: int
    """Bytes of one GPU."""
    gpus_per_node: int
    host_memory: int
    """Bytes of a node."""
    margin: float
    """Share of a GPU and of a node that is to stay free."""

    @property
    def ranks(self) -> memory.Ranks:
        return memory.Ranks(self.gpus, min(self.gpus, self.gpus_per_node))

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)


@dataclass
class Option:
    """One way to run, and what it needs."""

    ds_config: str
    gradient_checkpointing: bool
    estimate: memory.Estimate
    gpu: int
    """Bytes of a GPU at the peak, the process's own included."""
    host: int
    """Bytes of a node at the peak, the processes' own included."""

    def fits(self, machine: Machine) -> bool:
        """Returns whether it leaves the margin."""
        keep = 1 - machine.margin
        return self.gpu <= keep * machine.gpu_memory and self.host <= keep * machine.host_memory


@dataclass
class Plan:
    """All options in their order, and the first that fits."""

    config: RunConfig
    machine: Machine
    arguments: list[str]
    """Of dsvae/train.py, without --ds_config and gradient checkpointing."""
    parameters: int
    trained: int
    rows: int
    tokens: int
    micro_batches: int
    options: list[Option]
    chosen: Option | None

    def command(self, option: Option) -> str:
        """Returns the command that runs an option, as a shell takes it."""
        words = ["--ds_config", option.ds_config, *self.arguments]
        if option.gradient_checkpointing:
            words += ["--model.gradient_checkpointing", "true"]
        if self.machine.nodes > 1:
            each = self.machine.gpus_per_node  # one process per GPU
            start = ["sbatch", f"--nodes={self.machine.nodes}", f"--ntasks-per-node={each}"]
            start += [f"--gpus-per-node={each}", f"--cpus-per-task={CPUS_PER_GPU}"]
            start += ["slurm/train.sbatch"]
        else:
            start = ["dsvae", "train", "--num_gpus", str(self.machine.gpus)]
        return shlex.join([*start, *words])


def make_plan(
    arguments: list[str], machine: Machine, ds_config_file: str | None, checkpointing: bool | None
) -> Plan:
    """Plans a run of dsvae/train.py with `arguments`.

    Args:
        ds_config_file: the only DeepSpeed configuration; None: all shipped ones.
        checkpointing: gradient checkpointing or not; None: both, without it first.
    """
    files = [ds_config_file] if ds_config_file else [*RESIDENT, *OFFLOADED]
    config = configuration.read(["--ds_config", files[0], *arguments])
    if config.phase == "prior":
        raise UserError(
            "phase prior is not counted: it takes less than phase 2 of the same model; plan for "
            "--phase 2"
        )
    configuration.choose_micro_batches(config, "cuda")
    data = config.data
    if data.batch_size < machine.gpus:  # the run refuses it, too
        raise UserError(
            f"data.batch_size {data.batch_size} is less than --gpus {machine.gpus}: every GPU "
            f"needs a sentence per step; plan for fewer GPUs, or with --batch_size {machine.gpus} "
            f"or more"
        )
    vae = _model_of(config)
    freeze = config.phase == "1" and config.phase1.freeze_decoder
    weights = weights_of(build(vae, freeze))
    per_gpu = math.ceil(data.batch_size / machine.gpus)
    # The longest sentences decide: as many tokens as others, and attention grows
    # with their length. The encoder reads a condition and its sentence at once.
    longest = data.max_tokens * (2 if vae.conditional else 1)
    rows = min(per_gpu, max(1, data.micro_batch_tokens // longest))
    micro_batches = math.ceil(per_gpu / rows)
    options = []
    for file, checkpoint in _order(files, checkpointing, config.model.gradient_checkpointing):
        engine = _engine(file, config, micro_batches, machine.gpus)
        run = _dry_run(
            vae.to_json_string(),
            rows=rows,
            tokens=data.max_tokens,
            evaluation_rows=max(1, config.eval.batch_tokens // longest),
            precision=engine.precision,
            autocast=engine.autocast,
            gradient_checkpointing=checkpoint,
            freeze_decoder=freeze,
        )
        needs = memory.estimate(
            engine,
            weights,
            run,
            machine.ranks,
            accumulates=micro_batches > 1,
            frozen_encoder=frozen_encoder_of(vae, weights),
        )
        host = needs.host_peak + HOST_BASE * machine.ranks.per_node
        options.append(Option(file, checkpoint, needs, needs.gpu_peak + GPU_BASE, host))
    return Plan(
        config,
        machine,
        arguments,
        sum(w.numel for w in weights),
        sum(w.numel for w in weights if w.trains),
        rows,
        data.max_tokens,
        micro_batches,
        options,
        next((option for option in options if option.fits(machine)), None),
    )


def _order(files: list[str], wanted: bool | None, configured: bool) -> Iterator[tuple[str, bool]]:
    """Yields the fastest first: states on the GPU before offloaded ones, which wait for
    the bus. There, recomputing costs a third of a step, so every stage comes without
    gradient checkpointing before any comes with it."""
    choices = [wanted] if wanted is not None else [True] if configured else [False, True]
    offloaded = [file for file in files if Path(file).stem in OFFLOADED]
    resident = [file for file in files if Path(file).stem not in OFFLOADED]
    for some in (resident, *([file] for file in offloaded)):
        for checkpoint in choices:
            yield from ((file, checkpoint) for file in some)


def _engine(file: str, config: RunConfig, micro_batches: int, gpus: int) -> memory.Engine:
    """Returns the engine of a ds_config file, as the run itself would resolve it."""
    resolved = ds_config.resolve(
        ds_config.load(file),
        phase=config.phase1 if config.phase == "1" else config.phase2,
        precision=config.precision,
        batch_size=config.data.batch_size,
        micro_batches=micro_batches,
        world_size=gpus,
        bf16_supported=True,
        fp16_supported=True,
    )
    return memory.Engine.of(resolved)


@cache  # options share dry runs, and the advice asks for plans that differ in the machine alone
def _dry_run(vae: str, *, precision: str, autocast: bool, **settings: Any) -> DryRun:
    low = torch.float16 if precision == "fp16" else torch.bfloat16
    return dry_run(
        T5VAEConfig.from_dict(json.loads(vae)),
        dtype=torch.float32 if autocast or precision == "fp32" else low,
        autocast=low if autocast else None,
        fused_attention=True,
        **settings,
    )


def _model_of(config: RunConfig) -> T5VAEConfig:
    """Returns the T5VAE of a run."""
    settings = config.model
    columns = Annotations(config.conditional, align=config.heads.align_weight > 0)
    try:
        if settings.name is None:
            return new_vae(settings, columns, settings.vocab_size)
        t5 = configuration_of(settings.name) or read_config(settings.name)
        latent = latent_fields(settings, columns)
        vae = t5 if isinstance(t5, T5VAEConfig) else T5VAEConfig(t5=t5, **latent)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model {settings.name or 'model.t5'}: {first_line(error)}") from None
    if settings.dropout is not None:
        vae.t5.dropout_rate = settings.dropout
    return vae


def frozen_encoder_of(vae: T5VAEConfig, weights: list[Weight]) -> int:
    """Returns the elements of the encoder that z is aligned with; 0: it is not."""
    embedding = "encoder_embedding." if vae.backbone.own_embeddings else "shared."
    own = (w for w in weights if w.name.startswith(("encoder.", embedding)))
    return sum(w.numel for w in own) if vae.align else 0
