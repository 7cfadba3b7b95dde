"""Metrics as rows and tables for people: at the end of a run, after `dsvae evaluate`,
in model cards and in reports. Which metrics, and in what words: `dsvae.metrics.catalog`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsvae.metrics import catalog
from dsvae.metrics.catalog import Metric


class Row(NamedTuple):
    """One metric as text."""

    name: str
    value: str
    error: str
    """Its standard error; empty if it has none."""
    unit: str
    meaning: str


def sections(metrics: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Returns title and rows of every section that has a metric.

    Args:
        metrics: name -> value, None if it is not finite. `se`: standard errors by
            name.
    """
    latent = bool(metrics["latent_dim"])
    for title in dict.fromkeys(m.section for m in catalog.METRICS if m.section is not None):
        rows = []
        for metric in catalog.METRICS:
            meaning = _meaning(metric, title, latent)
            rows += [] if meaning is None else _rows(metric, meaning, metrics)
        if rows:
            yield title, rows


def table(metrics: dict[str, Any]) -> str:
    """Writes all sections as aligned text, then the warnings."""
    lines = [f"{metrics['source']}: {metrics['sentences']:,} sentences"]
    for title, rows in sections(metrics):
        lines += ["", title]
        width = max(19, *(len(row.name) for row in rows))
        for row in rows:
            margin = f"± {row.error}" if row.error else ""
            cells = f"{row.name:<{width}} {row.value:>10} {margin:<9} {row.unit:<13} {row.meaning}"
            lines.append(f"  {cells}".rstrip())
    lines += [f"\nwarning: {warning}" for warning in metrics["warnings"]]
    return "\n".join(lines)


def result_table(title: str, metrics: dict[str, Any]) -> str:
    """Writes the final metrics of a run (of metrics.json) as lines, then the
    warnings."""
    lines = [f"{title} ({metrics['sentences']:,} sentences)"]
    rows = result_rows(metrics)
    width = max(13, *(len(row.name) for row in rows))
    lines += [f"  {r.name:<{width}}{r.value:>10} {r.unit:<14} {r.meaning}" for r in rows]
    lines += [f"warning: {warning}" for warning in metrics.get("warnings", [])]
    return "\n".join(lines)


def result_rows(metrics: dict[str, Any]) -> list[Row]:
    """Returns the final metrics of a run that its table shows."""
    latent = metrics["kl_per_dim"] != []
    rows = []
    for metric in catalog.METRICS:
        meaning = metric.meaning if latent else metric.meaning_without_latent
        if catalog.SUMMARY in metric.places and meaning is not None:
            rows += _rows(metric, meaning, metrics)
    return rows


def markdown(columns: dict[str, list[str]], right: set[str]) -> str:
    """Writes heading -> cells as a Markdown table; columns in `right` are aligned to
    the right."""
    lines: list[list[str]] = []
    for heading, cells in columns.items():
        cells = [" ".join(cell.replace("|", r"\|").split()) for cell in (heading, *cells)]
        width = max(3, *map(len, cells))
        rule = "-" * (width - 1) + ":" if heading in right else "-" * width
        cells = [cell.rjust(width) if heading in right else cell.ljust(width) for cell in cells]
        lines.append([cells[0], rule, *cells[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*lines, strict=True))


def number(value: float | None) -> str:
    """Writes a number at the precision that people read; "-" if it is not finite."""
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.{_decimals(value)}f}"


def error(value: float | None, se: float | None) -> str:
    """Writes a standard error with as many decimals as its value; "-" if one of them is
    not finite, empty if there is none."""
    if se is None:
        return ""
    if value is None or not math.isfinite(value) or not math.isfinite(se):
        return "-"
    return f"{se:,.{_decimals(value)}f}"


def _meaning(metric: Metric, title: str, latent: bool) -> str | None:
    """Returns the words of a metric in a section; None if it has no row there."""
    if latent and metric.second_row is not None and metric.second_row[0] == title:
        return metric.second_row[1]
    if metric.section != title:
        return None
    return metric.meaning if latent else metric.meaning_without_latent


def _rows(metric: Metric, meaning: str, metrics: dict[str, Any]) -> list[Row]:
    """Returns the rows of a metric: none if it was not measured, one per label for
    probes."""
    outer, _, name = metric.name.rpartition(".")
    group = metrics.get(outer, {}) if outer else metrics
    if group is None:
        return [Row(name, "-", "", metric.unit, f"no active unit; {meaning}")]
    if name not in group:
        return []
    value = group[name]
    if reason := metrics.get("undefined", {}).get(metric.name):
        meaning = reason
    if isinstance(value, dict):
        return [_probe_row(label, probe, metric.unit) for label, probe in value.items()]
    if "chance" in group:
        draws, chance = (number(group[other][name]) for other in ("draws", "chance"))
        meaning = f"draws {draws}, chance {chance}; {meaning}"
    se = group.get("se", {}).get(name)
    return [Row(name, number(value), error(value, se), metric.unit, meaning)]


def _probe_row(label: str, probe: dict[str, Any] | None, unit: str) -> Row:
    if probe is None:
        return Row(label, "-", "", unit, "no active unit")

    def with_error(name: str) -> str:
        return f"{number(probe[name])} ± {error(probe[name], probe['se'][name])}"

    about = (
        f"draws {with_error('linear_draws')}, chance {number(probe['linear_chance'])}, "
        f"majority {number(probe['majority'])}; nearest neighbours {with_error('knn')}, "
        f"draws {with_error('knn_draws')}, chance {number(probe['knn_chance'])}; "
        f"{probe['classes']} classes"
    )
    if probe["left_out"]:
        about += f", {probe['left_out']:,} sentences of rare labels left out"
    se = error(probe["linear"], probe["se"]["linear"])
    return Row(label, number(probe["linear"]), se, unit, about)


def _decimals(value: float) -> int:
    return 4 if abs(value) < 1 else 3 if abs(value) < 100 else 2 if abs(value) < 1000 else 0
