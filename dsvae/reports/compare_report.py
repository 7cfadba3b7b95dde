"""A comparison as a Markdown table on the console, and as files: every metric in
comparison.csv, rec against kl in comparison.svg."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsvae.files import write_text
from dsvae.metrics import catalog
from dsvae.reports.compare import Comparison
from dsvae.reports.runs import RunSummary
from dsvae.reports.table import error, markdown, number


def place(directories: Sequence[Path], output: str | None) -> Path:
    """Returns `output`, or `comparison` beside the runs; in the current directory if
    they lie apart."""
    if output is not None:
        return Path(output).expanduser()
    parents = {directory.absolute().parent.resolve() for directory in directories}
    return (directories[0].absolute().parent if len(parents) == 1 else Path()) / "comparison"


def write(directory: Path, comparison: Comparison) -> dict[str, Path]:
    """Writes the files, each whole or not at all; returns their paths by what they
    hold."""
    from dsvae.reports.compare_plot import plot, plot_noise

    files = {"all metrics": directory / "comparison.csv"}
    write_text(files["all metrics"], _csv(comparison))
    images = {"plot": ("comparison.svg", plot), "noise on z": ("noise.svg", plot_noise)}
    for name, (file, draw) in images.items():
        image, path = draw(comparison), directory / file
        if image is None:
            path.unlink(missing_ok=True)  # an earlier comparison may have left one
        else:
            files[name] = path
            write_text(path, image)
    return files


def text(comparison: Comparison) -> str:
    """Writes the table, the meaning of its columns, notes and warnings; returns the
    text."""
    runs = comparison.runs
    columns = {"run": [run.name for run in runs], "state": [run.state for run in runs]}
    for name in comparison.settings:
        columns[name] = _values(name, [run.settings.get(name) for run in runs])
    if any(run.split == "valid" for run in runs):
        columns["values of"] = [_values_of(run) for run in runs]
    for name, letters in (("text", comparison.text), ("tokenizer", comparison.tokenizer)):
        if letters:
            columns[name] = [letters.get(run.name, "-") for run in runs]
    known = [metric for metric in catalog.METRICS if metric.name in comparison.metrics]
    metrics = [metric for metric in known if catalog.COLUMN in metric.places]
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    numbers = {
        f"{metric.name}{arrows[metric.better]}": [_metric(run, metric.name) for run in runs]
        for metric in metrics
    }
    lines = [markdown(columns | numbers, set(numbers)), ""]
    for metric in metrics:
        better = f"{metric.better} is better" if metric.better else ""
        about = ", ".join(filter(None, (metric.unit, better)))
        lines.append(f"- `{metric.name}`{f' ({about})' if about else ''}: {metric.meaning}")
    lines += [f"\n{note}" for note in _notes(runs)]
    lines += [f"\nwarning: {warning}" for warning in comparison.warnings]
    return "\n".join(lines)


def _notes(runs: list[RunSummary]) -> list[str]:
    notes = []
    if any(run.split == "valid" for run in runs):
        notes.append(
            "\\* not final: the newest values on validation sentences, at the step under `values "
            "of`; they do not compare with values on test sentences. Phase 1 trains no KL: its "
            "kl, elbo and perplexities say little."
        )
    if any(name.startswith("sd.") for run in runs for name in run.metrics):
        notes.append(
            "mean ± standard deviation over the runs of a row, which differ only in their seed."
        )
    if without := [run.name for run in runs if not run.latent]:
        notes.append(
            f"Without a latent: {', '.join(without)}. Their rec and elbo are log p(x) itself, "
            "not a bound."
        )
    return notes + [f"{run.name}: {problem}" for run in runs for problem in run.problems]


def _csv(comparison: Comparison) -> str:
    """Writes one row per run, numbers in full; returns the text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heading = ["run", "directory", "state", "values_of", "step", "text", "tokenizer"]
    writer.writerow([*heading, *comparison.settings, *comparison.metrics])
    for run in comparison.runs:
        row: list[Any] = [run.name, run.directory, run.state, run.split, run.step]
        row += [comparison.text.get(run.name), comparison.tokenizer.get(run.name)]
        row += [_value(run.settings.get(name), unset="") for name in comparison.settings]
        writer.writerow([*row, *(run.metrics.get(name) for name in comparison.metrics)])
    return buffer.getvalue()


def _metric(run: RunSummary, name: str) -> str:
    if name not in run.metrics:
        return "-"
    value, deviation = run.metrics[name], run.metrics.get(f"sd.{name}")
    spread = f" ± {error(value, deviation)}" if deviation is not None else ""
    return number(value) + spread + ("*" if run.split == "valid" else "")


def _values_of(run: RunSummary) -> str:
    if run.split == "valid":
        return f"valid, step {run.step:,} (phase {run.phase})"
    return run.split or "-"


def _values(name: str, values: list[Any]) -> list[str]:
    """Returns a column of settings; files by their names alone if these differ."""
    if name.startswith("data.") and name.endswith("_file"):
        short = [value and Path(value).name for value in values]
        values = short if len(set(short)) == len(set(values)) else values
    return [_value(value) for value in values]


def _value(value: Any, unset: str = "-") -> str:
    """Returns a setting as people write it."""
    if value is None:
        return unset
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
