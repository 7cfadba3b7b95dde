"""The plots of report.html."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from dsvae.metrics.evaluate import Measured
from dsvae.modeling.families import ACTIVE
from dsvae.reports.figures import COLOR, STYLE, legend, new_figure, noise_curves
from dsvae.reports.sentences import Sentences

POINTS = 5_000
"""The largest number of sentences in a scatter plot."""
ENOUGH = 10
"""Sentences that a length needs for a point of the mean."""
CLASSES = 10
"""The largest number of labels that colours can tell apart."""


def plots(metrics: dict[str, Any], measured: Measured, text: Sentences) -> dict[str, Figure]:
    """Draws the plots; returns title -> figure. A model without a latent has only the plot
    of the lengths."""
    chosen = np.argsort(text.split.content_keys)[:POINTS]
    with matplotlib.rc_context(STYLE):
        images = {}
        if units := metrics["latent_dim"]:
            points = measured.posterior.point.numpy()[chosen]
            images["KL per dimension"] = _kl(metrics["kl_per_dim"], metrics["latent_vectors"])
            images["Active units over thresholds"] = _active_units(metrics["au_curve"], units)
            if curves := metrics.get("noise"):
                errors = metrics["se"]["noise"]["bleu"]
                images["BLEU against noise on z"] = noise_curves({"": (curves["bleu"], errors)})
            images["Latents"] = _latents(points, *_colours(metrics, text, chosen))
        rec = measured.rec.numpy()[chosen]
        images["Length against rec"] = _lengths(text.split.lengths[chosen], rec)
        if scores := metrics.get("disentanglement"):
            names = list(scores["per_factor"])
            images["Information about the factors"] = _matrix(
                np.array(scores["information"]), names, scores["dimensions"]
            )
        return images


def _kl(kl: list[float], vectors: int) -> Figure:
    figure, axes = new_figure()
    if vectors > 1:
        image = axes.imshow(np.reshape(kl, (vectors, -1)), aspect="auto", interpolation="nearest")
        axes.set(xlabel="unit of a vector", ylabel="vector")
        axes.grid(visible=False)
        figure.colorbar(image, label="KL (nats)")
        return figure
    ordered = sorted(range(len(kl)), key=lambda d: -kl[d])
    axes.bar(range(len(kl)), [kl[d] for d in ordered], color=COLOR)
    _label_units(axes, ordered)
    axes.set(xlabel="unit of z, by its KL", ylabel="KL (nats)")
    axes.grid(axis="x", visible=False)
    return figure


def _active_units(curve: dict[str, list], dims: int) -> Figure:
    figure, axes = new_figure()
    axes.step(curve["threshold"], curve["units"], where="post", color=COLOR)
    axes.axvline(ACTIVE, color="black", linestyle=":", linewidth=1)
    label = f"au, at {ACTIVE}"
    axes.annotate(label, (ACTIVE, 0), xytext=(4, 6), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", ylim=(0, dims * 1.05))
    axes.set(xlabel="threshold on the activity", ylabel=f"active units, of {dims}")
    return figure


def _lengths(lengths: NDArray[np.int32], rec: NDArray[np.float64]) -> Figure:
    figure, axes = new_figure()
    axes.scatter(lengths, rec, s=5, alpha=0.25, linewidths=0, color=COLOR, rasterized=True)
    values, counts = np.unique(lengths, return_counts=True)
    common = values[counts >= ENOUGH]
    if len(common):
        means = [rec[lengths == length].mean() for length in common]
        label = f"mean, where {ENOUGH} sentences or more"
        axes.plot(common, means, color="black", linewidth=1, label=label)
        axes.legend(frameon=False)
    axes.set(xlabel="tokens, EOS included", ylabel="rec (nats)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _latents(means: NDArray[np.float32], name: str, values: NDArray) -> Figure:
    """Draws the first two principal components, coloured by labels or by numbers."""
    figure, axes = new_figure()
    components = min(2, *means.shape)
    pca = PCA(components).fit(means)
    xy = np.pad(pca.transform(means), ((0, 0), (0, 2 - components)))
    style: dict[str, Any] = {"s": 7, "alpha": 0.5, "linewidths": 0, "rasterized": True}
    if values.dtype.kind in "iuf":
        points = axes.scatter(xy[:, 0], xy[:, 1], c=values, cmap="viridis", **style)
        points.set_clim(vmax=np.quantile(values, 0.99))
        figure.colorbar(ScalarMappable(points.norm, points.cmap), ax=axes, label=name)
    else:
        labels = np.unique(values).tolist()
        drawn = [
            axes.scatter(*xy[values == label].T, color=f"C{index}", **style)
            for index, label in enumerate(labels)
        ]
        legend(axes, drawn, labels, title=name, markerscale=2.5, fontsize=8)
    shares = pca.explained_variance_ratio_
    axes.set_xlabel(f"PC 1 ({shares[0]:.1%} of the variance)")
    axes.set_ylabel(f"PC 2 ({shares[1]:.1%})" if components == 2 else "")
    return figure


def _colours(
    metrics: dict[str, Any], text: Sentences, chosen: NDArray[np.intp]
) -> tuple[str, NDArray]:
    """Returns name and values of the label that the linear probe reads best, or the
    length."""
    probes = {
        name: probe
        for name, probe in metrics.get("probes", {}).items()
        if probe is not None and len(np.unique(text.labels[name])) <= CLASSES
    }
    if not probes:
        return "tokens", text.split.lengths[chosen]
    best = max(probes, key=lambda name: probes[name]["linear"] - probes[name]["majority"])
    values = text.labels[best][chosen]
    return best, np.where(values == "", "no label", values)


def _matrix(information: NDArray[np.float64], names: list[str], dimensions: list[int]) -> Figure:
    """Draws I(z_i; v_k): one row per factor, one column per active unit."""
    figure, axes = new_figure()
    image = axes.imshow(information.T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    _label_units(axes, dimensions)
    axes.set_xlabel("unit of z, active ones alone")
    axes.grid(visible=False)
    figure.colorbar(image, label="I(z_i; factor) (nats)")
    return figure


def _label_units(axes: Axes, units: list[int]) -> None:
    """Writes numbers below the columns of a plot, at most 63 of them."""
    shown = range(0, len(units), max(1, len(units) // 32))
    axes.set_xticks(shown, [str(units[i]) for i in shown], fontsize=7)
