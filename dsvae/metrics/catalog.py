"""Every metric once: its unit, its meaning, its better direction, and the places that
show it.

The console, TensorBoard, the model card, report.html and `dsvae compare` all read this
list. A new metric needs the function that computes it, its call in
`dsvae.metrics.evaluate`, and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any, Literal

NATS, SCORE, BLEU = "nats/sentence", "0-1", "0-100"
Better = Literal["lower", "higher"] | None
LOWER: Better = "lower"
HIGHER: Better = "higher"
USE = "Does the decoder use z?"


class Place(Flag):
    """A place that shows a metric, besides the table of `dsvae evaluate` and
    report.html, which have all that is in a section."""

    SUMMARY = auto()
    """The lines at the end of a run, and the model card."""
    COLUMN = auto()
    """The table of `dsvae compare`, whose CSV file has every metric."""
    MAIN = auto()
    """TensorBoard's group `main`, of validation text; elsewhere the group of its
    split."""
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
    better: Better = None
    """None for a metric without a better direction, such as kl."""
    places: Place = NOWHERE
    section: str | None = None
    """Its section in the table of `dsvae evaluate` and in report.html; None: no row."""
    second_row: tuple[str, str] | None = None
    """Section and meaning of a second row with the same value."""
    meaning_without_latent: str | None = None
    """Its meaning for a model without a latent, whose likelihood is not a bound. None: the
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


def _any(
    name: str, unit: str, meaning: str, better: Better = None, places: Place = NOWHERE
) -> Metric:
    """Makes a metric that means the same with and without a latent."""
    return Metric(name, unit, meaning, better, places, meaning_without_latent=meaning)


def _bound(name: str, unit: str, meaning: str, better: Better, places: Place) -> Metric:
    """Makes a metric that is exact without a latent."""
    from_elbo = f"{meaning} from the ELBO (an upper bound)"
    return Metric(name, unit, from_elbo, better, places, meaning_without_latent=meaning)


def _z(
    name: str,
    unit: str,
    meaning: str,
    better: Better = None,
    places: Place = NOWHERE,
    difference: tuple[str, str] | None = None,
) -> Metric:
    """Makes a metric of the latent."""
    return Metric(name, unit, meaning, better, places, latent=True, difference=difference)


def _factor(name: str, meaning: str) -> Metric:
    return _z(f"disentanglement.{name}", SCORE, meaning, HIGHER)


_QUARTERS = ((1, "below 1/4"), (2, "from 1/4 to 1/2"), (3, "from 1/2 to 3/4"), (4, "above 3/4"))

METRICS: tuple[Metric, ...] = (
    Metric("loss", NATS, "training loss: rec + beta * penalty", None, PROGRESS),
    *_section(
        "Likelihood",
        Metric(
            *("rec", NATS, "reconstruction loss, -log p(x|z) for z from q(z|x)"),
            *(LOWER, SHOWN | PROGRESS),
            second_row=(USE, "with the sentence's own z"),
            meaning_without_latent="-log p(x), exact: a language model without a latent",
        ),
        _z("kl", NATS, "KL(q(z|x) || p(z))", None, SHOWN | PROGRESS),
        Metric("elbo", NATS, "-(rec + kl), a lower bound of log p(x)", HIGHER, SHOWN),
        _any("entropy", NATS, "of the corpus: no code needs less", None, SUMMARY),
        Metric(
            *("above_entropy", NATS, "rec + kl - entropy: excess over the best code"),
            *(LOWER, SUMMARY),
            meaning_without_latent="rec - entropy: excess over the best code",
        ),
        _bound("ppl_token", "", "perplexity per token", LOWER, SHOWN),
        _bound("ppl_word", "", "perplexity per word", LOWER, SUMMARY),
        _bound("bits_per_byte", "bits", "bits per byte", LOWER, SHOWN),
        _any(
            "token_accuracy_forced",
            "share",
            "tokens (EOS included) that are the likeliest ones after the true ones",
            HIGHER,
            SHOWN | MAIN,
        ),
        Metric("nll_iw", NATS, "-log p(x), importance-weighted upper bound", LOWER, SHOWN),
        Metric("iw_samples", "k", "samples of nll_iw", None, SUMMARY | NO_CHART),
        Metric("iw_ess", "samples", "effective sample size of nll_iw, mean", None, SHOWN),
        Metric("iw_ess_min", "samples", "its minimum: near 1 the bound is loose"),
        Metric("ppl_token_iw", "", "perplexity per token from nll_iw (an upper bound)", LOWER),
        Metric("ppl_word_iw", "", "perplexity per word from nll_iw (an upper bound)", LOWER),
        Metric("bits_per_byte_iw", "bits", "bits per byte from nll_iw (an upper bound)", LOWER),
    ),
    *_section(
        "Prior by flow matching",
        _z("flow_loss", "", "squared error of the velocity, per number", LOWER, SHOWN | PROGRESS),
        *(_z(f"flow_loss_t{i}", "", f"the same for times {t}", LOWER) for i, t in _QUARTERS),
    ),
    Metric("beta", "", "weight of the KL term", None, PROGRESS),
    Metric("class_nats", NATS, "-log p(label|x), 0 without a label", LOWER, PROGRESS),
    Metric("tag_nats", NATS, "-log p(tags|x), 0 without tags", LOWER, PROGRESS),
    Metric("distance", "1 - cosine", "of z from the first encoder's states", LOWER, PROGRESS),
    *_section(
        "Information in z",
        _z("mi", "nats", "I(x; z), a lower bound: at most mi_cap", HIGHER, SHOWN | MAIN),
        _z("mi_upper", "nats", "I(x; z), an upper bound", None, SHOWN),
        _z("mi_cap", "nats", "ln of mi_posteriors", None, SUMMARY | NO_CHART),
        _z("mi_sentences", "", "sentences that mi averages"),
        _z("mi_posteriors", "", "posteriors in its aggregate"),
        _z("marginal_kl", "nats", "KL(q(z) || p(z)) = kl - mi, an upper bound", None, SUMMARY),
        _z("au", "units", "active units: activity above 0.01", HIGHER, SHOWN | MAIN),
        Metric("latent_dim", "units", "dimensions or variables of z", None, NO_CHART),
        Metric("latent_vectors", "vectors", "vectors of z, at most", None, NO_CHART),
        _z("tokens_per_vector", "tokens", "tokens per vector of z", None, NO_CHART),
        _z("numbers_per_token", "numbers", "numbers of z per token", None, SHOWN | NO_CHART),
        _z("nats_per_token", "nats/token", "kl per token", None, SHOWN),
        _z("participation_ratio", "directions", "in which the means vary", None, SHOWN | MAIN),
        _z("participation_ratio_vector", "directions", "in which vectors vary", None, SHOWN),
        _z("hoyer", SCORE, "Hoyer sparsity of the decoded point: 1 for one non-zero entry"),
        _z("hoyer_draws", SCORE, "Hoyer sparsity of draws of z"),
        _z("units_used", "units", "dimensions per sentence that are not in the spike"),
        _z("tc", "nats", "total correlation under q(z); - if there are too many codes"),
        _z("tc_pairwise", "nats", "mutual information of pairs of variables, summed"),
        _z("marginal_kl_units", "nats", "sum of KL(q(z_d) || p(z_d)): kl = mi + tc + this"),
    ),
    *_section(
        USE,
        _z("rec_shuffled", NATS, "rec with another text's z: above rec if used", HIGHER, SUMMARY),
        _z("rec_prior", NATS, "rec with z from the prior", None, SUMMARY),
    ),
    _z(
        *("rec_shuffled-rec", NATS, "loss by another text's z: near 0 if z is not used"),
        *(HIGHER, COLUMN | MAIN),
        difference=("rec_shuffled", "rec"),
    ),
    *_section(
        "Reconstruction (greedy, from the posterior mean)",
        _z("exact_match", "share", "sentences whose text comes back", HIGHER, SHOWN),
        _z(
            *("token_accuracy_free", "share", "places of the longer text with the right token"),
            *(HIGHER, SHOWN),
        ),
        _z("bleu", BLEU, "corpus BLEU (sacrebleu)", HIGHER, SHOWN),
        _z("chrf", BLEU, "corpus chrF (sacrebleu)", HIGHER),
        _z("bleu_area", BLEU, "mean bleu over noise on z of 0 to 1 std(z)", HIGHER, SHOWN),
        _z("noise_sentences", "", "sentences of bleu_area", None, NO_CHART),
    ),
    *_section(
        "Linear probe of the posterior means, held out",
        _z("probes", "accuracy", "one row per label"),
    ),
    *_section(
        "Disentanglement against the factors, posterior means",
        _factor("mig", "mutual information gap (Chen et al. 2018)"),
        _factor("dci_disentanglement", "each unit for one factor (Eastwood & Williams 2018)"),
        _factor("dci_completeness", "each factor in one unit"),
        _factor("dci_informativeness", "held-out accuracy of random forests on the units"),
        _factor("z_diff", "beta-VAE metric (Higgins et al. 2017)"),
        _factor("sap", "separated attribute predictability (after Kumar et al. 2018)"),
    ),
    *_section(
        "Generated sentences (greedy, z from the prior)",
        _any("adherence", "share", "outputs that say what their condition says", HIGHER),
        _any("adherence_classifier", "share", "accuracy of adherence's classifier on texts"),
        _any("triples", "", "choices of tense, polarity, type per condition, mean", HIGHER),
        _any("conditions", "", "different conditions", None, NO_CHART),
        _any("outputs", "", "generated sentences", None, NO_CHART),
        _any("distinct_1", "share", "different words of all words, outputs pooled", HIGHER),
        _any("distinct_2", "share", "different word pairs of all pairs, pooled", HIGHER),
        _any("self_bleu", BLEU, "BLEU of an output against all others", LOWER),
        _any("self_bleu_max", BLEU, "of the output most like others"),
        _any("self_bleu_min", BLEU, "of the output least like others"),
        _any("self_bleu_outputs", "", "outputs that self_bleu compares", None, NO_CHART),
        _any("distinct_1_within", "share", "distinct_1 of one condition, mean", HIGHER),
        _any("distinct_2_within", "share", "distinct_2 of one condition, mean", HIGHER),
        _any("self_bleu_within", BLEU, "BLEU against others of the condition", LOWER),
        _any("self_bleu_within_max", BLEU, "of the output most like others, mean"),
        _any("self_bleu_within_min", BLEU, "of the output least like others, mean"),
        _any("bleu_max", BLEU, "BLEU of the best output of a condition, mean", HIGHER),
        _any("bleu_mean", BLEU, "BLEU of an output against the data, mean", HIGHER),
        _any("bleu_min", BLEU, "BLEU of the worst output of a condition, mean", HIGHER),
        _any("bleu_precision", BLEU, "output and its closest reference", HIGHER),
        _any("bleu_recall", BLEU, "reference and its closest output", HIGHER),
    ),
    *(
        replace(metric, name=f"samples.{metric.name}")
        for metric in (
            Metric("generative_ppl", "", "per token, by the language model", LOWER, COLUMN),
            Metric("reverse_ppl", "", "per word, of the reference by trigrams", LOWER, COLUMN),
            Metric("unigram_entropy", "nats", "of the words of all texts together", None, COLUMN),
            Metric("distinct_1", "share", "different words of all words", HIGHER),
            Metric("distinct_2", "share", "different word pairs of all pairs", HIGHER),
            Metric("distinct_3", "share", "different 3-grams of all 3-grams", HIGHER),
            Metric("distinct_4", "share", "different 4-grams of all 4-grams", HIGHER, COLUMN),
            Metric("diversity", "share", "distinct_2 * distinct_3 * distinct_4", HIGHER, COLUMN),
            Metric("self_bleu", BLEU, "BLEU of a text against 499 others", LOWER),
            Metric("memorisation", "share", "4-grams that one training text has", LOWER, COLUMN),
            Metric("copies", "share", "texts that are a training text", LOWER, COLUMN),
            Metric("length_distance", "words", "1-Wasserstein, to the reference", LOWER, COLUMN),
            Metric("words", "words", "per text, mean"),
            Metric("mauve", SCORE, "MAUVE to the reference", HIGHER, COLUMN),
            Metric("valid", "share", "sentences of the built-in corpus", HIGHER, COLUMN),
            Metric("factor_kl", "nats", "of a factor to the truth, the largest", LOWER, COLUMN),
            Metric("pair_kl", "nats", "of two factors to the truth, the largest", LOWER),
            Metric("texts", "", "texts per row", None, COLUMN),
            Metric("blank", "", "texts without a word, which have no perplexity"),
        )
    ),
    *_section(
        "Clusters against the labels",
        _any("b3_precision", SCORE, "share of its cluster with its label", HIGHER, SUMMARY),
        _any("b3_recall", SCORE, "share of its label in its cluster", HIGHER, SUMMARY),
        _any("b3_f1", SCORE, "harmonic mean of b3_precision and b3_recall", HIGHER, SHOWN | MAIN),
        _any("b3_f1_one_cluster", SCORE, "b3_f1 if all were in one cluster", None, SHOWN),
        _any("b3_f1_random", SCORE, "b3_f1 of random clusters of these sizes", None, SHOWN),
        _any("homogeneity", SCORE, "1 - H(label given cluster) / H(label)", HIGHER),
        _any("completeness", SCORE, "1 - H(cluster given label) / H(cluster)", HIGHER),
        _any("v_measure", SCORE, "harmonic mean of homogeneity and completeness", HIGHER, SHOWN),
        _any("v_measure_random", SCORE, "v_measure of random clusters (of one: 0)", None, SHOWN),
        _any("ari", "", "adjusted Rand index: 0 for random clusters, 1 at most", HIGHER, SHOWN),
        _any("clusters_used", "", "clusters that a sentence is in", None, SUMMARY),
        _any("label_values", "", "different labels", None, NO_CHART),
    ),
    *_section(
        "Classes and tags",
        _any("class_accuracy", SCORE, "sentences with the right class", HIGHER, SHOWN | MAIN),
        _any("class_majority", SCORE, "accuracy of the commonest class", None, SHOWN | NO_CHART),
        _any("class_macro_f1", SCORE, "F1 of each class, mean over the classes", HIGHER, SHOWN),
        _any("class_f1", SCORE, "F1 of the class that is asked for", HIGHER, SUMMARY),
        _any("entity_precision", SCORE, "predicted entities that are right", HIGHER, SUMMARY),
        _any("entity_recall", SCORE, "true entities that are found", HIGHER, SUMMARY),
        _any("entity_f1", SCORE, "harmonic mean of the two (strict IOB2)", HIGHER, SHOWN | MAIN),
        _any("entities", "", "true entities", None, SUMMARY | NO_CHART),
        _any("entities_predicted", "", "predicted entities"),
        _any("labelled", "", "sentences with a label", None, NO_CHART),
        _any("tagged", "", "sentences with tags", None, NO_CHART),
    ),
    *_section(
        "Text",
        _any("sentences", "", "", None, NO_CHART),
        _any("tokens", "", "EOS included", None, NO_CHART),
        _any("words", "", "whitespace words", None, NO_CHART),
        _any("bytes", "", "UTF-8", None, NO_CHART),
        _any("truncated", "", "sentences cut to max_tokens"),
        _any("unk", "", "tokens outside the vocabulary"),
        _any("skipped_blank", "", "blank lines"),
        _any("conditions_truncated", "", "conditions cut to max_tokens"),
        _any("tags_truncated", "", "tags cut off with their words"),
    ),
    Metric("samples", "", "z drawn per sentence for rec", None, NO_CHART),
    _z("kl_per_dim", "nats", "kl per unit of z"),
    _z("au_curve", "units", "active units over thresholds"),
    _z("by_length", "", "the scores of reconstructions by the tokens of the sentence"),
    _z("noise", "", "the scores of reconstructions by the noise on z, in std(z)"),
    Metric("max_tokens", "tokens", "longest sentence, EOS included", None, NO_CHART),
    Metric("rec_per_token", "nats/token", "rec per predicted token"),
    Metric("free_bits", "nats", "KL threshold, if it changes (phase2.release)"),
    Metric("lr", "", "learning rate"),
    Metric("grad_norm", "", "norm of the gradient before clipping"),
    Metric("skipped_steps", "steps", "steps without an update since the start of the phase"),
    Metric("epoch", "epochs", "passes over the training sentences"),
    Metric("tokens_per_s", "tokens/s", "predicted tokens, all ranks", None, SPEED),
    Metric("flops_per_s", "FLOP/s", "operations of the model, rank 0", None, SPEED),
    Metric("mfu", "share", "flops_per_s of what the device could do", None, SPEED),
    Metric("peak_memory_gb", "GB", "peak memory since the start, rank 0", None, SPEED),
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
    "prior": {
        "flow_loss, training and validation (averaged)": ("main/flow_loss", "valid/flow_loss"),
        "flow_loss by time, validation": tuple(f"valid/flow_loss_t{i}" for i, _ in _QUARTERS),
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
    """Returns the entry of a metric; a plain one for an unlisted name."""
    return next((metric for metric in METRICS if metric.name == name), Metric(name))


def differences(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Computes the metrics that are the difference of two others, if both are there."""
    values = {}
    for metric in METRICS:
        if metric.difference is not None:
            a, b = (metrics.get(name) for name in metric.difference)
            if a is not None and b is not None:
                values[metric.name] = a - b
    return values
