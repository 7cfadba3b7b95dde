"""The model of a checkpoint as a plain transformers directory, in one process. The run
may be training, cut or finished."""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, get_optim_files
from safetensors.torch import load_file
from torch import Tensor

from dsvae import config as configuration
from dsvae import private_names
from dsvae.config import RunConfig
from dsvae.data.tokenization import load_tokenizer
from dsvae.engine import checkpoint
from dsvae.engine.build import Annotations, find_origin
from dsvae.engine.checkpoint import AVERAGES, COMPLETE, Checkpoint
from dsvae.engine.model_directory import MAX_SHARD_BYTES, ModelDirectory
from dsvae.engine.weights import freeze_autoencoder, freeze_decoder, freeze_pretrained
from dsvae.errors import UserError
from dsvae.files import make_place, no_output, write_json
from dsvae.modeling.lora import in_peft, is_adapter, merged, peft_config
from dsvae.modeling.t5_vae import LATENT_PATH, T5VAE
from dsvae.modeling.weight_source import Origin
from dsvae.reports.card import write_checkpoint_card
from dsvae.run_directory import RunDirectory


def export_checkpoint(
    output_dir: str | Path,
    which: str,
    output: str | Path | None,
    report: Callable[[str], Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    adapters: bool = False,
) -> Path:
    """Writes the model of a checkpoint, and returns its directory. The run is only read,
    and may still train.

    Weights are float32: trained ones are the optimizer's copies, frozen ones those that
    the run began with.

    Args:
        output_dir: of the run.
        which: latest (the newest undamaged one), best (of the last phase, on validation
            text), or the name of a checkpoint.
        output: the directory; None: `exports/NAME_OF_THE_CHECKPOINT` in the run.
        report: gets a line for every damaged checkpoint that is skipped.
        adapters: write only the adapters and the latent path, as files of the package peft.

    Raises:
        UserError: no run or no such checkpoint; one that is damaged or was removed
            meanwhile; an output that exists or cannot be written to; a DeepSpeed or
            transformers that does not fit.
    """
    private_names.check()
    run = RunDirectory(Path(output_dir).expanduser())
    config = _read_config(run)
    found = _find(run, which, report)
    directory = run.exports / found.directory.name if output is None else Path(output).expanduser()
    if adapters and (not config.model.lora.rank or found.phase == 3):
        raise UserError(f"{run.path} has no adapters (model.lora.rank): leave out --adapters")
    make_place(directory)
    names: list[str] = []

    def extras(target: Path) -> None:
        if adapters:
            (target / "model.safetensors").rename(target / "adapter_model.safetensors")
            described = peft_config(names, model.config.lora, str(config.model.name))
            write_json(target / "adapter_config.json", described)
        shutil.copytree(run.tokenizer, target, dirs_exist_ok=True)
        write_checkpoint_card(
            target / "README.md",
            config,
            model.config,
            found.phase,
            found.step,
            meta.get("valid"),
        )

    with _still_there(found):
        meta = found.meta
        saved = _saved(found, meta)  # open files stay readable, whatever the run removes
    if found.phase == 3:
        saved |= {f"denoiser.{name}": value for name, value in _averages(found).items()}
    between = {2: run.phase1_model, 3: run.phase2_model}.get(found.phase)
    began = between if between is not None and between.is_dir() else None
    heads = meta.get("classes", ()), meta.get("tags", ()), config.heads.align_weight > 0
    columns = Annotations(config.conditional, *heads)
    tokenizer = load_tokenizer(str(run.tokenizer))
    denoiser = meta.get("denoiser")
    origin = find_origin(config.model, tokenizer, began, config.seed, columns, denoiser)
    model = cast(T5VAE, origin.skeleton())
    model.config.max_tokens = config.data.max_tokens  # as the run itself exports it
    model.config.vector_counts = meta.get("vector_counts", [])
    freeze_pretrained(model)
    if denoiser is not None:
        freeze_autoencoder(model)
        model.denoiser.set_normalizer(meta["normalizer"])
    if found.phase == 1 and config.phase1.freeze_decoder:
        freeze_decoder(model)
    # peft reads one file
    writer = ModelDirectory(directory.absolute(), sys.maxsize if adapters else max_shard_bytes)
    try:
        writer.begin()
        weights = _weights(found, saved, model, origin)
        lora = None if adapters else model.config.lora
        for name, tensor in merged(weights, lora) if lora else weights:
            if not adapters:
                writer.add(name, cast(Tensor, tensor))
            elif is_adapter(name) or name.startswith(LATENT_PATH):
                names.append(name)
                writer.add(in_peft(name), cast(Tensor, tensor))
        writer.finish(model, extras)
    except OSError as error:
        advice = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"{directory} cannot be written ({error}): {advice}choose another --output"
        ) from error
    finally:
        writer.abandon()
    return directory


def _read_config(run: RunDirectory) -> RunConfig:
    path = run.config
    if not path.is_file():
        parents = run.path.absolute().parents[:2]
        above = next((p for p in parents if RunDirectory(p).config.is_file()), None)
        hint = f"did you mean {above}?" if above else "give the output_dir of a run"
        raise UserError(f"{run.path} is not the directory of a run (no config.yaml); {hint}")
    return configuration.load(path)


def _find(run: RunDirectory, which: str, report: Callable[[str], Any]) -> Checkpoint:
    """Finds the checkpoint of that name, complete and sound."""
    complete = checkpoint.find(run.checkpoints)
    names = ", ".join(each.directory.name for each in complete)
    if not complete:
        raise UserError(
            f"{run.path} has no complete checkpoint yet; a run saves one every "
            f"--checkpoint_every steps"
        )
    if which == "latest":
        with _still_there(*complete):
            newest = checkpoint.newest_sound(run.checkpoints, report)
        if newest is None:
            raise UserError(f"{run.path}: every checkpoint is damaged: {names}")
        return newest
    if which == "best":
        with _still_there(*complete):
            found = checkpoint.best_of(complete)
        if found is None:
            raise UserError(
                f"{run.path}: no checkpoint of phase {complete[-1].phase} was measured on "
                f"validation text ({names}): name one, or make --checkpoint_every a multiple of "
                f"--eval_every"
            )
    else:
        found = next((each for each in complete if each.directory.name == which), None)
        if found is None:
            raise UserError(
                f"--checkpoint {which}: no such checkpoint in {run.path}; choose latest, best, or "
                f"one of {names}"
            )
    with _still_there(found):
        if problem := checkpoint.damage(found):
            if not (found.directory / COMPLETE).exists():
                raise FileNotFoundError(found.directory)
            raise UserError(
                f"checkpoint {found.directory} is damaged ({problem}): choose another of {names}"
            )
    return found


@contextlib.contextmanager
def _still_there(*read: Checkpoint) -> Iterator[None]:
    """Explains the errors that follow when the run removes a checkpoint meanwhile."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        gone = [each.directory for each in read if not (each.directory / COMPLETE).exists()]
        if not gone:
            raise
        raise UserError(
            f"{gone[0]} was removed meanwhile, because its run keeps newer checkpoints "
            f"(--keep_checkpoints): try again"
        ) from error


def _averages(found: Checkpoint) -> dict[str, Tensor]:
    """Returns the averaged weights of the denoiser."""
    with _still_there(found):
        return load_file(found.directory / AVERAGES)


def _saved(found: Checkpoint, meta: dict[str, Any]) -> dict[str, Any]:
    """Returns every weight of a checkpoint by name: trained ones in float32, frozen
    ones in the engine's dtype. A value becomes a tensor by `.contiguous()`, one at a
    time."""
    if meta["zero_stage"] == 0:
        return dict(_load(found.directory / "mp_rank_00_model_states.pt")["module"])
    if meta["zero_stage"] == 3:
        with no_output():
            return get_fp32_state_dict_from_zero_checkpoint(
                str(found.directory.parent), tag=found.directory.name, lazy_mode=True
            )
    # DeepSpeed's tool cannot read a checkpoint of ZeRO 1 in bf16, and holds all weights in
    # memory at once.
    common = _load(found.directory / "mp_rank_00_model_states.pt")
    files = get_optim_files(str(found.directory))
    ranks = [_load(Path(file))["optimizer_state_dict"] for file in files]
    weights = dict(common["module"])
    paddings = ranks[0].get("param_alignment_paddings")
    for number, shapes in enumerate(common["param_shapes"]):
        parts = [rank["single_partition_of_fp32_groups"][number] for rank in ranks]
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            weights[name] = _Spread(parts, offset, torch.Size(shape))
            offset += weights[name].shape.numel() + (paddings[number][index] if paddings else 0)
    return weights


def _load(path: Path) -> dict[str, Any]:
    """Loads a file of a checkpoint. Its tensors take no memory until they are read."""
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return loaded


@dataclass(frozen=True)
class _Spread:
    """A tensor that begins at `offset` of the concatenated vectors of all ranks."""

    parts: list[Tensor]
    offset: int
    shape: torch.Size

    def contiguous(self) -> Tensor:
        begin, end, position, pieces = self.offset, self.offset + self.shape.numel(), 0, []
        for part in self.parts:
            pieces.append(part[max(begin - position, 0) : max(end - position, 0)])
            position += len(part)
        return torch.cat(pieces).view(self.shape)


def _weights(
    found: Checkpoint, saved: dict[str, Any], model: T5VAE, origin: Origin
) -> Iterator[tuple[str, Tensor]]:
    """Returns every parameter of `model` (on the meta device) whole, in float32, one at
    a time; `origin` has the weights that the phase began with."""
    for name, parameter in model.named_parameters():
        if name not in saved or saved[name].shape != parameter.shape:
            has = f"has the shape {tuple(saved[name].shape)}" if name in saved else "is missing"
            raise UserError(
                f"{found.directory} does not fit the model of its run's config.yaml: {name} {has}"
            )
        value = saved[name].contiguous()
        if not parameter.requires_grad:
            # The engine may have rounded it; the original is exact.
            original = origin.tensor(name)
            if not torch.equal(original.to(value.dtype), value):
                raise UserError(
                    f"{found.directory}: {name} is frozen, and differs from that of the model of "
                    f"its run's config.yaml: the model has changed since the run began; put it "
                    f"back"
                )
            value = original
        yield name, value.to(torch.float32, copy=True)
