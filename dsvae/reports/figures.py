"""The look of all figures, and figures as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsvae.files import whole_path

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.dpi": 120,
    "font.size": 9,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "dsvae",
}
COLOR = "#2f6db3"


def new_figure(width: float = 5.6, height: float = 3.6) -> tuple[Figure, Axes]:
    """Makes an empty figure and its axes; width and height in inches."""
    # pyplot would keep the figure and choose a window system.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure) -> str:
    """Returns the figure as SVG text, the same for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    return buffer.getvalue().decode()


def write_png(figures: Mapping[str, Figure], directory: Path) -> None:
    """Writes figures as NAME.png into a directory, which is made."""
    directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        with whole_path(directory / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str], **style: Any) -> None:
    """Draws a legend to the right of what was drawn (`handles`), with any labels."""
    style |= {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    # matplotlib leaves out labels that begin with an underscore.
    entries = axes.legend(handles, [f"entry {i}" for i in range(len(labels))], **style).get_texts()
    for entry, label in zip(entries, labels, strict=True):
        entry.set_text(short(label))


def short(label: str, most: int = 18) -> str:
    """Cuts a user's label to `most` characters, which matplotlib shows as it is."""
    label = label.replace("$", r"\$")  # two of them would enclose mathematics
    return label if len(label) <= most else f"{label[: most - 1]}…"


def noise_curves(curves: dict[str, tuple[dict[str, float], dict[str, float]]]) -> Figure:
    """Draws BLEU against the noise on z: name -> values and deviations by
    noise."""
    figure, axes = new_figure(width=5.6 if len(curves) == 1 else 8.0)
    drawn = [
        axes.errorbar(
            list(map(float, values)),
            list(values.values()),
            yerr=[deviations.get(s, 0.0) for s in values],
            color=COLOR if len(curves) == 1 else None,
            marker="o",
            markersize=3,
        )
        for values, deviations in curves.values()
    ]
    if len(curves) > 1:
        legend(axes, drawn, list(curves), fontsize=8)
    axes.set(xlabel="noise on z, in std(z)", ylabel="BLEU of the reconstruction", ylim=(0, 101))
    return figure
