"""The output directory of a run: claimed by one run at a time, and where in it a run
goes on."""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dsvae import config as configuration
from dsvae.config import RunConfig
from dsvae.data.corpora import fingerprint
from dsvae.engine import checkpoint, reshape_checkpoint
from dsvae.engine.checkpoint import Checkpoint
from dsvae.errors import UserError

DATA = "data.json"
"""The file in an output directory that says which sentences the run began with."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    phases: list[int]
    """The phases still to run, in order; empty: the run is finished."""
    checkpoint: Checkpoint | None = None
    """What the first of them goes on from; None: from its beginning."""
    weights: Path | None = None
    """Weights that the first of them starts from; None: the model of the
    configuration."""
    tokenizer: Path | None = None
    """The tokenizer of the run that goes on; None: that of the configuration."""


def claim(directory: Path) -> TextIO:
    """Makes the directory, makes sure that it can be written to, and locks it for this
    process until the file is closed.

    Raises:
        UserError: not a directory, not writable, or a live run has it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"dsvae")
            probe.flush()
        lock = (directory / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"output_dir {directory}: {error.strerror}; give another --output_dir"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(
            f"output_dir {directory} belongs to a run that is still alive; give another "
            f"--output_dir"
        ) from None
    return lock


def find_start(
    config: RunConfig,
    report: Callable[[str], Any],
    sentences: Callable[[], dict[str, Any]] | None = None,
) -> Start:
    """Where the run of `config` begins: afresh, at a checkpoint, between the phases, or
    nowhere because it is finished.

    Args:
        report: gets a line for every damaged checkpoint.
        sentences: `data_of(config)`, where the caller needs it too; it is asked for
            where a run is there.

    Raises:
        UserError: `resume` never and a run lies there; auto and it was another
            configuration; a directory without anything to resume from; other sentences
            than it began with; or another phase of it is not finished.
    """
    own = Path(config.output_dir)
    reshape_checkpoint.clean(own / "checkpoints")
    wanted = [1, 2] if config.phase == "all" else [int(config.phase)]
    # A requeued job repeats its whole command: `--resume DIR` counts until this
    # directory has something of its own to go on from.
    begun = (
        bool(checkpoint.find(own / "checkpoints"))
        or (own / "phase1" / "model").is_dir()
        or is_finished(own, config.phase)
    )
    source = own if config.resume in ("auto", "never") or begun else Path(config.resume)
    if config.resume == "never":
        if (own / "config.yaml").exists():
            raise UserError(
                f"output_dir {own} holds a run: go on with it (--resume auto) or give another "
                f"--output_dir"
            )
        return Start(wanted)
    if not (source / "config.yaml").is_file():
        if source != own:
            raise UserError(f"--resume {source}: no run there (no config.yaml)")
        return Start(wanted)
    for directory in dict.fromkeys((source, own)):
        if (directory / "config.yaml").is_file():
            _compare(directory, config, mine=directory == own)
    if source == own and is_finished(own, config.phase):
        return Start([])
    _compare_data(source, sentences or (lambda: data_of(config)))
    between = source / "phase1" / "model"
    tokenizer = source / "tokenizer" if (source / "tokenizer").is_dir() else None
    newest = checkpoint.newest_sound(source / "checkpoints", report)
    if (
        newest is not None
        and newest.phase in wanted
        and not (newest.phase == 1 and between.is_dir())
    ):
        weights = between if newest.phase == 2 and between.is_dir() else None
        return Start(
            [phase for phase in wanted if phase >= newest.phase], newest, weights, tokenizer
        )
    if between.is_dir() and 2 in wanted:
        return Start([2], None, between, tokenizer)
    if newest is not None and source == own:
        # Another phase's checkpoints would go as soon as this one has its own.
        raise UserError(
            f"{own} holds a run in phase {newest.phase} (step {newest.step}): finish it (--phase "
            f"{newest.phase} or all), or give "
            "another --output_dir"
        )
    if source != own:
        raise UserError(f"--resume {source}: no complete checkpoint in it")
    return Start(wanted, tokenizer=tokenizer)


def _compare(directory: Path, config: RunConfig, mine: bool) -> None:
    """Raises UserError where the run in a directory was another configuration's."""
    previous = directory / "config.yaml"
    old = configuration.build(configuration.load_tree(str(previous)), where=str(previous))
    if changed := configuration.difference(old, config):
        advice = "give another --output_dir, or the same values" if mine else "give the same values"
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{directory} holds a run with other values: {'; '.join(changed[:3])}{more}: {advice}"
        )


def _compare_data(directory: Path, sentences: Callable[[], dict[str, Any]]) -> None:
    """Raises UserError where the sentences are no longer those that the run in a
    directory began with."""
    path = directory / DATA
    if not path.is_file():
        return
    old, new = json.loads(path.read_text(encoding="utf-8")), sentences()
    if old != new:
        before, now = old.get("files", {}), new.get("files", {})
        changed = sorted(entry[0] for split, entry in now.items() if before.get(split) != entry)
        raise UserError(
            f"{directory} holds a run on other "
            f"sentences{': ' if changed else ''}{', '.join(changed)}: put them back as they "
            "were, or give another --output_dir"
        )


def data_of(config: RunConfig) -> dict[str, Any]:
    """What tells the sentences of a run from others, as it is kept in `DATA`. Reads the
    files.

    Raises:
        UserError: they cannot be read.
    """
    found: dict[str, Any] = json.loads(json.dumps(fingerprint(config.data, config.seed)))
    return found


def is_finished(directory: Path, phase: str) -> bool:
    """Whether everything that a run leaves at its end is there."""
    if phase == "1":
        return (directory / "phase1" / "model").is_dir()
    return (directory / "metrics.json").is_file() and (directory / "model").is_dir()
