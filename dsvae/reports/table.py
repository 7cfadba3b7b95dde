"""The metrics as rows for people: on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsvae.metrics.catalog import BASELINE, SECTIONS, Row, described, error, number

DISENTANGLEMENT = (
    ("mig", "mutual information gap (Chen et al. 2018)"),
    ("dci_disentanglement", "each dimension for one factor (Eastwood & Williams 2018)"),
    ("dci_completeness", "each factor in one dimension"),
    ("dci_informativeness", "held-out accuracy of random forests that read the factors"),
    ("z_diff", "beta-VAE metric (Higgins et al. 2017)"),
    (
        "sap",
        "SAP, categorical: held-out balanced accuracy of tree thresholds on the best dimension "
        "minus the second best (after Kumar et al. 2018)",
    ),
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
        rows = [_probe_row(label, found) for label, found in probes.items()]
        yield "Linear probe of the posterior means, held out", rows
    if "disentanglement" in metrics:
        scores = metrics["disentanglement"]
        rows = [
            Row(name, "-", "", "0-1", f"no active unit; {meaning}")
            if scores is None
            else Row(
                name,
                number(scores[name]),
                error(scores[name], scores["se"].get(name)),
                "0-1",
                f"draws {number(scores['draws'][name])}, chance {number(scores['chance'][name])}; "
                f"{meaning}",
            )
            for name, meaning in DISENTANGLEMENT
        ]
        yield "Disentanglement against the factors, posterior means", rows


def _probe_row(label: str, found: dict[str, Any] | None) -> Row:
    if found is None:
        return Row(label, "-", "", "accuracy", "no active unit")

    def with_error(name: str) -> str:
        return f"{number(found[name])} ± {error(found[name], found['se'][name])}"

    about = (
        f"draws {with_error('linear_draws')}, chance {number(found['linear_chance'])}, "
        f"majority {number(found['majority'])}; nearest neighbours {with_error('knn')}, "
        f"draws {with_error('knn_draws')}, chance {number(found['knn_chance'])}; "
        f"{found['classes']} classes"
    )
    if found["left_out"]:
        about += f", {found['left_out']:,} sentences of rare labels left out"
    se = error(found["linear"], found["se"]["linear"])
    return Row(label, number(found["linear"]), se, "accuracy", about)
