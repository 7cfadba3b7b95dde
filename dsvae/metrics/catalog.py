"""Every metric once: its unit, its meaning, its better direction, and where it is shown.

The console, TensorBoard, the model card, report.html and `dsvae compare` all read this
list. A new metric needs the function that computes it and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NATS = "nats/sentence"

LIKELIHOOD = "Likelihood"
INFORMATION = "Information in z"
USE = "Does the decoder use z?"
RECONSTRUCTION = "Reconstruction (greedy, from the posterior mean)"
PROBES = "Linear probe of the posterior means, held out"
DISENTANGLEMENT = "Disentanglement against the factors, posterior means"
TEXT = "Text"


@dataclass(frozen=True)
class Metric:
    """One metric and the places that show it."""

    name: str
    """Its key in metrics.json or in a logged training step; `outer.inner` where nested."""
    unit: str = ""
    meaning: str = ""
    better: Literal["lower", "higher"] | None = None
    """None for a metric without a better direction, such as kl."""
    section: str | None = None
    """Its section in the table of `dsvae evaluate` and in report.html; None: no row."""
    again: tuple[str, str] | None = None
    """Section and meaning of a second row with the same value."""
    exact: str | None = None
    """Its meaning for a model without a latent, whose likelihood is no bound. None: the
    tables of such a model leave it out."""
    latent: bool = False
    """Whether it describes z. `dsvae compare` drops it for a model without a latent."""
    summary: bool = False
    """Whether the end of a run and the model card show it."""
    column: bool = False
    """Whether the table of `dsvae compare` shows it; the CSV file holds every metric."""
    chart: Literal["main", "split", "none"] = "split"
    """TensorBoard group of an evaluation: `main` on validation text, else the name of
    the split; `none` where the chart would be a straight line."""
    training: Literal["main", "speed", "other"] = "other"
    """TensorBoard group of a logged training step. `main` is on the progress bar too."""
    difference: tuple[str, str] | None = None
    """(a, b) of a metric that is a - b and is not stored in metrics.json."""


def _count(name: str, meaning: str, constant: bool = False) -> Metric:
    chart: Literal["split", "none"] = "none" if constant else "split"
    return Metric(name, "", meaning, section=TEXT, exact=meaning, chart=chart)


def _score(name: str, meaning: str) -> Metric:
    name = f"disentanglement.{name}"
    return Metric(name, "0-1", meaning, better="higher", section=DISENTANGLEMENT, latent=True)


METRICS: tuple[Metric, ...] = (
    Metric("loss", NATS, "rec + beta * penalty, as it was trained", training="main"),
    Metric(
        "rec",
        NATS,
        "-log p(x|z), z from q(z|x): what is left to say once z is known",
        better="lower",
        section=LIKELIHOOD,
        again=(USE, "with the sentence's own z"),
        exact="-log p(x), exact: a language model without a latent",
        summary=True,
        column=True,
        training="main",
    ),
    Metric(
        "kl",
        NATS,
        "KL(q(z|x) || p(z)): what z costs",
        section=LIKELIHOOD,
        latent=True,
        summary=True,
        column=True,
        training="main",
    ),
    Metric("beta", "", "weight of the KL term", training="main"),
    Metric(
        "elbo",
        NATS,
        "-(rec + kl), a lower bound of log p(x)",
        better="higher",
        section=LIKELIHOOD,
        summary=True,
        column=True,
    ),
    Metric("samples", "", "z drawn per sentence for rec", chart="none"),
    Metric(
        "entropy",
        NATS,
        "of the corpus itself: no code needs less than this",
        section=LIKELIHOOD,
        exact="of the corpus itself: no code needs less than this",
        summary=True,
    ),
    Metric(
        "above_entropy",
        NATS,
        "rec + kl - entropy: what the model pays above the best possible code",
        better="lower",
        section=LIKELIHOOD,
        exact="rec - entropy: what the model pays above the best possible code",
        summary=True,
    ),
    Metric(
        "ppl_token",
        "",
        "perplexity per token from the ELBO (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
        exact="perplexity per token",
        summary=True,
        column=True,
    ),
    Metric(
        "ppl_word",
        "",
        "perplexity per word from the ELBO (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
        exact="perplexity per word",
        summary=True,
    ),
    Metric(
        "bits_per_byte",
        "bits",
        "bits per byte from the ELBO (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
        exact="bits per byte",
        summary=True,
        column=True,
    ),
    Metric(
        "nll_iw",
        NATS,
        "-log p(x), importance-weighted bound with k samples (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
        summary=True,
        column=True,
    ),
    Metric(
        "iw_samples",
        "k",
        "samples of the importance-weighted bound",
        section=LIKELIHOOD,
        summary=True,
        chart="none",
    ),
    Metric(
        "iw_ess",
        "samples",
        "effective sample size of the k of nll_iw, mean over sentences",
        section=LIKELIHOOD,
        summary=True,
        column=True,
    ),
    Metric(
        "iw_ess_min",
        "samples",
        "the smallest effective sample size: near 1 the bound is loose",
        section=LIKELIHOOD,
    ),
    Metric(
        "ppl_token_iw",
        "",
        "perplexity per token from nll_iw (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
    ),
    Metric(
        "ppl_word_iw",
        "",
        "perplexity per word from nll_iw (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
    ),
    Metric(
        "bits_per_byte_iw",
        "bits",
        "bits per byte from nll_iw (an upper bound)",
        better="lower",
        section=LIKELIHOOD,
    ),
    Metric(
        "mi",
        "nats",
        "I(x; z), a lower bound: at most mi_cap",
        better="higher",
        section=INFORMATION,
        latent=True,
        summary=True,
        column=True,
        chart="main",
    ),
    Metric(
        "mi_upper",
        "nats",
        "I(x; z), an upper bound",
        section=INFORMATION,
        latent=True,
        summary=True,
        column=True,
    ),
    Metric(
        "mi_cap",
        "nats",
        "ln of mi_posteriors",
        section=INFORMATION,
        latent=True,
        summary=True,
        chart="none",
    ),
    Metric("mi_sentences", "", "sentences that mi averages", section=INFORMATION, latent=True),
    Metric("mi_posteriors", "", "posteriors in its aggregate", section=INFORMATION, latent=True),
    Metric(
        "marginal_kl",
        "nats",
        "KL(q(z) || p(z)), an upper bound: kl - mi; - where mi is near its cap",
        section=INFORMATION,
        latent=True,
        summary=True,
    ),
    Metric(
        "au",
        "units",
        "active: Var[E q(z|x)] > 0.01",
        better="higher",
        section=INFORMATION,
        latent=True,
        summary=True,
        column=True,
        chart="main",
    ),
    Metric("latent_dim", "units", "dimensions of z", section=INFORMATION, chart="none"),
    Metric("kl_per_dim", "nats", "kl per unit of z", latent=True),
    Metric("au_curve", "units", "active units over thresholds", latent=True),
    Metric(
        "rec_shuffled",
        NATS,
        "rec with the z of another text: far above rec if the decoder uses z",
        better="higher",
        section=USE,
        latent=True,
        summary=True,
    ),
    Metric(
        "rec_prior", NATS, "rec with a z from the prior", section=USE, latent=True, summary=True
    ),
    Metric(
        "rec_shuffled-rec",
        NATS,
        "what another sentence's z costs: near 0 the decoder does not use z",
        better="higher",
        latent=True,
        column=True,
        chart="main",
        difference=("rec_shuffled", "rec"),
    ),
    Metric(
        "exact_match",
        "share",
        "sentences whose text comes back",
        better="higher",
        section=RECONSTRUCTION,
    ),
    Metric(
        "token_accuracy",
        "share",
        "tokens (EOS included) at their place in the reconstruction",
        better="higher",
        section=RECONSTRUCTION,
    ),
    Metric("bleu", "0-100", "corpus BLEU (sacrebleu)", better="higher", section=RECONSTRUCTION),
    Metric("chrf", "0-100", "corpus chrF (sacrebleu)", better="higher", section=RECONSTRUCTION),
    Metric("probes", "accuracy", "one row per label", section=PROBES, latent=True),
    _score("mig", "mutual information gap (Chen et al. 2018)"),
    _score("dci_disentanglement", "each unit for one factor (Eastwood & Williams 2018)"),
    _score("dci_completeness", "each factor in one unit"),
    _score("dci_informativeness", "held-out accuracy of random forests that read the factors"),
    _score("z_diff", "beta-VAE metric (Higgins et al. 2017)"),
    _score(
        "sap",
        "SAP, categorical: held-out balanced accuracy of a tree on the best unit minus the "
        "second best (after Kumar et al. 2018)",
    ),
    _count("sentences", "", constant=True),
    _count("tokens", "EOS included", constant=True),
    _count("words", "whitespace words", constant=True),
    _count("bytes", "UTF-8", constant=True),
    _count("truncated", "sentences cut to max_tokens"),
    _count("unk", "tokens outside the vocabulary"),
    _count("skipped_blank", "blank lines"),
    Metric("max_tokens", "tokens", "longest sentence, EOS included", chart="none"),
    Metric("rec_per_token", "nats/token", "rec per predicted token"),
    Metric("lr", "", "learning rate"),
    Metric("grad_norm", "", "norm of the gradient before clipping"),
    Metric("skipped_steps", "steps", "steps without an update since the start of the phase"),
    Metric("epoch", "epochs", "passes over the training sentences"),
    Metric("tokens_per_s", "tokens/s", "predicted tokens, all ranks", training="speed"),
    Metric("flops_per_s", "FLOP/s", "operations of the model, rank 0", training="speed"),
    Metric("mfu", "share", "flops_per_s of what the device could do", training="speed"),
    Metric("peak_memory_gb", "GB", "most memory since the start, rank 0", training="speed"),
)

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "rec, training and validation": ("main/rec", "valid/rec"),
        "kl, training and validation": ("main/kl", "valid/kl"),
        "loss": ("main/loss",),
        "beta": ("main/beta",),
    },
    "does z matter": {
        "rec by z: own, another's, prior's": ("valid/rec", "valid/rec_shuffled", "valid/rec_prior"),
        "rec_shuffled - rec: what z saves": ("main/rec_shuffled_minus_rec",),
        "kl and mi": ("valid/kl", "main/mi"),
        "active units": ("main/au",),
    },
    "speed": {
        "tokens per second, all ranks": ("speed/tokens_per_s",),
        "model FLOP/s, rank 0": ("speed/flops_per_s",),
        "peak memory (GB), rank 0": ("speed/peak_memory_gb",),
        "MFU, rank 0": ("speed/mfu",),
    },
}
"""TensorBoard's CUSTOM SCALARS: category -> title of a chart -> the tags in it."""


def entry(name: str) -> Metric:
    """The entry of a metric; a plain one for a name that the list does not have."""
    return next((metric for metric in METRICS if metric.name == name), Metric(name))


def differences(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are the difference of two others, where both are there."""
    found = {}
    for metric in METRICS:
        if metric.difference is not None:
            a, b = (metrics.get(name) for name in metric.difference)
            if a is not None and b is not None:
                found[metric.name] = a - b
    return found
