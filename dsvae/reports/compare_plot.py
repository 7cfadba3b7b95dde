"""A plot of rec against kl, distortion against rate, with one point per run."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from dsvae.reports.compare import Comparison, grouped
from dsvae.reports.figures import COLOR, STYLE, new_figure, noise_curves, short, svg
from dsvae.reports.runs import RunSummary
from dsvae.reports.table import number

_LINES = 9
"""The largest number of lines of equal rec + kl, at round numbers."""
_PALETTE = (COLOR, "#c1662f", "#3c8d5a", "#7a5ba8")
"""Of the injections, in the order of the runs."""
_NO_LATENT = "#444444"
_NAME = 100
"""The longest name of a run, in characters. The ends of a sweep's names differ."""
_AXES, _CHARACTER = 5.7, 0.058
"""Inches of the figure's width: without the legend, and per character of it."""
_NEAR = 0.025
"""Share of an axis within which two labels would overlap."""


def plot(comparison: Comparison) -> str | None:
    """Draws the plot as SVG; returns None if no run has both values. A model without a
    latent is drawn at kl 0, with the line on which rec + kl is its -log p(x): below it,
    a latent pays. Rows of several seeds have their standard deviations as bars.

    Phase 1 does not train the KL, which is then many times that of phase 2. So runs in
    phase 1 are drawn only if there are no others.
    """
    runs = [run for run in comparison.runs if "rec" in run.metrics]
    runs = [run for run in runs if "kl" in run.metrics or not run.latent]
    runs = [run for run in runs if run.phase == 2] or runs
    if not runs:
        return None
    with matplotlib.rc_context(STYLE):
        points = [(run.metrics.get("kl", 0.0), run.metrics["rec"]) for run in runs]
        injections = dict.fromkeys(_injection(run) for run in runs if run.latent)
        colors = dict(zip(injections, itertools.cycle(_PALETTE), strict=False))
        labels = []
        for index, run in enumerate(runs, 1):
            how = f"{_injection(run)}, " if len(colors) > 1 and run.latent else ""
            labels.append(f"{index}  {short(run.name, _NAME)}: {how}{_about(run)}")
        width = _AXES + _CHARACTER * max(map(len, labels))
        figure, axes = new_figure(width, max(4.0, 0.6 + 0.26 * len(runs)))
        for run, (kl, rec), label in zip(runs, points, labels, strict=True):
            color = colors[_injection(run)] if run.latent else _NO_LATENT
            style: dict[str, Any] = {"marker": "o" if run.latent else "D", "markersize": 6}
            style["markerfacecolor"] = color if run.split == "test" else "none"
            axes.plot(kl, rec, color=color, linestyle="none", label=label, **style)
            up, across = (run.metrics.get(f"sd.{name}", 0.0) for name in ("rec", "kl"))
            axes.errorbar(kl, rec, yerr=up, xerr=across, fmt="none", color=color, linewidth=1)
        axes.margins(0.12)
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        line: dict[str, Any] = {"slope": -1, "linewidth": 0.8, "zorder": 0}
        for total in MaxNLocator(_LINES + 1).tick_values(left + low, right + high):
            axes.axline((0, total), color="black", alpha=0.12, **line)
            kl = min(right, total - low)  # where it leaves the plot at the bottom or right
            if left < kl and low <= total - kl < high:
                axes.text(kl, total - kl, f"{total:g}", fontsize=6, alpha=0.6, va="bottom")
        for run, (kl, rec) in zip(runs, points, strict=True):
            if not run.latent:
                axes.axline((kl, rec), color=_NO_LATENT, linestyle="--", **line)
        axes.set(xlim=(left, right), ylim=(low, high))
        width, height = right - left, high - low

        def near(a: int, b: int) -> bool:
            (x, y), (other_x, other_y) = points[a], points[b]
            return max(abs(x - other_x) / width, abs(y - other_y) / height) < _NEAR

        for members in grouped(range(len(points)), near):
            label = ", ".join(str(index + 1) for index in members)
            where = points[members[0]]
            axes.annotate(label, where, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="kl (nats/sentence)", ylabel="rec (nats/sentence)")
        title = "down and left is better; along a line rec + kl is the same"
        if not all(run.latent for run in runs):
            title += "; dashed: -log p(x) without a latent"
        if any(run.split != "test" for run in runs):
            title += "; hollow: not final, on validation"
        axes.set_title(title, fontsize=8)
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        axes.legend(fontsize=7.5, frameon=False, handletextpad=0.2, **place)
        return svg(figure)


def plot_noise(comparison: Comparison) -> str | None:
    """Draws the BLEU of reconstructions against the noise on z as SVG, one line per run;
    returns None if no run has it. Bars are standard errors over sentences, and standard
    deviations for rows of several seeds."""
    curves = {}
    for run in comparison.runs:
        values, se, sd = (
            {
                name.removeprefix(prefix): value
                for name, value in run.metrics.items()
                if name.startswith(prefix)
            }
            for prefix in ("noise.bleu.", "se.noise.bleu.", "sd.noise.bleu.")
        )
        if values:
            curves[run.name] = values, sd or se
    with matplotlib.rc_context(STYLE):
        return svg(noise_curves(curves)) if curves else None


def _injection(run: RunSummary) -> str:
    return str(run.settings.get("model.injection"))


def _about(run: RunSummary) -> str:
    if not run.latent:
        return "no latent"
    shown = [name for name in ("mi", "au") if name in run.metrics]
    return ", ".join(f"{name} {number(run.metrics[name])}" for name in shown)
