"""Where a run begins: afresh, at a checkpoint, between the phases, or nowhere because
it is finished; and what its beginning leaves for the next start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsvae import config as configuration
from dsvae.config import RunConfig
from dsvae.data.sources import source_of
from dsvae.engine import checkpoint, reshape_checkpoint
from dsvae.engine.checkpoint import Checkpoint
from dsvae.errors import UserError
from dsvae.files import whole_directory, write_json, write_text
from dsvae.phases import Phase
from dsvae.run_directory import RunDirectory


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    phases: list[int]
    """The phases still to run, in order; empty: the run is finished."""
    checkpoint: Checkpoint | None = None
    """Where the first of them continues; None: at its beginning."""
    weights: Path | None = None
    """The weights that the first of them starts from; None: the model of the
    configuration."""
    tokenizer: Path | None = None
    """The tokenizer of the run that continues; None: that of the configuration."""
    steps_before: int = 0
    """Optimizer steps of the phases that come or came before the first of them."""

    def phase(self, number: int, config: RunConfig) -> Phase:
        """Returns phase `number` of the run, with its place on the axis of steps."""
        earlier = (Phase(each, config, 0).steps for each in self.phases if each < number)
        return Phase(number, config, self.steps_before + sum(earlier))

    def resumed(self, phase: Phase) -> Checkpoint | None:
        """Returns the checkpoint from which a phase continues."""
        here = self.checkpoint is not None and self.checkpoint.phase == phase.number
        return self.checkpoint if here else None


def find_start(
    config: RunConfig,
    report: Callable[[str], Any],
    sentences: Callable[[], dict[str, Any]] | None = None,
) -> Start:
    """Returns where the run of `config` begins.

    Args:
        report: gets a line for every damaged checkpoint.
        sentences: `data_of(config)`, for callers that need it too; it is called only
            if there is a run to compare with.

    Raises:
        UserError: `resume` is never and the directory holds a run; its run had another
            configuration or other sentences; another phase of it is not finished; or
            the directory to resume from has nothing to continue.
    """
    own = RunDirectory(config.output_dir)
    reshape_checkpoint.clean(own.checkpoints)
    # A requeued job repeats its whole command: `--resume DIR` counts until this
    # directory has something to continue from.
    begun = checkpoint.find(own.checkpoints) or _between(own) or own.is_finished(config.phase)
    named = config.resume not in ("auto", "never") and Path(config.resume) != own.path
    elsewhere = named and not begun
    source = RunDirectory(config.resume) if elsewhere else own
    if config.resume == "never" and own.config.exists():
        raise UserError(
            f"output_dir {own.path} holds a run: continue it (--resume auto) or choose another "
            f"--output_dir"
        )
    if config.resume == "never" or not source.config.is_file():
        if elsewhere:
            raise UserError(f"--resume {source.path}: no run there (no config.yaml)")
        return _start(config)
    for run in (source, own) if elsewhere else (own,):
        if run.config.is_file():
            _compare(run, config, mine=run is own)
    if not elsewhere and own.is_finished(config.phase):
        return Start([])
    _compare_data(source, sentences or (lambda: data_of(config)))
    return _continue(config, source, elsewhere, report)


def _continue(
    config: RunConfig, source: RunDirectory, elsewhere: bool, report: Callable[[str], Any]
) -> Start:
    """Returns the start of a run that continues what lies in `source`."""
    between = _between(source)
    tokenizer = source.tokenizer if source.tokenizer.is_dir() else None
    newest = checkpoint.newest_sound(source.checkpoints, report)
    continued = newest if newest is not None and newest.phase not in between else None
    first = continued.phase if continued else max(between, default=0) + 1
    if first in config.phases and (continued or between):
        phases = [phase for phase in config.phases if phase >= first]
        before = sum(Phase(each, config, 0).steps for each in between if each < first)
        return _start(config, phases, continued, between.get(first - 1), tokenizer, before)
    if elsewhere:
        raise UserError(f"--resume {source.path}: no complete checkpoint in it")
    if newest is not None:
        # Another phase's checkpoints would be removed once this one has its first.
        raise UserError(
            f"{source.path} holds a run in phase {newest.phase} (step {newest.step}): finish it "
            f"(--phase {newest.phase} or all), or choose another --output_dir"
        )
    return _start(config, tokenizer=tokenizer)


def _between(run: RunDirectory) -> dict[int, Path]:
    """Returns the weights that the phases of a run have left for the next one, by the
    number of the phase."""
    models = {1: run.phase1_model, 2: run.phase2_model}
    return {phase: model for phase, model in models.items() if model.is_dir()}


def _start(
    config: RunConfig,
    phases: list[int] | None = None,
    newest: Checkpoint | None = None,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    before: int = 0,
) -> Start:
    """Returns a start. `before` are the steps of the phases before it, if they ran in its
    directory."""
    phases = phases or config.phases
    if phases[0] == 3 and weights is None and config.model.name is None:
        raise UserError("phase prior is for a finished model: name it with --model RUN/model")
    if newest is not None:
        before = newest.meta.get("steps_before", before)
    return Start(phases, newest, weights, tokenizer, before)


def _compare(run: RunDirectory, config: RunConfig, mine: bool) -> None:
    """Raises UserError if the run in a directory had another configuration."""
    if changed := configuration.difference(configuration.load(run.config), config):
        advice = "give the same values"
        if mine:
            advice = "choose another --output_dir, or the same values"
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{run.path} holds a run with other values: {'; '.join(changed[:3])}{more}: {advice}"
        )


def _compare_data(run: RunDirectory, sentences: Callable[[], dict[str, Any]]) -> None:
    """Raises UserError if the run in a directory began with other sentences."""
    if not run.data.is_file():
        return
    old, new = json.loads(run.data.read_text(encoding="utf-8")), sentences()
    if old != new:
        before, now = old.get("files", {}), new.get("files", {})
        changed = sorted(entry[0] for split, entry in now.items() if before.get(split) != entry)
        files = f": {', '.join(changed)}" if changed else ""
        raise UserError(
            f"{run.path} holds a run on other sentences{files}: restore the files, or choose "
            "another --output_dir"
        )


def data_of(config: RunConfig) -> dict[str, Any]:
    """Returns what tells the sentences of a run from others; reads the files, or raises
    UserError."""
    return source_of(config.data).identity(config.seed)


def write_down(
    config: RunConfig,
    ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    sentences: dict[str, Any],
) -> None:
    """Puts into the output directory what a later start compares and needs."""
    run = RunDirectory(config.output_dir)
    write_json(run.ds_config, ds_config)
    write_json(run.data, sentences)
    if not run.tokenizer.is_dir():
        with whole_directory(run.tokenizer) as temporary:
            tokenizer.save_pretrained(temporary)
    # a copy: the configuration stays the same on all ranks
    written = dataclasses.replace(config, ds_config=str(run.ds_config))
    write_text(run.config, configuration.to_yaml(written))
