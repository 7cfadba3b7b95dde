"""The output directory of a run: its settings, its state and its newest numbers.

It is only read, without a lock, since the run may still be live.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsvae import config as configuration
from dsvae import status
from dsvae.config import RESUMABLE, RunConfig, flatten, to_tree
from dsvae.data.sources import source_of
from dsvae.errors import UserError
from dsvae.metrics import catalog
from dsvae.modeling.settings import unread
from dsvae.run_directory import RunDirectory

# Settings that do not affect what a run learns. ds_config is a path, whose content is
# compared instead.
_NO_SETTINGS = {*RESUMABLE, "ds_config"} - {"phase"}


@dataclass
class RunSummary:
    """One output directory."""

    directory: Path
    name: str
    """The directory's name, with as much of its path as distinguishes the runs."""
    state: str = "failed to read"
    """As of `RunDirectory.state`, or failed to read."""
    config: RunConfig | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value of the settings that affect the outcome, with the content of
    ds_config.json under `ds_config.`. Fields that the run does not use, such as those of
    a phase that it leaves out, are missing."""
    split: Literal["test", "valid"] | None = None
    """What the metrics were measured on: `test` is final, `valid` the newest validation;
    None: there are no metrics."""
    step: int | None = None
    """The step of the validation, on the run's one axis of optimizer steps."""
    phase: int | None = None
    """The phase that the metrics belong to."""
    latent: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    """Every finite number of the evaluation, standard errors as `se.NAME`. A model
    without a latent has none that describe one."""
    tokenizer: str | None = None
    """A hash of the run's tokenizer; None if there is none to read."""
    warnings: list[str] = field(default_factory=list)
    """The warnings of the evaluation, one line each."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, one line each."""

    @property
    def paths(self) -> RunDirectory:
        """The files in the directory."""
        return RunDirectory(self.directory)

    def source(self) -> str | None:
        """Returns what decides the sentences of `split` besides the text files, if
        anything."""
        if self.config is None:
            return None
        return source_of(self.config.data).distinguishes(str(self.split), self.config.seed)


def find_runs(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Finds the output directories that a command line names, each once, and the words
    that name files instead.

    A directory that is not a run stands for the runs one level down. An earlier
    comparison, which `runs/*` also names, is left out.

    Raises:
        UserError: a directory does not exist or contains no run.
    """
    directories: list[Path] = []
    files = []
    for word in words:
        path = Path(word).expanduser()
        if not path.exists():
            raise UserError(f"{word}: no such directory; give output directories of runs")
        if not path.is_dir():
            files.append(word)
        elif _is_run(path):
            directories.append(path)
        elif not (path / "comparison.csv").is_file():
            try:
                inside = [child for child in path.iterdir() if _is_run(child)]
            except OSError as error:
                raise UserError(
                    f"{word}: {error.strerror}; give directories that can be read"
                ) from None
            if not inside:
                raise UserError(
                    f"nothing in {word} is a run (no config.yaml in it or one level down): give "
                    "output directories"
                )
            directories += sorted(inside, key=_natural)
    if not directories:
        raise UserError(
            f"{', '.join(words[:3]) or 'nothing'}: no directories of runs; give the output "
            "directories themselves"
        )
    once: dict[Path, Path] = {}
    for path in directories:
        once.setdefault(path.resolve(), path)
    return list(once.values()), files


def _is_run(path: Path) -> bool:
    return path.is_dir() and RunDirectory(path).is_claimed()


def _natural(path: Path) -> str:
    """Returns a sort key that puts run2 before run10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), path.name)


def read_runs(directories: Sequence[Path]) -> list[RunSummary]:
    """Reads the runs in the directories; `RunSummary.problems` lists what cannot be
    read."""
    whole = [Path(os.path.abspath(directory)) for directory in directories]
    common = os.path.commonpath([path.parent for path in whole])
    return [
        _read(directory, os.path.relpath(path, common))
        for directory, path in zip(directories, whole, strict=True)
    ]


def _read(directory: Path, name: str) -> RunSummary:
    run = RunSummary(directory, name)
    _read_settings(run)
    run.tokenizer = _tokenizer(run.paths.tokenizer)
    valid = _newest_validation(run)
    final = _read_json(run, run.paths.metrics, _final)
    if final is not None:
        run.state, run.split, run.phase = "finished", "test", 2
        _take(run, final)
        if (found := _read_json(run, run.paths.samples, _samples)) is not None:
            run.metrics |= found
        return run
    if not run.paths.metrics.exists():  # else it cannot be read
        run.state = run.paths.state()
    if valid is not None:
        run.split, run.step, run.phase = "valid", valid["step"], valid["phase"]
        _take(run, valid)
    said = status.read(run.paths.status)
    if said is not None and said.reason is not None:
        run.problems.append(f"exit code {said.exit_code}: {said.reason}")
    return run


def _read_settings(run: RunSummary) -> None:
    path = run.paths.config
    if not path.exists():
        run.problems += ["no config.yaml in it"] * run.paths.metrics_jsonl.exists()
        return
    try:
        run.config = configuration.load(path)
    except (UserError, OSError) as error:
        run.problems.append(_describe_error(error, path))
        return
    unused = _unused(run.config)
    run.settings = {
        name: value
        for name, value in flatten(to_tree(run.config)).items()
        if name not in _NO_SETTINGS and value != {} and not name.startswith(unused)
    }
    ds_config = _read_json(run, run.paths.ds_config, lambda tree: flatten(tree, "ds_config."))
    run.settings |= ds_config or {}


def _unused(config: RunConfig) -> tuple[str, ...]:
    """Returns prefixes of the names of the fields that a run does not use."""
    sections = {1: "phase1.", 2: "phase2.", 3: "prior."}
    names = [name for phase, name in sections.items() if phase not in config.phases]
    names += source_of(config.data).unused
    if not config.model.has_latent:
        names += ["model.latent_dim", "model.pooling"]
        names += ["phase2.beta.", "phase2.free_bits", "phase2.release"]
    names += [f"model.{name}" for name in unread(config.model)]
    return tuple(names)


def _newest_validation(run: RunSummary) -> dict[str, Any] | None:
    """Returns the last row of metrics.jsonl that evaluates validation text."""
    path = run.paths.metrics_jsonl
    valid, damaged = None, []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    valid = row if row["split"] == "valid" else valid
                except (ValueError, KeyError, TypeError):
                    # The run may be writing a line without an end, or was killed in it.
                    damaged += [number] if line.strip() and line.endswith(b"\n") else []
    except FileNotFoundError:
        pass
    except OSError as error:
        run.problems.append(_describe_error(error, path))
    if damaged:
        run.problems.append(
            f"{path.name}: {len(damaged)} line(s) cannot be read; the first is line {damaged[0]}"
        )
    return valid


def _read_json(
    run: RunSummary, path: Path, take: Callable[[Any], dict[str, Any]]
) -> dict[str, Any] | None:
    """Returns what `take` finds in a file; None if there is none or it cannot be
    read."""
    if not path.exists():
        return None
    try:
        return take(json.loads(path.read_bytes()))
    except (OSError, ValueError, AttributeError) as error:
        run.problems.append(_describe_error(error, path))
        return None


def _final(content: Any) -> dict[str, Any]:
    """Returns the final evaluation in a metrics.json."""
    final = content.get("test") if isinstance(content, dict) else None
    if not isinstance(final, dict) or "rec" not in final:
        raise ValueError("no final evaluation in it")
    return final


def _samples(content: Any) -> dict[str, float]:
    """Returns the numbers of a run's samples in a samples.json."""
    rows = flatten(content["rows"]["samples"])
    found = {
        f"se.samples.{name.removeprefix('se.')}" if name.startswith("se.") else f"samples.{name}": x
        for name, x in rows.items()
    }
    return {name: value for name, value in found.items() if _is_number(value)}


def _take(run: RunSummary, evaluation: dict[str, Any]) -> None:
    """Stores the numbers and warnings of an evaluation in the run."""
    run.latent = evaluation.get("kl_per_dim") != [] and evaluation.get("latent_dim") != 0
    metrics = {name: value for name, value in flatten(evaluation).items() if _is_number(value)}
    metrics |= catalog.differences(metrics)
    run.metrics = {
        name: value
        for name, value in metrics.items()
        if name not in ("step", "phase")
        and (run.latent or not catalog.entry(name.removeprefix("se.")).latent)
    }
    warnings = evaluation.get("warnings", [])
    run.warnings = [str(line) for line in warnings] if isinstance(warnings, list) else []


def _tokenizer(directory: Path) -> str | None:
    """Returns a hash of the pieces and rules of a tokenizer, whatever the layout of its
    file."""
    try:
        if (directory / "tokenizer.json").is_file():
            rules = json.loads((directory / "tokenizer.json").read_bytes())
            # These belong to the file and to the last call, not to the tokenizer.
            for name in ("version", "truncation", "padding"):
                rules.pop(name, None)
            content = json.dumps(rules, sort_keys=True).encode()
        else:  # ByT5 has no vocabulary
            content = (directory / "tokenizer_config.json").read_bytes()
    except (OSError, ValueError, AttributeError):
        return None
    return hashlib.sha256(content).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _describe_error(error: Exception, path: Path) -> str:
    """Returns one line about a file that cannot be read."""
    if isinstance(error, UserError):
        return str(error)
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
    return f"{path.name} cannot be read: {reason}"
