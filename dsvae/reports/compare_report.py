"""A comparison as a table for people and as files: comparison.md, .csv, .json and
.svg."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsvae.files import write_json, write_text
from dsvae.metrics.catalog import number
from dsvae.reports.compare import BETTER, MEANING, SHOWN, Comparison
from dsvae.reports.runs import Run


def place(directories: Sequence[Path], output: str | None) -> Path:
    """Where a comparison of runs goes: `output`, or `comparison` beside them, or in the
    current directory."""
    if output is not None:
        return Path(output).expanduser()
    parents = {directory.absolute().parent.resolve() for directory in directories}
    return (directories[0].absolute().parent if len(parents) == 1 else Path()) / "comparison"


def write(directory: Path, found: Comparison) -> dict[str, Path]:
    """Writes every file of a comparison, each whole or not at all; what each is -> its
    path."""
    from dsvae.reports.compare_plot import plot

    image = plot(found)
    picture = "![rec against kl](comparison.svg)\n\n" if image else ""
    files = {"table": directory / "comparison.md", "all metrics": directory / "comparison.csv"}
    write_text(files["table"], f"# Runs compared\n\n{picture}{text(found)}\n")
    write_text(files["all metrics"], _csv(found))
    if image:
        files["plot"] = directory / "comparison.svg"
        write_text(files["plot"], image)
    else:
        (directory / "comparison.svg").unlink(missing_ok=True)  # that of an earlier comparison
    files["JSON"] = directory / "comparison.json"
    write_json(files["JSON"], _tree(found))
    return files


def text(found: Comparison) -> str:
    """Table, meanings, notes and warnings as Markdown that reads well on a terminal
    too."""
    shown = [name for name in SHOWN if name in found.metrics]
    arrows = {"lower": " ↓", "higher": " ↑"}
    columns = {"run": [run.name for run in found.runs], "state": [run.state for run in found.runs]}
    for name in found.settings:
        columns[name] = _values(name, [run.settings.get(name) for run in found.runs])
    if any(run.split == "valid" for run in found.runs):
        columns["values of"] = [_values_of(run) for run in found.runs]
    for name, letters in (("text", found.text), ("tokenizer", found.tokenizer)):
        if letters:
            columns[name] = [letters.get(run.name, "-") for run in found.runs]
    numbers = {
        f"{name}{arrows.get(BETTER.get(name, ''), '')}": [_metric(run, name) for run in found.runs]
        for name in shown
    }
    lines = [_markdown(columns, numbers), ""]
    for name in shown:
        unit, meaning = MEANING[name]
        about = ", ".join(
            part for part in (unit, f"{BETTER[name]} is better" if name in BETTER else "") if part
        )
        lines.append(f"- `{name}`{f' ({about})' if about else ''}: {meaning}")
    lines += [f"\n{note}" for note in _notes(found)]
    lines += [f"\nwarning: {warning}" for warning in found.warnings]
    return "\n".join(lines)


def _notes(found: Comparison) -> list[str]:
    notes = []
    if any(run.split == "valid" for run in found.runs):
        notes.append(
            "\\* not final: the newest values on validation sentences, at the step under `values "
            "of`; they do not compare with "
            "values on test sentences. In phase 1 no KL is trained: its kl, elbo and "
            "perplexities say little."
        )
    if without := [run.name for run in found.runs if not run.latent]:
        notes.append(
            f"Without a latent: {', '.join(without)}. There rec and elbo are log p(x) itself and "
            f"no bound."
        )
    return notes + [f"{run.name}: {problem}" for run in found.runs for problem in run.problems]


def _markdown(columns: dict[str, list[str]], numbers: dict[str, list[str]]) -> str:
    """An aligned Markdown table, words to the left and numbers to the right."""
    lines: list[list[str]] = []
    for heading, cells in (columns | numbers).items():
        cells = [" ".join(cell.replace("|", r"\|").split()) for cell in (heading, *cells)]
        width = max(3, *map(len, cells))
        right = heading in numbers
        rule = "-" * (width - 1) + ":" if right else "-" * width
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
        lines.append([cells[0], rule, *cells[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*lines, strict=True))


def _csv(found: Comparison) -> str:
    """A row a run, numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heading = ["run", "directory", "state", "values_of", "step", "text", "tokenizer"]
    writer.writerow([*heading, *found.settings, *found.metrics])
    for run in found.runs:
        row: list[Any] = [run.name, run.directory, run.state, run.split, run.step]
        row += [found.text.get(run.name), found.tokenizer.get(run.name)]
        row += [
            None if run.settings.get(name) is None else _value(run.settings[name])
            for name in found.settings
        ]
        writer.writerow([*row, *(run.metrics.get(name) for name in found.metrics)])
    return buffer.getvalue()


def _tree(found: Comparison) -> dict[str, Any]:
    runs = [
        {
            "run": run.name,
            "directory": str(run.directory),
            "state": run.state,
            "values_of": run.split,
            "step": run.step,
            "text": found.text.get(run.name),
            "tokenizer": found.tokenizer.get(run.name),
            "settings": {name: run.settings.get(name) for name in found.settings},
            "metrics": {name: run.metrics[name] for name in found.metrics if name in run.metrics},
            "problems": run.problems,
        }
        for run in found.runs
    ]
    return {
        "runs": runs,
        "better": {n: BETTER[n] for n in found.metrics if n in BETTER},
        "warnings": found.warnings,
    }


def _metric(run: Run, name: str) -> str:
    if name not in run.metrics:
        return "-"
    return number(run.metrics[name]) + ("*" if run.split == "valid" else "")


def _values_of(run: Run) -> str:
    return (
        f"valid, step {run.step:,} (phase {run.phase})"
        if run.split == "valid"
        else run.split or "-"
    )


def _values(name: str, values: list[Any]) -> list[str]:
    """A column of settings; files by their names alone, where these tell them apart."""
    if name.startswith("data.") and name.endswith("_file"):
        short = [value if value is None else Path(value).name for value in values]
        values = short if len(set(short)) == len(set(values)) else values
    return [_value(value) for value in values]


def _value(value: Any) -> str:
    """A setting as people write it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
