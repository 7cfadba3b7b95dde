"""What a run reports while it trains: console, metrics.jsonl, TensorBoard and the
trackers that `report_to` names.

Both phases share one axis of optimizer steps: phase 2 continues the count of phase 1.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from dsvae import status
from dsvae.config import RunConfig, flatten, phase_name, to_tree
from dsvae.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE
from dsvae.files import finite, whole_path, write_text
from dsvae.metrics import catalog
from dsvae.metrics.throughput import peak_flops
from dsvae.reports import trackers
from dsvae.reports.run_plot import run_plot
from dsvae.reports.table import result_rows
from dsvae.reports.trackers import Entry, Tracker
from dsvae.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEARTBEAT = 10.0
"""Seconds after which a step writes status.json again."""


class Reporter:
    """Writes to `output_dir` as rank 0; elsewhere every method does nothing."""

    def __init__(self, config: RunConfig, enabled: bool) -> None:
        self.enabled, self.config = enabled, config
        self.directory = RunDirectory(config.output_dir)
        self._bar: tqdm | None = None
        self._writer: SummaryWriter | None = None
        self._trackers: list[Tracker] = []
        self._step = 0
        """The last step that was reported."""
        self._sent = 0
        """The last step that an interrupted start has sent to the trackers."""
        self._jsonl: TextIO | None = None
        self._status: status.Status | None = None
        self._last_beat = 0.0
        self._kl_per_dim: list[tuple[int, list[float]]] = []
        """(step, KL per dimension in nats) of the validations so far."""

    def begin(self) -> None:
        """Starts status.json, once it is known that there is something to do, and says how
        the start before this one ended."""
        if not self.enabled:
            return
        if before := status.read(self.directory.status):
            word = "killed" if before.state == "running" else before.state
            self.say(f"the start before this one: {before.progress} ({word})")
        self._status = status.Status()
        self._write_status()

    def ended(self, code: int, reason: str) -> None:
        """Writes to status.json why the run ends before it is finished, and its exit
        code."""
        if self._status is not None:
            stopped = code in (EXIT_RESUMABLE, EXIT_INTERRUPTED)
            self._status.state = "stopped" if stopped else "failed"
            self._status.exit_code, self._status.reason = code, reason
            self._write_status()
        self._end_trackers(code)

    def saved(self, step: int) -> None:
        """Writes to status.json that the phase has a checkpoint of `step`."""
        if self._status is not None:
            self._status.saved = step
            self._write_status()

    def _write_status(self) -> None:
        if self._status is not None:
            self._status.write(self.directory.status)
            self._last_beat = time.monotonic()

    def open(self, first_step: int) -> None:
        """Starts writing at global step `first_step`. What an interrupted run wrote from
        there on is dropped, so that no step comes twice."""
        if not self.enabled:
            return
        path = self.directory.metrics_jsonl
        rows, self._sent = _truncate_jsonl(path, first_step)
        self._kl_per_dim = [
            (row["step"], row["kl_per_dim"])
            for row in rows
            if row["split"] == "valid" and "kl_per_dim" in row
        ]
        self._jsonl = path.open("a", encoding="utf-8")
        if "tensorboard" in trackers.names_of(self.config.report_to):
            self._writer = SummaryWriter(str(self.directory.tensorboard), purge_step=first_step)
            self._writer.add_custom_scalars(_layout(self.config))
        self._trackers = list(trackers.start(self.config, self.directory.trackers, self.say))

    def say(self, text: str) -> None:
        """Prints a line on the console, above the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def detail(self, text: str) -> None:
        """Prints a line if the run is `verbose`."""
        if self.config.verbose:
            self.say(text)

    def start_phase(self, phase: int, steps: int, done: int) -> None:
        """Opens the progress bar of a phase of `steps` optimizer steps, of which `done`
        are done."""
        if self._status is not None:
            self._status.phase, self._status.step, self._status.steps = phase, done, steps
            self._status.saved = done or None
            self._write_status()
        if self.enabled:
            # A log file gets one line per minute instead of thousands of redrawn bars.
            interval = 0.5 if sys.stderr.isatty() else 60.0
            self._bar = tqdm(
                total=steps,
                initial=done,
                desc=phase_name(phase),
                unit="step",
                mininterval=interval,
                maxinterval=interval,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def advance(self) -> None:
        """Counts one optimizer step on the progress bar."""
        if self._bar is not None:
            self._bar.update()
        if self._status is not None:
            self._status.step += 1
            if time.monotonic() > self._last_beat + _HEARTBEAT:
                self._write_status()

    def end_phase(self) -> None:
        """Closes the progress bar of a phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def scalars(
        self, step: int, phase: int, values: dict[str, float], kl_per_dim: list[float]
    ) -> None:
        """Writes one training step.

        Args:
            step: on the run's one axis of optimizer steps.
            values: name -> value; losses in nats per sentence, and those of `Speed.read`.
            kl_per_dim: in nats.
        """
        if self._jsonl is None:
            return
        self._record(
            {"step": step, "phase": phase, "split": "train", **values, "kl_per_dim": kl_per_dim}
        )
        tags = {f"{catalog.entry(name).training_group}/{name}": values[name] for name in values}
        self._publish(step, tags)
        if self._bar is not None:
            self._bar.set_postfix_str(_postfix(values), refresh=False)

    def evaluation(self, step: int, phase: int, split: str, metrics: dict[str, Any]) -> None:
        """Writes an evaluation on `split` at global `step`."""
        if self._jsonl is None:
            return
        self._record({"step": step, "phase": phase, "split": split, **metrics})
        of_latent = split == "valid" and bool(metrics.get("kl_per_dim"))
        more = catalog.differences(metrics) if of_latent else {}
        tags = {}
        for name, value in _charted({**metrics, **more}).items():
            main = split == "valid" and catalog.MAIN in catalog.entry(name).places
            tag = name.replace("-", "_minus_")
            tags[f"{'main' if main else split}/{tag}"] = value
        tables, images = {}, {}
        if of_latent:
            self._kl_per_dim.append((step, metrics["kl_per_dim"]))
            images["valid/kl_per_dim"] = _image(_kl_figure(self._kl_per_dim))
        if split == "test" and "kl_per_dim" in metrics:
            cells = [[row.name, row.value, row.unit, row.meaning] for row in result_rows(metrics)]
            tables["evaluation"] = (["metric", "value", "unit", "meaning"], cells)
        self._publish(step, tags, tables, images)

    def text(self, step: int, pairs: list[tuple[str, str]], prior: list[str]) -> None:
        """Writes (sentence, reconstruction) pairs, and sentences from the prior."""
        if self._jsonl is None or not (pairs or prior):
            return
        tables = {"prior": (["sentence"], [[text] for text in prior])}
        if pairs:
            columns = ["sentence", "reconstruction of its mean"]
            tables["reconstruction"] = (columns, [list(pair) for pair in pairs])
        self._publish(step, tables=tables)
        self._record({"step": step, "split": "text", "reconstruction": pairs, "prior": prior})

    def flush(self) -> None:
        """Puts on disk what was reported so far. Called before a checkpoint, since a
        run that resumes from it does not report those steps again."""
        if self._jsonl is not None:
            os.fsync(self._jsonl.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self, final: dict[str, Any] | None) -> None:
        """Ends the log of a finished run: writes the hyperparameters beside the final
        metrics, if any, and closes the files."""
        self.end_phase()
        if self._status is not None:
            self._status.state, self._status.exit_code = "finished", 0
            self._write_status()
        self._plot()
        if self._writer is not None:
            if final is not None:
                # These scalars are already there, from the final evaluation.
                numbers = {f"test/{name}": value for name, value in _charted(final).items()}
                # `SummaryWriter.add_hparams` would open a second run; this writes into the
                # event file of this one.
                for summary in hparams(_hyperparameters(self.config), numbers):
                    self._writer._get_file_writer().add_summary(summary)
            self._writer.close()
        self._end_trackers(0)
        if self._jsonl is not None:
            self._jsonl.close()
        self._writer = self._jsonl = None

    def _plot(self) -> None:
        """Draws the whole run."""
        if self._jsonl is None or (figure := run_plot(self.directory.metrics_jsonl)) is None:
            return
        image = _image(figure)
        try:
            with whole_path(self.directory.plot) as temporary:
                image.save(temporary, format="png")
        except OSError as error:
            self.say(f"warning: {self.directory.plot} was not written: {error.strerror}")
        self._publish(self._step, images={"run": image})

    def _publish(
        self,
        step: int,
        scalars: dict[str, float] | None = None,
        tables: dict[str, tuple[list[str], list[list[str]]]] | None = None,
        images: dict[str, Any] | None = None,
    ) -> None:
        """Sends what belongs to a step to TensorBoard and the trackers; a table is its
        headings and its rows."""
        scalars, tables, images = scalars or {}, tables or {}, images or {}
        if self._trackers and step > self._sent:
            for tracker in self._trackers:
                tracker.put(Entry(step, scalars, tables, images))
        if self._writer is None:
            return
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, (columns, rows) in tables.items():
            self._writer.add_text(name, _markdown(columns, rows), step)
        for name, image in images.items():
            self._writer.add_image(name, np.array(image), step, dataformats="HWC")

    def _end_trackers(self, code: int) -> None:
        ending, self._trackers = self._trackers, []
        for tracker in ending:
            tracker.put(code)
        until = time.monotonic() + trackers.PATIENCE
        for tracker in ending:
            tracker.wait(until)

    def _record(self, row: dict[str, Any]) -> None:
        assert self._jsonl is not None
        self._step = row["step"]
        self._jsonl.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
        self._jsonl.flush()


def _postfix(values: dict[str, float]) -> str:
    """Returns the losses, speed and memory after the progress bar."""
    main = [metric.name for metric in catalog.METRICS if catalog.PROGRESS in metric.places]
    losses = " ".join(f"{name} {values[name]:.4g}" for name in main if name in values)
    flops = values["flops_per_s"]
    work = f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP/s"
    if "mfu" in values:
        work = f"MFU {values['mfu']:.0%}"
    memory = f"{values['peak_memory_gb']:.2f} GB"
    return f"{losses} | {values['tokens_per_s']:,.0f} tok/s {work} {memory}"


def _charted(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of an evaluation that have a chart."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and catalog.NO_CHART not in catalog.entry(name).places
    }


def _layout(config: RunConfig) -> dict[str, dict[str, list[Any]]]:
    """Returns the charts of TensorBoard's CUSTOM SCALARS, in its format."""
    data = config.data
    left_out = set()
    if not config.model.has_latent:
        left_out.add("does z matter")
    if data.label_column is None and data.tags_column is None:
        left_out.add("labels")
    if 3 not in config.phases:
        left_out.add("prior")
    return {
        # TensorBoard draws every tag that starts with a match of this regular expression.
        category: {
            title: ["Multiline", [f"{tag}$" for tag in tags]]
            for title, tags in charts.items()
            if "speed/mfu" not in tags or peak_flops("bf16") is not None
        }
        for category, charts in catalog.CHARTS.items()
        if category not in left_out
    }


def _kl_figure(history: list[tuple[int, list[float]]]) -> Figure:
    """Draws KL of every dimension (rows) at every validation (columns).

    The logarithmic colour scale is fixed, so that images of several steps and runs can
    be compared: 0.01 nats is nothing, 10 is a lot.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    least, most = 0.01, 10.0
    steps, columns = zip(*history, strict=True)
    image = np.array(columns, dtype=float).T.clip(least, most)  # (Z, validations)
    # A fixed layout: to find one takes a third of the time.
    figure = Figure(figsize=(5.0, 3.6))
    axes = figure.add_axes((0.12, 0.14, 0.84, 0.8))
    shown = axes.imshow(image, aspect="auto", norm=LogNorm(least, most), interpolation="nearest")
    labelled = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
    axes.set_xticks(labelled, [f"{steps[i]:,}" for i in labelled])
    axes.set(xlabel="step", ylabel="dimension of z")
    figure.colorbar(shown, label="KL (nats)", format="%g")
    return figure


def _image(figure: Figure) -> Any:
    """Returns a figure as a PIL image, which several threads may read."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")  # which is read; `open` alone waits


def _hyperparameters(config: RunConfig) -> dict[str, int | float | str | bool]:
    """Returns the tuned settings, for TensorBoard's HPARAMS; config.yaml has all of
    them."""
    parameters = {}
    for name, value in flatten(to_tree(config)).items():
        tuned = name in ("data.batch_size", "data.max_tokens", "seed")
        sections = ("model.", "phase1.", "phase2.", *(["prior."] if 3 in config.phases else []))
        if value is not None and (tuned or name.startswith(sections)):
            parameters[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return parameters


def _truncate_jsonl(path: Path, first_step: int) -> tuple[list[dict[str, Any]], int]:
    """Keeps and returns the rows before `first_step`, without an incomplete last one, and
    the last step of those that are dropped, or 0."""
    if not path.exists():
        return [], 0
    kept, lines, dropped = [], [], 0
    # splitlines() would also split at U+2028 and others, which JSON does not escape. The
    # last character may be incomplete.
    for line in filter(None, path.read_bytes().decode(errors="replace").split("\n")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        # The final evaluation comes after the last checkpoint, at the same step.
        if row["step"] < first_step and row["split"] != "test":
            kept.append(row)
            lines.append(line + "\n")
        else:
            dropped = row["step"]
    write_text(path, "".join(lines))
    return kept, dropped


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown; one with a single column as a list."""
    if len(columns) == 1:
        return "\n".join(f"- {_cell(row[0])}" for row in rows)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Returns text in a cell of a Markdown table, with markup escaped."""
    for char in "\\|`*_<>[]":
        text = text.replace(char, "\\" + char)
    return text.replace("\n", " ")
