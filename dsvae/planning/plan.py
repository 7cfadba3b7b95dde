"""The plan: every shipped DeepSpeed configuration in the order of its expected speed,
what it needs, and the first that fits."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsvae import config as configuration
from dsvae.config import RunConfig
from dsvae.engine import ds_config
from dsvae.engine.build import LATENT_FIELDS
from dsvae.errors import UserError
from dsvae.modeling.t5_vae import T5VAEConfig, read_config
from dsvae.planning import memory
from dsvae.planning.dry_run import DryRun, Weight, build, dry_run, weights_of
from dsvae.planning.sizes import KNOWN, configuration_of

SHIPPED = Path(__file__).parents[2] / "ds_configs"
RESIDENT = ("zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload", "zero3_nvme")
GPU_BASE = 1_500_000_000
"""Bytes of a GPU for the CUDA context, libraries and communication buffers: a usual
figure, not a measured one."""
HOST_BASE = 3_000_000_000
"""Bytes of host memory of a process for Python, torch with CUDA and DeepSpeed: a usual
figure, not a measured one."""
DEFAULT_RECIPE = "park2021"
"""Recipe of the run for a model given by name: it has no model of its own that would
stand against it."""
MOST_BYTES = 10**18
"""More is a slip of the pen, and the largest would be infinite."""
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class Machine:
    """Where the run is to be."""

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
        """Whether it leaves the margin."""
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
        """The command that runs an option, as a shell takes it."""
        words = ["--ds_config", option.ds_config, *self.arguments]
        if option.gradient_checkpointing:
            words += ["--model.gradient_checkpointing", "true"]
        if self.machine.nodes > 1:
            each = self.machine.gpus_per_node  # one process a GPU
            start = [
                f"--nodes={self.machine.nodes}",
                f"--ntasks-per-node={each}",
                f"--gpus-per-node={each}",
            ]
            return shlex.join(["sbatch", *start, "slurm/train.sbatch", *words])
        return shlex.join(
            ["deepspeed", "--num_gpus", str(self.machine.gpus), "dsvae/train.py", *words]
        )


def bytes_of(text: str, flag: str) -> int:
    """`40GB` (10^9), `80GiB` (2^30), `512MB`, or plain bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?b?)", text.strip().lower())
    try:
        if match is None or match[2] not in UNITS:
            raise ValueError
        size = float(match[1]) * UNITS[match[2]]
    except ValueError:
        raise UserError(
            f"{flag} is {text!r}: give bytes with a unit, for example 40GB or 80GiB"
        ) from None
    if size < 1:
        raise UserError(f"{flag} must be more than nothing")
    if size > MOST_BYTES:  # without the text, which can be long
        raise UserError(
            f"{flag} is more than {MOST_BYTES // 10**12:,} TB: give bytes with a unit, for "
            f"example 40GB or 80GiB"
        )
    return int(size)


def run_arguments(model: str, config: str | None, flags: dict[str, Any]) -> list[str]:
    """The arguments of dsvae/train.py for a model's name or directory, or for a recipe
    or a YAML file that says which model."""
    words: list[str] = []
    if configuration_of(model) is not None or (Path(model) / "config.json").is_file():
        name = (
            model
            if (Path(model) / "config.json").is_file()
            else next(n for n in _names(model) if n in KNOWN)
        )
        words += ["--config", config or DEFAULT_RECIPE, "--model", name]
    elif (
        Path(model).suffix in (".yaml", ".yml")
        or (configuration.RECIPES / f"{model}.yaml").is_file()
    ):
        if config is not None:
            raise UserError(f"{model} and --config {config} are two configurations: give one")
        words += ["--config", model]
    else:
        near = _nearest_model(model)
        raise UserError(
            f"{model!r} is no public T5 that is known offline, no directory with a config.json, "
            f"no recipe and no YAML file{near}"
        )
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def make_plan(
    arguments: list[str],
    machine: Machine,
    *,
    ds_config_file: str | None,
    checkpointing: bool | None,
) -> Plan:
    """Plans a run.

    Args:
        arguments: of dsvae/train.py, from `run_arguments`.
        ds_config_file: this DeepSpeed configuration alone, not the shipped ones.
        checkpointing: with gradient checkpointing, without it, or None: without it
            first.
    """
    files = [Path(ds_config_file)] if ds_config_file else _shipped()
    config = configuration.read(["--ds_config", str(files[0]), *arguments])
    if config.data.batch_size < machine.gpus:  # the run refuses it, too
        raise UserError(
            f"data.batch_size {config.data.batch_size} is less than --gpus {machine.gpus}: every "
            f"GPU needs a sentence a step; "
            f"plan for fewer GPUs, or with --batch_size {machine.gpus} or more"
        )
    subject = _Subject(config, machine)
    options = []
    for path, checkpoint in _order(files, checkpointing, config.model.gradient_checkpointing):
        options.append(subject.option(path, checkpoint))
    chosen = next((option for option in options if option.fits(machine)), None)
    return Plan(
        config,
        machine,
        arguments,
        subject.parameters,
        subject.trained,
        subject.rows,
        config.data.max_tokens,
        subject.micro_batches,
        options,
        chosen,
    )


def _order(files: list[Path], wanted: bool | None, configured: bool) -> Iterator[tuple[Path, bool]]:
    """Fastest first: states on the GPU before offloaded ones, which wait for the bus;
    there, recomputing costs a third of a step, so every stage comes without gradient
    checkpointing before any comes with it."""
    choices = [wanted] if wanted is not None else [True] if configured else [False, True]
    offloaded = [path for path in files if path.stem in OFFLOADED]
    resident = [path for path in files if path.stem not in OFFLOADED]
    for some in (resident, *([path] for path in offloaded)):
        for checkpoint in choices:
            yield from ((path, checkpoint) for path in some)


class _Subject:
    """The model and the data of a run, dry-run once for each way to compute."""

    def __init__(self, config: RunConfig, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.freeze = config.phase == "1" and config.phase1.freeze_decoder
        self.vae = _model_of(config)
        self.weights: list[Weight] = weights_of(build(self.vae), self.freeze)
        self.parameters = sum(w.numel for w in self.weights)
        self.trained = sum(w.numel for w in self.weights if w.trains)
        data = config.data
        mine = math.ceil(data.batch_size / machine.gpus)
        # The longest sentences need the most: as many tokens as others, and attention
        # grows with their length.
        self.rows = min(mine, max(1, data.micro_batch_tokens // data.max_tokens))
        self.micro_batches = math.ceil(mine / self.rows)
        self.evaluation_rows = max(1, config.eval.batch_tokens // data.max_tokens)

    def option(self, path: Path, checkpoint: bool) -> Option:
        phase = self.config.phase1 if self.config.phase == "1" else self.config.phase2
        resolved = ds_config.resolve(
            ds_config.load(path),
            phase=phase,
            precision=self.config.precision,
            batch_size=self.config.data.batch_size,
            micro_batches=self.micro_batches,
            world_size=self.machine.gpus,
            bf16_supported=True,
            fp16_supported=True,
        )
        engine = memory.Engine.of(resolved)
        found = memory.estimate(
            engine,
            self.weights,
            self._run(engine, checkpoint),
            self.machine.ranks,
            accumulates=self.micro_batches > 1,
        )
        shown = str(path.relative_to(SHIPPED.parent)) if path.is_relative_to(SHIPPED) else str(path)
        host = found.host_peak + HOST_BASE * self.machine.ranks.per_node
        return Option(shown, checkpoint, found, found.gpu_peak + GPU_BASE, host)

    def _run(self, engine: memory.Engine, checkpoint: bool) -> DryRun:
        low = torch.float16 if engine.precision == "fp16" else torch.bfloat16
        key = (
            self.vae.to_json_string(),
            self.rows,
            self.evaluation_rows,
            self.config.data.max_tokens,
            engine.compute,
            engine.autocast,
            low,
            checkpoint,
            self.freeze,
        )
        if key not in _RUNS:
            _RUNS[key] = dry_run(
                self.vae,
                rows=self.rows,
                tokens=self.config.data.max_tokens,
                evaluation_rows=self.evaluation_rows,
                dtype=torch.float32 if engine.compute == 4 else low,
                autocast=low if engine.autocast else None,
                gradient_checkpointing=checkpoint,
                freeze_decoder=self.freeze,
                fused_attention=True,
            )
        return _RUNS[key]


_RUNS: dict[tuple, DryRun] = {}
"""Dry runs of this process: the advice asks for many plans that differ in the machine
alone."""


def _model_of(config: RunConfig) -> T5VAEConfig:
    """The T5VAE of a run."""
    settings = config.model
    latent = {name: getattr(settings, name) for name in LATENT_FIELDS}
    try:
        if settings.name is None:
            t5: Any = {
                "model_type": "t5",
                "decoder_start_token_id": 0,
                **settings.t5,
                "vocab_size": settings.vocab_size,
            }
        elif (t5 := configuration_of(settings.name)) is None:
            t5 = read_config(settings.name)
        vae = t5 if isinstance(t5, T5VAEConfig) else T5VAEConfig(t5=t5, **latent)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"model {settings.name or 'model.t5'}: {str(error).splitlines()[0]}"
        ) from None
    if settings.dropout is not None:
        vae.t5.dropout_rate = settings.dropout
    return vae


def _shipped() -> list[Path]:
    files = [SHIPPED / f"{name}.json" for name in (*RESIDENT, *OFFLOADED)]
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(
            f"{missing[0]} is not there (an installation without the repository): give "
            f"--ds_config FILE"
        )
    return files


def _names(model: str) -> tuple[str, ...]:
    return (model, f"google-t5/{model}", f"google/{model}")


def _nearest_model(model: str) -> str:
    import difflib

    short = {name.split("/")[-1]: name for name in KNOWN}
    close = difflib.get_close_matches(model.split("/")[-1], short, n=1, cutoff=0.5)
    return f"; did you mean {short[close[0]]}?" if close else ""
