"""Every metric once: its unit, its meaning, its better direction, and where it is shown.

The console, TensorBoard, the model card, report.html and `dsvae compare` all read this
list. A new metric needs the function that computes it and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any, Literal

NATS = "nats/sentence"
USE = "Does the decoder use z?"


class Place(Flag):
    """A place that shows a metric, besides the table of `dsvae evaluate` and report.html,
    which have all that is in a section."""

    SUMMARY = auto()
    """The lines at the end of a run, and the model card."""
    COLUMN = auto()
    """The table of `dsvae compare`, whose CSV file has every metric."""
    MAIN = auto()
    """TensorBoard's group `main`, of validation text; elsewhere the group of its split."""
    NO_CHART = auto()
    """Not in TensorBoard: a constant would be a straight line."""
    PROGRESS = auto()
    """The progress bar and TensorBoard's group `main`, of a training step."""
    SPEED = auto()
    """TensorBoard's group `speed`, of a training step; elsewhere `other`."""


NOWHERE, SUMMARY, COLUMN, MAIN = Place(0), Place.SUMMARY, Place.COLUMN, Place.MAIN
SHOWN = SUMMARY | COLUMN
NO_CHART, PROGRESS, SPEED = Place.NO_CHART, Place.PROGRESS, Place.SPEED


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    """Its key in metrics.json or in a logged training step; `outer.inner` if nested."""
    unit: str = ""
    meaning: str = ""
    better: Literal["lower", "higher"] | None = None
    """None for a metric without a better direction, such as kl."""
    places: Place = NOWHERE
    section: str | None = None
    """Its section in the table of `dsvae evaluate` and in report.html; None: no row."""
    again: tuple[str, str] | None = None
    """Section and meaning of a second row with the same value."""
    exact: str | None = None
    """Its meaning for a model without a latent, whose likelihood is no bound. None: the
    tables of such a model leave it out."""
    latent: bool = False
    """Whether it describes z. `dsvae compare` drops it for a model without a latent."""
    difference: tuple[str, str] | None = None
    """(a, b) of a metric that is a - b and is not stored in metrics.json."""

    @property
    def training_group(self) -> str:
        """Its TensorBoard group in a logged training step."""
        return "main" if PROGRESS in self.places else "speed" if SPEED in self.places else "other"


def _section(title: str, *metrics: Metric) -> tuple[Metric, ...]:
    return tuple(replace(metric, section=title) for metric in metrics)


def _count(name: str, meaning: str, places: Place = NOWHERE) -> Metric:
    return Metric(name, "", meaning, None, places, exact=meaning)


def _output(
    name: str,
    unit: str,
    meaning: str,
    better: Literal["lower", "higher"] | None = None,
    places: Place = NOWHERE,
) -> Metric:
    """A metric of what a model puts out, with or without a latent."""
    return Metric(name, unit, meaning, better, places, exact=meaning)


def _score_of(
    name: str,
    meaning: str,
    places: Place = SUMMARY,
    better: Literal["lower", "higher"] | None = "higher",
) -> Metric:
    """A score in [0, 1] of the heads, with or without a latent."""
    return Metric(name, "0-1", meaning, better, places, exact=meaning)


def _score(name: str, meaning: str) -> Metric:
    return Metric(f"disentanglement.{name}", "0-1", meaning, "higher", latent=True)


METRICS: tuple[Metric, ...] = (
    Metric("loss", NATS, "rec + beta * penalty, as it was trained", None, PROGRESS),
    *_section(
        "Likelihood",
        Metric(
            "rec",
            NATS,
            "-log p(x|z), z from q(z|x): what is left to say once z is known",
            "lower",
            SUMMARY | COLUMN | PROGRESS,
            again=(USE, "with the sentence's own z"),
            exact="-log p(x), exact: a language model without a latent",
        ),
        Metric(
            "kl",
            NATS,
            "KL(q(z|x) || p(z)): what z costs",
            None,
            SUMMARY | COLUMN | PROGRESS,
            latent=True,
        ),
        Metric("elbo", NATS, "-(rec + kl), a lower bound of log p(x)", "higher", SUMMARY | COLUMN),
        Metric(
            "entropy",
            NATS,
            "of the corpus itself: no code needs less than this",
            None,
            SUMMARY,
            exact="of the corpus itself: no code needs less than this",
        ),
        Metric(
            "above_entropy",
            NATS,
            "rec + kl - entropy: what the model pays above the best possible code",
            "lower",
            SUMMARY,
            exact="rec - entropy: what the model pays above the best possible code",
        ),
        Metric(
            "ppl_token",
            "",
            "perplexity per token from the ELBO (an upper bound)",
            "lower",
            SUMMARY | COLUMN,
            exact="perplexity per token",
        ),
        Metric(
            "ppl_word",
            "",
            "perplexity per word from the ELBO (an upper bound)",
            "lower",
            SUMMARY,
            exact="perplexity per word",
        ),
        Metric(
            "bits_per_byte",
            "bits",
            "bits per byte from the ELBO (an upper bound)",
            "lower",
            SUMMARY | COLUMN,
            exact="bits per byte",
        ),
        Metric(
            "nll_iw",
            NATS,
            "-log p(x), importance-weighted bound with k samples (an upper bound)",
            "lower",
            SUMMARY | COLUMN,
        ),
        Metric(
            "iw_samples", "k", "samples of the importance-weighted bound", None, SUMMARY | NO_CHART
        ),
        Metric(
            "iw_ess",
            "samples",
            "effective sample size of the k of nll_iw, mean over sentences",
            None,
            SUMMARY | COLUMN,
        ),
        Metric(
            "iw_ess_min", "samples", "the smallest effective sample size: near 1 the bound is loose"
        ),
        Metric("ppl_token_iw", "", "perplexity per token from nll_iw (an upper bound)", "lower"),
        Metric("ppl_word_iw", "", "perplexity per word from nll_iw (an upper bound)", "lower"),
        Metric("bits_per_byte_iw", "bits", "bits per byte from nll_iw (an upper bound)", "lower"),
    ),
    Metric("beta", "", "weight of the KL term", None, PROGRESS),
    Metric("class_nats", NATS, "-log p(label|x), 0 without a label", "lower", PROGRESS),
    Metric("tag_nats", NATS, "-log p(tags|x), 0 without tags", "lower", PROGRESS),
    *_section(
        "Information in z",
        Metric(
            "mi",
            "nats",
            "I(x; z), a lower bound: at most mi_cap",
            "higher",
            SUMMARY | COLUMN | MAIN,
            latent=True,
        ),
        Metric("mi_upper", "nats", "I(x; z), an upper bound", None, SUMMARY | COLUMN, latent=True),
        Metric("mi_cap", "nats", "ln of mi_posteriors", None, SUMMARY | NO_CHART, latent=True),
        Metric("mi_sentences", "", "sentences that mi averages", latent=True),
        Metric("mi_posteriors", "", "posteriors in its aggregate", latent=True),
        Metric(
            "marginal_kl",
            "nats",
            "KL(q(z) || p(z)), an upper bound: kl - mi; - where mi is near its cap",
            None,
            SUMMARY,
            latent=True,
        ),
        Metric(
            "au",
            "units",
            "units whose activity exceeds 0.01",
            "higher",
            SUMMARY | COLUMN | MAIN,
            latent=True,
        ),
        Metric("latent_dim", "units", "dimensions or variables of z", None, NO_CHART),
        Metric(
            "hoyer",
            "0-1",
            "sparsity of the decoded point: 1 for one non-zero entry per sentence",
            latent=True,
        ),
        Metric("hoyer_draws", "0-1", "the same of draws of z", latent=True),
        Metric(
            "units_used", "units", "dimensions per sentence that are not in the spike", latent=True
        ),
        Metric(
            "tc",
            "nats",
            "total correlation of the variables under q(z); - where there are too many codes",
            latent=True,
        ),
        Metric("tc_pairwise", "nats", "information of pairs of variables, summed", latent=True),
        Metric(
            "marginal_kl_units",
            "nats",
            "KL(q(z_d) || p(z_d)), summed over the variables: kl = mi + tc + this",
            latent=True,
        ),
    ),
    *_section(
        USE,
        Metric(
            "rec_shuffled",
            NATS,
            "rec with the z of another text: far above rec if the decoder uses z",
            "higher",
            SUMMARY,
            latent=True,
        ),
        Metric("rec_prior", NATS, "rec with a z from the prior", None, SUMMARY, latent=True),
    ),
    Metric(
        "rec_shuffled-rec",
        NATS,
        "what another sentence's z costs: near 0 the decoder does not use z",
        "higher",
        COLUMN | MAIN,
        latent=True,
        difference=("rec_shuffled", "rec"),
    ),
    *_section(
        "Reconstruction (greedy, from the posterior mean)",
        Metric("exact_match", "share", "sentences whose text comes back", "higher"),
        Metric(
            "token_accuracy",
            "share",
            "tokens (EOS included) at their place in the reconstruction",
            "higher",
        ),
        Metric("bleu", "0-100", "corpus BLEU (sacrebleu)", "higher"),
        Metric("chrf", "0-100", "corpus chrF (sacrebleu)", "higher"),
    ),
    *_section(
        "Linear probe of the posterior means, held out",
        Metric("probes", "accuracy", "one row per label", latent=True),
    ),
    *_section(
        "Disentanglement against the factors, posterior means",
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
    ),
    *_section(
        "Generated sentences (greedy, z from the prior)",
        _output("adherence", "share", "outputs that say what their condition says", "higher"),
        _output("adherence_classifier", "share", "of texts that adherence's classifier gets right"),
        _output("triples", "", "choices of tense, polarity, type per condition, mean", "higher"),
        _output("conditions", "", "different conditions", None, NO_CHART),
        _output("outputs", "", "generated sentences", None, NO_CHART),
        _output("distinct_1", "share", "different words of all words, outputs pooled", "higher"),
        _output("distinct_2", "share", "different word pairs of all pairs, pooled", "higher"),
        _output("self_bleu", "0-100", "BLEU of an output against all others", "lower"),
        _output("self_bleu_max", "0-100", "of the output most like others"),
        _output("self_bleu_min", "0-100", "of the output least like others"),
        _output("self_bleu_outputs", "", "outputs that self_bleu compares", None, NO_CHART),
        _output("distinct_1_within", "share", "distinct_1 of one condition, mean", "higher"),
        _output("distinct_2_within", "share", "distinct_2 of one condition, mean", "higher"),
        _output("self_bleu_within", "0-100", "BLEU against others of the condition", "lower"),
        _output("self_bleu_within_max", "0-100", "of the output most like others, mean"),
        _output("self_bleu_within_min", "0-100", "of the output least like others, mean"),
        _output("bleu_max", "0-100", "BLEU of the best output of a condition, mean", "higher"),
        _output("bleu_mean", "0-100", "BLEU of an output against the data, mean", "higher"),
        _output("bleu_min", "0-100", "BLEU of the worst output of a condition, mean", "higher"),
        _output("bleu_precision", "0-100", "output and its closest reference", "higher"),
        _output("bleu_recall", "0-100", "reference and its closest output", "higher"),
    ),
    *_section(
        "Clusters against the labels",
        _score_of("b3_precision", "share of a sentence's cluster with its label"),
        _score_of("b3_recall", "share of a sentence's label in its cluster"),
        _score_of("b3_f1", "harmonic mean of b3_precision and b3_recall", SHOWN | MAIN),
        _score_of("b3_f1_one_cluster", "b3_f1 if all were in one cluster", SHOWN, None),
        _score_of("b3_f1_random", "b3_f1 of random clusters of these sizes", SHOWN, None),
        _score_of("homogeneity", "1 - H(label given cluster) / H(label)", NOWHERE),
        _score_of("completeness", "1 - H(cluster given label) / H(cluster)", NOWHERE),
        _score_of("v_measure", "harmonic mean of homogeneity and completeness", SHOWN),
        _score_of("v_measure_random", "v_measure of random clusters (of one: 0)", SHOWN, None),
        _output(
            "ari", "", "adjusted Rand index: 0 for random clusters, 1 at most", "higher", SHOWN
        ),
        _output("clusters_used", "", "clusters that a sentence is in", None, SUMMARY),
        _output("label_values", "", "different labels", None, NO_CHART),
    ),
    *_section(
        "Classes and tags",
        _score_of("class_accuracy", "sentences with the right class", SHOWN | MAIN),
        _score_of("class_majority", "the same for the commonest class", SHOWN | NO_CHART, None),
        _score_of("class_macro_f1", "F1 of each class, mean over the classes", SHOWN),
        _score_of("class_f1", "F1 of the class that is asked for"),
        _score_of("entity_precision", "predicted entities that are right"),
        _score_of("entity_recall", "true entities that are found"),
        _score_of("entity_f1", "harmonic mean of the two (strict IOB2)", SHOWN | MAIN),
        _output("entities", "", "true entities", None, SUMMARY | NO_CHART),
        _output("entities_predicted", "", "predicted entities"),
        _output("labelled", "", "sentences with a label", None, NO_CHART),
        _output("tagged", "", "sentences with tags", None, NO_CHART),
    ),
    *_section(
        "Text",
        _count("sentences", "", NO_CHART),
        _count("tokens", "EOS included", NO_CHART),
        _count("words", "whitespace words", NO_CHART),
        _count("bytes", "UTF-8", NO_CHART),
        _count("truncated", "sentences cut to max_tokens"),
        _count("unk", "tokens outside the vocabulary"),
        _count("skipped_blank", "blank lines"),
        _count("conditions_truncated", "conditions cut to max_tokens"),
        _count("tags_truncated", "tags cut off with their words"),
    ),
    Metric("samples", "", "z drawn per sentence for rec", None, NO_CHART),
    Metric("kl_per_dim", "nats", "kl per unit of z", latent=True),
    Metric("au_curve", "units", "active units over thresholds", latent=True),
    Metric("max_tokens", "tokens", "longest sentence, EOS included", None, NO_CHART),
    Metric("rec_per_token", "nats/token", "rec per predicted token"),
    Metric("free_bits", "nats", "KL threshold, where it changes (phase2.release)"),
    Metric("lr", "", "learning rate"),
    Metric("grad_norm", "", "norm of the gradient before clipping"),
    Metric("skipped_steps", "steps", "steps without an update since the start of the phase"),
    Metric("epoch", "epochs", "passes over the training sentences"),
    Metric("tokens_per_s", "tokens/s", "predicted tokens, all ranks", None, SPEED),
    Metric("flops_per_s", "FLOP/s", "operations of the model, rank 0", None, SPEED),
    Metric("mfu", "share", "flops_per_s of what the device could do", None, SPEED),
    Metric("peak_memory_gb", "GB", "most memory since the start, rank 0", None, SPEED),
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
    "labels": {
        "-log p of labels and tags, training": ("main/class_nats", "main/tag_nats"),
        "scores of heads, validation": ("main/class_accuracy", "main/entity_f1", "main/b3_f1"),
    },
    "speed": {
        "tokens per second, all ranks": ("speed/tokens_per_s",),
        "model FLOP/s, rank 0": ("speed/flops_per_s",),
        "peak memory (GB), rank 0": ("speed/peak_memory_gb",),
        "MFU, rank 0": ("speed/mfu",),
    },
}
"""TensorBoard's CUSTOM SCALARS: category -> title of a chart -> the tags in it. "does z
matter" is for runs with a latent, and "labels" for those with labels or tags."""


def entry(name: str) -> Metric:
    """The entry of a metric; a plain one for an unlisted name."""
    return next((metric for metric in METRICS if metric.name == name), Metric(name))


def differences(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are the difference of two others, if both are there."""
    values = {}
    for metric in METRICS:
        if metric.difference is not None:
            a, b = (metrics.get(name) for name in metric.difference)
            if a is not None and b is not None:
                values[metric.name] = a - b
    return values
