"""The output directory of a run: every path in it, and the claim that one run has on it.

The scripts in slurm/ write their logs and copies to `slurm` inside it. They ask this
module what a command line means, so that they and train.py cannot disagree:

    python -m dsvae.run_directory output_dir TRAIN_ARGS...
        The directory that train.py would write to.
    python -m dsvae.run_directory arguments COPIES DS_CONFIG TRAIN_ARGS...
        The same arguments, with the files of --config and --ds_config replaced by
        copies in COPIES, and with --output_dir and --ds_config DS_CONFIG if neither
        they nor their configuration name one. Each half is left out if its word is
        empty.
    python -m dsvae.run_directory member LIST INDEX TRAIN_ARGS...
        The arguments of the run in line INDEX of a sweep's list, counted from 1.
    python -m dsvae.run_directory members LIST TRAIN_ARGS...
        The output directories of all runs of a list.
    python -m dsvae.run_directory begun LIST TRAIN_ARGS...
        Those of them that a run has claimed. The others are named on stderr.
    python -m dsvae.run_directory state TRAIN_ARGS...
        `finished` if train.py has nothing left to do; otherwise how far the run is.

Answers end in NUL, one each. This module imports nothing heavy: an answer takes about
0.1 s.
"""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from dsvae import config as configuration
from dsvae import status
from dsvae.config import RECIPES, RunConfig
from dsvae.errors import EXIT_USER_ERROR, UserError

_TRIES = 10
"""Attempts to lock a directory, since whoever asks for its state has the lock for a
moment."""


class RunDirectory:
    """The paths in the output directory of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        """The whole configuration, written when the run begins."""
        self.ds_config = self.path / "ds_config.json"
        """The DeepSpeed configuration as the user gave it."""
        self.data = self.path / "data.json"
        """What tells the sentences of the run from others."""
        self.tokenizer = self.path / "tokenizer"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.plot = self.path / "run.png"
        """A picture of the whole run."""
        self.trackers = self.path / "trackers.json"
        """The names of the run's records at the trackers of `report_to`."""
        self.checkpoints = self.path / "checkpoints"
        """The checkpoints of the running phase (`dsvae.engine.checkpoint`)."""
        self.phase1_model = self.path / "phase1" / "model"
        """The weights between phase 1 and 2."""
        self.phase2_model = self.path / "phase2" / "model"
        """The weights between phase 2 and `prior`, if one run has both."""
        self.evaluation = self.path / ".evaluation"
        """Results of a final evaluation that has not ended (`dsvae.inference.kept`)."""
        self.model = self.path / "model"
        """The exported model."""
        self.samples = self.model / "evaluation" / "samples.json"
        """What `dsvae evaluate_samples` found, if it was run on the model."""
        self.metrics = self.path / "metrics.json"
        """The final evaluation. It is written last."""
        self.status = self.path / "status.json"
        """What the run says of itself (`dsvae.status`)."""
        self.exports = self.path / "exports"
        """Models of checkpoints, from `dsvae export`."""
        self.lock = self.path / ".lock"

    def resolved_ds_config(self, phase: int) -> Path:
        """Returns the path of the DeepSpeed configuration of a phase with every value
        filled in."""
        return self.path / f"ds_config.phase{phase}.json"

    def non_finite(self, phase: int, step: int) -> Path:
        """Returns the path of the batch after which a run stopped because nothing
        finite came out."""
        return self.path / f"non_finite.phase{phase}-step{step:08d}.jsonl"

    def claim(self) -> TextIO:
        """Makes the directory, checks that it can be written to, and locks it for this
        process until the returned file is closed. Raises UserError if a live run has
        it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"dsvae")
                probe.flush()
            lock = self.lock.open("a")
        except OSError as error:
            raise UserError(
                f"output_dir {self.path}: {error.strerror}; choose another --output_dir"
            ) from None
        for _ in range(_TRIES):
            if _lock(lock, fcntl.LOCK_EX):
                return lock
            time.sleep(0.1)
        lock.close()
        said = status.read(self.status)
        place = f" (process {said.pid} on {said.host})" if said else ""
        raise UserError(
            f"output_dir {self.path} belongs to a run that is still alive{place}; choose another "
            f"--output_dir"
        )

    def state(self) -> str:
        """Returns how far the run is, in words: finished, finished (phase 1 only), not
        started, or `phase 2 at step 3 of 9 (killed)`; in the brackets running, killed,
        stopped or failed. A run of an older dsvae is finished, unfinished or not started.
        """
        said = status.read(self.status)
        if said is None:
            begun = self.config.is_file() or self.metrics_jsonl.is_file()
            unfinished = "unfinished" if begun else "not started"
            return "finished" if self.metrics.is_file() else unfinished
        if said.state == "finished":
            return "finished" if said.phase != 1 else "finished (phase 1 only)"
        live = said.state != "running" or said.is_recent or self._is_locked()
        return f"{said.progress} ({said.state if live else 'killed'})"

    def _is_locked(self) -> bool:
        try:
            with self.lock.open("rb") as lock:
                return not _lock(lock, fcntl.LOCK_SH)
        except OSError:
            return False

    def is_claimed(self) -> bool:
        """Tells whether a run has ever begun here; one that wrote nothing has left its
        lock."""
        return any(file.is_file() for file in (self.config, self.metrics_jsonl, self.lock))

    def is_finished(self, phase: str) -> bool:
        """Tells whether all is there that a run of `phase` leaves at its end."""
        if phase == "1":
            return self.phase1_model.is_dir()
        if not (self.metrics.is_file() and self.model.is_dir()):
            return False
        return 3 not in configuration.PHASES[phase] or self.has_prior

    @property
    def has_prior(self) -> bool:
        """Whether the exported model has a prior by flow matching."""
        path = self.model / "config.json"
        return path.is_file() and bool(json.loads(path.read_bytes()).get("denoiser"))


def _lock(file: IO[Any], kind: int) -> bool:
    """Locks a file until it is closed; returns False if another process has a lock on
    it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def settings_of(words: Sequence[str]) -> RunConfig:
    """Reads the configuration of a command line, right in `output_dir` and `ds_config`;
    train.py judges the other flags. Raises UserError as `parse_flags` and `load_tree`."""
    given = configuration.parse_flags(words)
    asked = ("config", "ds_config", "output_dir")
    settings = configuration.merge({name: given[name] for name in asked if name in given})
    if not settings.output_dir.strip():
        raise UserError("output_dir is empty: name a directory")
    return settings


def arguments(copies: str, ds_config: str, *words: str) -> list[str]:
    """Returns `words` as a job uses them; see the head of this module."""
    settings_of(words)  # refuses what train.py cannot parse
    complete = list(words)
    for index, word in enumerate(words if copies else ()):
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name in ("config", "ds_config"):
            if equals:
                complete[index] = f"{flag}={_copy(value, Path(copies, name))}"
            else:
                complete[index + 1] = _copy(words[index + 1], Path(copies, name))
    if ds_config:
        settings = settings_of(complete)
        if "output_dir" not in configuration.parse_flags(complete):
            complete += ["--output_dir", settings.output_dir]
        if settings.ds_config is None:
            complete += ["--ds_config", ds_config]
    return complete


def _copy(file: str, directory: Path) -> str:
    """Copies a file into `directory`, unless its copy is there; returns the copy, or
    the word itself if it names no file."""
    copy = directory / Path(file).name
    if not copy.is_file():
        if (RECIPES / f"{file}.yaml").is_file() or not Path(file).is_file():
            return file
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        except OSError as error:
            raise UserError(f"cannot copy {file} to {copy}: {error.strerror}") from None
    return str(copy)


def member(list_file: str, index: str, *common: str) -> list[str]:
    """Returns the arguments of one run of a sweep, with an output_dir if none is
    named."""
    lines = _lines(list_file)
    if not (index.isdigit() and 1 <= int(index) <= len(lines)):
        raise UserError(f"{list_file} has {len(lines)} runs; there is no run {index}")
    where = f"{list_file}, run {index}"
    try:
        words = shlex.split(lines[int(index) - 1])
        given = configuration.parse_flags([*common, *words])
    except ValueError as error:
        raise UserError(f"{where}: its quotes do not match ({error})") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if "output_dir" in given:
        return [*common, *words]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(words).replace("--", ""))[:120]
    return [*common, *words, "--output_dir", f"runs/{Path(list_file).stem}/{name}"]


def members(list_file: str, *common: str) -> list[str]:
    """Returns the output directories of all runs of a sweep, in the order of its
    list."""
    runs = [member(list_file, str(index), *common) for index, _ in enumerate(_lines(list_file), 1)]
    places = [settings_of(words).output_dir for words in runs]
    if len(set(places)) < len(places):
        raise UserError(f"two runs of {list_file} write to the same output_dir")
    return places


def begun(list_file: str, *common: str) -> list[str]:
    """Returns the output directories of the runs of a sweep that have begun."""
    claimed = {each: RunDirectory(each).is_claimed() for each in members(list_file, *common)}
    for place in claimed:
        if not claimed[place]:
            print(f"never began: {place}", file=sys.stderr)
    return [place for place in claimed if claimed[place]]


def state(*words: str) -> list[str]:
    """Returns `finished` if train.py has nothing left to do; otherwise the state of the
    directory."""
    run = RunDirectory(settings_of(words).output_dir)
    try:
        config = configuration.merge(configuration.parse_flags(words))
        same = not configuration.difference(configuration.load(run.config), config)
        if run.is_finished(config.phase) and same:
            return ["finished"]
    except (UserError, OSError):
        pass  # train.py says what is wrong
    found = run.state()
    return ["finished with other values" if found == "finished" else found]


def _lines(list_file: str) -> list[str]:
    """Returns the lines of a sweep's list that are runs."""
    try:
        text = Path(list_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"list of runs {list_file}: {reason}") from None
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
    if not lines:
        raise UserError(f"{list_file} has no line with a run")
    return lines


COMMANDS: dict[str, Callable[..., list[str]]] = {
    "output_dir": lambda *words: [settings_of(words).output_dir],
    "arguments": arguments,
    "member": member,
    "members": members,
    "begun": begun,
    "state": state,
}


def main(words: Sequence[str]) -> int:
    """Answers a script; returns the exit code."""
    try:
        answer = COMMANDS[words[0]](*words[1:])
    except UserError as error:
        print(f"dsvae: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    sys.stdout.write("".join(f"{each}\0" for each in answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
