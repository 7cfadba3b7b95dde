"""What each metric means and how its value is written: one list for the console, model
cards, reports and comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
        ("entropy", NATS, "of the corpus itself: no code needs less than this"),
        (
            "above_entropy",
            NATS,
            "rec + kl - entropy: what the model still pays above the best possible code",
        ),
        ("ppl_token", "", "perplexity a token from the ELBO (an upper bound)"),
        ("ppl_word", "", "perplexity a word from the ELBO (an upper bound)"),
        ("bits_per_byte", "bits", "bits a byte from the ELBO (an upper bound)"),
        ("nll_iw", NATS, "-log p(x), importance-weighted bound with k samples (an upper bound)"),
        ("iw_samples", "k", "samples of the importance-weighted bound"),
        ("iw_ess", "samples", "effective sample size of the k of nll_iw, mean over sentences"),
        ("iw_ess_min", "samples", "... and its least: near 1 the bound is loose"),
        ("ppl_token_iw", "", "perplexity a token from nll_iw (an upper bound)"),
        ("ppl_word_iw", "", "perplexity a word from nll_iw (an upper bound)"),
        ("bits_per_byte_iw", "bits", "bits a byte from nll_iw (an upper bound)"),
    ),
    "Information in z": (
        ("mi", "nats", "I(x; z), a lower bound: at most mi_cap"),
        ("mi_upper", "nats", "I(x; z), an upper bound"),
        ("mi_cap", "nats", "ln of mi_posteriors"),
        ("mi_sentences", "", "sentences that mi was measured on"),
        ("mi_posteriors", "", "posteriors in its aggregate"),
        (
            "marginal_kl",
            "nats",
            "KL(q(z) || p(z)), an upper bound: kl - mi; - where mi is near its cap",
        ),
        ("au", "units", "active: Var[E q(z|x)] > 0.01"),
        ("latent_dim", "units", "dimensions of z"),
    ),
    "Does the decoder use z?": (
        ("rec", NATS, "with its own z"),
        (
            "rec_shuffled",
            NATS,
            "rec with the z of another text: far above rec if the decoder uses z",
        ),
        ("rec_prior", NATS, "rec with a z from the prior"),
    ),
    "Reconstruction (greedy, from the posterior mean)": (
        ("exact_match", "share", "sentences whose text comes back"),
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
    ("entropy", NATS, "of the corpus itself: no code needs less than this"),
    (
        "above_entropy",
        NATS,
        "rec - entropy: what the model still pays above the best possible code",
    ),
    ("ppl_token", "", "perplexity a token"),
    ("ppl_word", "", "perplexity a word"),
    ("bits_per_byte", "bits", "bits a byte"),
)
"""The likelihood of a model without a latent, which is no bound."""

MEANING: dict[str, tuple[str, str]] = {
    name: (unit, meaning) for lines in reversed(SECTIONS.values()) for name, unit, meaning in lines
}
"""Metric -> unit, meaning, in the section where it comes first."""


def described(lines: Iterable[tuple[str, str, str]], metrics: dict[str, Any]) -> list[Row]:
    """The rows (name, unit, meaning) of the metrics that are there, with their values.

    Args:
        metrics: name -> value in the unit of its row; None, as JSON has it, where it is
            not finite. `se`, if there: standard errors by name.
    """
    se = metrics.get("se", {})
    return [
        Row(name, number(metrics[name]), error(metrics[name], se.get(name)), unit, meaning)
        for name, unit, meaning in lines
        if name in metrics
    ]


def number(value: float | None) -> str:
    """A number at the precision that people read; "-" for what is not finite, which
    JSON has as null."""
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.{_decimals(value)}f}"


def error(value: float | None, se: float | None) -> str:
    """A standard error, with as many decimals as its value; "-" where one of them is
    not finite, empty where there is none."""
    if se is None:
        return ""
    return (
        "-"
        if value is None or not math.isfinite(value) or not math.isfinite(se)
        else f"{se:,.{_decimals(value)}f}"
    )


def _decimals(value: float) -> int:
    return 4 if abs(value) < 1 else 3 if abs(value) < 100 else 2 if abs(value) < 1000 else 0
