"""report.html: one file that shows a whole evaluation and loads nothing from elsewhere.
Its text is in report.html.jinja."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from dsvae.files import write_text
from dsvae.metrics.evaluate import Measured
from dsvae.reports.plots import plots
from dsvae.reports.sentences import Sentences
from dsvae.reports.table import number, sections
from dsvae.reports.templates import render


def write_report(
    path: Path,
    metrics: dict[str, Any],
    measured: Measured,
    text: Sentences,
    pairs: list[tuple[str, str]],
    prior: list[str],
) -> None:
    """Writes the report of an `Evaluation`, whole or not at all."""
    images = {
        title: base64.b64encode(svg.encode()).decode()
        for title, svg in plots(metrics, measured, text).items()
    }
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
        pairs=pairs,
        prior=prior,
        number=number,
    )
    write_text(path, html)
