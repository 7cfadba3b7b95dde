"""report.html: one file that shows a whole evaluation and loads nothing from elsewhere.
Its text is in report.html.jinja."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from dsvae.files import write_text
from dsvae.metrics.evaluate import Measured
from dsvae.reports.figures import svg, write_png
from dsvae.reports.plots import plots
from dsvae.reports.sentences import Sentences
from dsvae.reports.table import number, sections
from dsvae.reports.templates import render

FIRST = {
    "KL per dimension": "How much of a sentence each unit of z tells. A unit near 0 is not used; "
    "if all are, the decoder ignores z.",
    "Latents": "The sentences by the two directions in which their latents differ the most. "
    "Colours that lie apart are read off z easily.",
    "Length against rec": "What is lost of each sentence, by its length. A line that rises "
    "steeply says that long sentences do not fit into z.",
}
"""The plots that the report opens with, and what they show."""


def write_report(
    path: Path,
    metrics: dict[str, Any],
    measured: Measured,
    text: Sentences,
    pairs: list[tuple[str, str]],
    prior: list[str],
) -> None:
    """Writes the report of an `Evaluation`, whole or not at all, and its plots as PNG
    files in `plots` beside it."""
    figures = plots(metrics, measured, text)
    images = {
        title: base64.b64encode(svg(figure).encode()).decode() for title, figure in figures.items()
    }
    files = {title.lower().replace(" ", "_"): figure for title, figure in figures.items()}
    write_png(files, path.parent / "plots")
    html = render(
        "report.html.jinja",
        m={"disentanglement": None, "bleu_signature": None, **metrics},
        sections=list(sections(metrics)),
        groups=[
            (title, about, scores)
            for title, about, scores in (
                ("Reconstruction by length", "Tokens, EOS included.", metrics.get("by_length")),
                ("Reconstruction by noise on z", "In std(z).", metrics.get("noise")),
            )
            if scores
        ],
        plots=images,
        first=[(title, about) for title, about in FIRST.items() if title in images],
        pairs=pairs,
        prior=prior,
        number=number,
    )
    write_text(path, html)
