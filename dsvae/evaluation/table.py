"""The metrics as rows for people: on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsvae.metrics.meanings import BASELINE, SECTIONS, Row, described, error, number

DISENTANGLEMENT = (
    ("mig", "mutual information gap (Chen et al. 2018)"),
    ("dci_disentanglement", "each dimension for one factor (Eastwood & Williams 2018)"),
    ("dci_completeness", "each factor in one dimension"),
    ("dci_informativeness", "held-out accuracy of the factors from z"),
    ("z_diff", "beta-VAE metric (Higgins et al. 2017)"),
    ("z_diff_chance", "... of a classifier that guesses"),
    ("sap", "separated attribute predictability (Kumar et al. 2018)"),
)


def sections(metrics: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of every section that the metrics have something for."""
    for title, lines in SECTIONS.items():
        if not metrics["latent_dim"]:
            if title not in ("Likelihood", "Text"):
                continue
            lines = BASELINE if title == "Likelihood" else lines
        rows = described(lines, metrics)
        if rows:
            yield title, rows
        if title.startswith("Reconstruction"):
            yield from _use_of_latents(metrics)


def table(metrics: dict[str, Any]) -> str:
    """All sections as aligned text, warnings last."""
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


def _use_of_latents(metrics: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    if probes := metrics.get("probes"):
        rows = []
        for label, found in probes.items():
            value, se = found["linear"], found["se"]["linear"]
            knn = f"{number(found['knn'])} ± {error(found['knn'], found['se']['knn'])}"
            about = (
                f"majority {number(found['majority'])}, nearest neighbours {knn}; "
                f"{found['classes']} classes"
            )
            about += (
                f", {found['left_out']:,} sentences of rare labels left out"
                if found["left_out"]
                else ""
            )
            rows.append(Row(label, number(value), error(value, se), "accuracy", about))
        yield "Linear probe of the posterior means, held out", rows
    if scores := metrics.get("disentanglement"):
        rows = [
            Row(name, number(scores[name]), "", "0-1", meaning) for name, meaning in DISENTANGLEMENT
        ]
        yield "Disentanglement against the factors", rows
