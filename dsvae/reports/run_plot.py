"""One picture of a run, from the rows of its metrics.jsonl: the losses with the phases,
KL of each unit, active units, and rate against distortion."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsvae.reports.figures import COLOR, STYLE

Rows = list[dict[str, Any]]


def run_plot(path: Path) -> Figure | None:
    """Draws a metrics.jsonl; returns None if nothing was trained. A model without a latent
    has the losses alone."""
    with path.open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row.get("phase") in (1, 2)]
    train = [row for row in rows if row["split"] == "train" and "rec" in row]
    valid = [row for row in rows if row["split"] == "valid" and row.get("kl_per_dim")]
    if not train:
        return None
    drawn = [_losses] + [_kl_per_unit, _active_units, _rate_distortion] * bool(valid)
    with matplotlib.rc_context(STYLE):
        columns = 2 if valid else 1
        figure = Figure(figsize=(5.4 * columns, 3.4 * columns))
        for place, draw in enumerate(drawn, 1):
            axes = figure.add_subplot(columns, columns, place)
            draw(axes, train if draw is _losses else valid)
        # A fixed layout: to find one takes most of the time.
        figure.subplots_adjust(0.13 / columns, 0.15 / columns, 0.99, 1 - 0.08 / columns, 0.2, 0.3)
    return figure


def _losses(axes: Axes, rows: Rows) -> None:
    steps = [row["step"] for row in rows]
    axes.plot(steps, _values(rows, "rec"), color=COLOR, label="rec")
    axes.plot(steps, _values(rows, "kl"), color="C1", label="kl")
    axes.set(xlabel="step", ylabel="nats per sentence")
    axes.set_ylim(bottom=0)
    for before, row in pairwise(rows):
        if before["phase"] != row["phase"]:
            axes.axvline(before["step"], color="black", linestyle=":", linewidth=1)
    for phase in sorted({row["phase"] for row in rows}):
        inside = [row["step"] for row in rows if row["phase"] == phase]
        middle, place = (inside[0] + inside[-1]) / 2, axes.get_xaxis_transform()
        axes.text(middle, 1.02, f"phase {phase}", transform=place, ha="center", fontsize=8)
    axes.legend(frameon=False)


def _kl_per_unit(axes: Axes, rows: Rows) -> None:
    ordered = sorted(rows[-1]["kl_per_dim"], key=lambda kl: -(kl or 0.0))
    axes.bar(range(1, len(ordered) + 1), [kl or 0.0 for kl in ordered], color=COLOR)
    axes.set(xlabel="units of z, by their KL", ylabel=f"KL (nats), step {rows[-1]['step']:,}")
    axes.grid(axis="x", visible=False)


def _active_units(axes: Axes, rows: Rows) -> None:
    steps, units = [row["step"] for row in rows], len(rows[-1]["kl_per_dim"])
    axes.plot(steps, _values(rows, "au"), color=COLOR, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel=f"active units, of {units}", ylim=(0, 1.05 * units))


def _rate_distortion(axes: Axes, rows: Rows) -> None:
    kl, rec = _values(rows, "kl"), _values(rows, "rec")
    axes.plot(kl, rec, color=COLOR, linewidth=1)
    colors = ["C1" if row["phase"] == 1 else COLOR for row in rows]
    axes.scatter(kl, rec, s=16, c=colors, zorder=3)
    place: dict[str, Any] = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"step {rows[-1]['step']:,}", (kl[-1], rec[-1]), **place)
    axes.set(xlabel="kl on validation text (nats)", ylabel="rec on validation text (nats)")


def _values(rows: Rows, name: str) -> list[float]:
    """Returns a number of each row; NaN, a gap, if it was not finite."""
    found = (row.get(name) for row in rows)
    return [float("nan") if value is None else value for value in found]
