"""The metrics as rows for people: on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

NATS = "nats/sentence"


class Row(NamedTuple):
    """One metric."""

    name: str
    value: str
    error: str
    """Its standard error, empty where it has none."""
    unit: str
    meaning: str


SECTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Likelihood": (
        ("rec", NATS, "-log p(x|z), z from q(z|x): what is left to say once z is known"),
        ("kl", NATS, "KL(q(z|x) || p(z)): what z costs"),
        ("elbo", NATS, "-(rec + kl), a lower bound of log p(x)"),
        ("ppl_token", "", "perplexity a token from the ELBO (an upper bound)"),
        ("ppl_word", "", "perplexity a word from the ELBO (an upper bound)"),
        ("bits_per_byte", "bits", "bits a byte from the ELBO (an upper bound)"),
        ("nll_iw", NATS, "-log p(x), importance-weighted bound with k samples (an upper bound)"),
        ("iw_samples", "k", "samples of the importance-weighted bound"),
        ("iw_ess", "samples", "effective sample size of the k, mean over sentences"),
        ("iw_ess_min", "samples", "... and its least: near 1 the bound is loose"),
        ("ppl_token_iw", "", "perplexity a token from nll_iw (an upper bound)"),
        ("ppl_word_iw", "", "perplexity a word from nll_iw (an upper bound)"),
        ("bits_per_byte_iw", "bits", "bits a byte from nll_iw (an upper bound)"),
    ),
    "Information in z": (
        ("mi", "nats", "I(x; z) under the aggregate posterior; at most mi_cap"),
        ("mi_cap", "nats", "ln of the number of sentences"),
        ("marginal_kl", "nats", "KL(q(z) || p(z)) = kl - mi: how far the latents lie off the prior"),
        ("au", "units", "active: Var[E q(z|x)] > 0.01"),
        ("latent_dim", "units", "dimensions of z"),
    ),
    "Does the decoder use z?": (
        ("rec", NATS, "with its own z"),
        ("rec_shuffled", NATS, "with another sentence's z: far above rec if it does"),
        ("rec_prior", NATS, "with a z from the prior"),
    ),
    "Reconstruction (greedy, from the posterior mean)": (
        ("exact_match", "share", "sentences that come back token by token"),
        ("token_accuracy", "share", "tokens (EOS included) at their place in the reconstruction"),
        ("bleu", "0-100", "corpus BLEU (sacrebleu)"),
        ("chrf", "0-100", "corpus chrF (sacrebleu)"),
    ),
    "Text": (
        ("sentences", "", ""),
        ("tokens", "", "EOS included"),
        ("words", "", "whitespace words"),
        ("bytes", "", "UTF-8"),
        ("truncated", "", "sentences cut to max_tokens"),
        ("unk", "", "tokens outside the vocabulary"),
        ("skipped_blank", "", "blank lines"),
    ),
}
"""Section -> (name, unit, meaning)."""

BASELINE = (
    ("rec", NATS, "-log p(x), exact: a language model without a latent"),
    ("ppl_token", "", "perplexity a token"),
    ("ppl_word", "", "perplexity a word"),
    ("bits_per_byte", "bits", "bits a byte"),
)
"""The likelihood of a model without a latent, which is no bound."""

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
    se = metrics["se"]
    for title, lines in SECTIONS.items():
        if not metrics["latent_dim"]:
            if title not in ("Likelihood", "Text"):
                continue
            lines = BASELINE if title == "Likelihood" else lines
        rows = [
            Row(name, number(metrics[name]), error(metrics[name], se.get(name)), unit, meaning)
            for name, unit, meaning in lines
            if name in metrics
        ]
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
            lines.append(f"  {row.name:<{width}} {row.value:>10} {margin:<9} {row.unit:<13} {row.meaning}".rstrip())
    lines += [f"\nwarning: {warning}" for warning in metrics["warnings"]]
    return "\n".join(lines)


def number(value: float) -> str:
    """A number at the precision that people read."""
    if isinstance(value, int):
        return f"{value:,}"
    if value != value:
        return "-"
    return f"{value:,.{_decimals(value)}f}"


def error(value: float, se: float | None) -> str:
    """A standard error, with as many decimals as its value; empty where there is none."""
    return "" if se is None else "-" if se != se else f"{se:,.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    return 4 if abs(value) < 1 else 3 if abs(value) < 100 else 2 if abs(value) < 1000 else 0


def _use_of_latents(metrics: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    if probes := metrics.get("probes"):
        rows = []
        for label, found in probes.items():
            value, se = found["linear"], found["se"]["linear"]
            knn = f"{number(found['knn'])} ± {error(found['knn'], found['se']['knn'])}"
            about = f"majority {number(found['majority'])}, nearest neighbours {knn}; {found['classes']} classes"
            about += f", {found['left_out']:,} sentences of rare labels left out" if found["left_out"] else ""
            rows.append(Row(label, number(value), error(value, se), "accuracy", about))
        yield "Linear probe of the posterior means, held out", rows
    if scores := metrics.get("disentanglement"):
        rows = [Row(name, number(scores[name]), "", "0-1", meaning) for name, meaning in DISENTANGLEMENT]
        yield "Disentanglement against the factors", rows
