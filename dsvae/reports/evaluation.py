"""`dsvae evaluate`: measures a finished model on sentences and writes the results.

Every rank loads the model and takes its share of every pass. Rank 0 alone computes
scores and plots from their results, and writes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import datasets
import numpy as np
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dsvae import pretrained
from dsvae.config import DataConfig, convert
from dsvae.data import grammar
from dsvae.data.records import Columns, Record
from dsvae.errors import UserError
from dsvae.files import make_writable, write_json
from dsvae.inference.passes import Passes
from dsvae.metrics import generated
from dsvae.metrics.disentanglement import disentanglement
from dsvae.metrics.evaluate import EVALUATION_SEED, Measured, evaluate
from dsvae.metrics.information import active_unit_curve
from dsvae.metrics.labelled import add
from dsvae.metrics.probes import probe
from dsvae.metrics.reconstruction import fidelity
from dsvae.metrics.reconstruction import samples as show_samples
from dsvae.modeling.families import ACTIVE
from dsvae.modeling.settings import Amount, Count, Seed, at_least
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World, joined
from dsvae.reports.html import write_report
from dsvae.reports.projector import write_projector
from dsvae.reports.sentences import Sentences, check_factors, input_hashes, of_records, read
from dsvae.reports.table import table

SHOWN = 20
"""The largest number of reconstructions and prior samples in the report."""

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate_sentences`."""

    metrics: dict[str, Any]
    """As in metrics.json; the same on every rank."""
    measured: Measured
    pairs: list[tuple[str, str]]
    """(sentence as the user wrote it, greedy reconstruction of its posterior mean)."""
    prior: list[str]
    """Greedy sentences with z from the prior."""


def evaluate_model(
    model: T5VAE,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str | Record],
    *,
    samples: int = 1,
    iw_samples: int | None = None,
    batch_tokens: int = 16384,
    max_tokens: int | None = None,
    seed: int = EVALUATION_SEED,
    noise_sentences: int = 0,
) -> dict[str, Any]:
    """Measures a model on sentences; returns the metrics, with the names and units of
    metrics.json. `se` has the standard error over sentences of every mean.

        from dsvae import evaluate_model
        metrics = evaluate_model(model, tokenizer, ["the food was cold .", ...])
        print(metrics["elbo"], "+-", metrics["se"]["elbo"])

    If torch.distributed is initialized, every rank calls it, and the ranks share the
    work.

    Args:
        model: on the device on which it is to run.
        sentences: texts, or records (`dsvae.data.records.Record`) that also have a
            condition, a label or tags, if the model reads or predicts them.
        samples: samples of z per sentence for the ELBO.
        iw_samples: samples of z per sentence for the importance-weighted bound. None:
            the bound is not measured.
        batch_tokens: the limit of padded tokens per forward pass on one rank; it changes
            only the speed.
        max_tokens: longest sentence in tokens, EOS included. None: that of the model's
            training.
        seed: of the draws of z and of the folds of the probes.
        noise_sentences: how many of the sentences are reconstructed from z with noise, of
            seven lengths; 0: none.

    Raises:
        UserError: on every rank, if an argument does not fit.
    """
    _check({**locals(), "sentences": None})
    _check_noise(model, noise_sentences)
    limit = _limit(model, max_tokens)
    records = [each if isinstance(each, Record) else Record(each) for each in sentences]
    if any(record.condition is None for record in records) and any(r.condition for r in records):
        raise UserError("some records have a condition and some have none: give each one its own")
    condition, label, tags = (
        kind if any(getattr(record, kind) is not None for record in records) else None
        for kind in ("condition", "label", "tags")
    )
    columns = Columns("text", condition, label, tags)
    where = "the list of sentences"
    text = of_records(records, columns, model.config, tokenizer, limit, where, where)
    with joined() if dist.is_initialized() else nullcontext() as world:
        passes = Passes(model, world, token_budget=batch_tokens)
        return evaluate_sentences(
            passes,
            tokenizer,
            text,
            samples=samples,
            iw_samples=iw_samples,
            max_tokens=limit,
            seed=seed,
            noise_sentences=noise_sentences,
        ).metrics


def evaluate_directory(
    model_dir: str,
    test_file: str | None = None,
    labels_file: str | None = None,
    output: str | None = None,
    samples: int = 1,
    iw_samples: int | None = None,
    batch_tokens: int = 16384,
    text_column: str = "text",
    max_tokens: int | None = None,
    seed: int = EVALUATION_SEED,
    condition_column: str | None = None,
    label_column: str | None = None,
    tags_column: str | None = None,
    sentences: int | None = None,
    precision: pretrained.Precision = "fp32",
    noise_sentences: int = 0,
) -> dict[str, Any]:
    """Runs `dsvae evaluate`: measures the model of a directory, prints a table, and
    writes metrics.json, report.html and the projector's files.

    Under deepspeed, torchrun or srun every process calls it. The ranks share the work,
    and rank 0 prints and writes.

    The arguments are the flags of `dsvae evaluate`, and its help describes them.

    Returns: the metrics, on every rank, as `evaluate_model`.

    Raises:
        UserError: on every rank, before anything is written.
    """
    _check(locals())
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with joined() as world:
        model, tokenizer = _main_first(
            world, lambda: pretrained.load(model_dir, world.device, precision)
        )
        _check_noise(model, noise_sentences)
        limit = _limit(model, max_tokens)
        columns = Columns(text_column, condition_column, label_column, tags_column)
        text = _main_first(
            world,
            lambda: read(
                test_file, labels_file, columns, model.config, tokenizer, limit, sentences
            ),
        )
        if model.config.has_latent:
            world.run_on_rank0(lambda: check_factors(text))
        directory = _default_output(model_dir) if output is None else Path(output).expanduser()
        world.run_on_rank0(lambda: make_writable(directory, "--output"))
        evaluation = evaluate_sentences(
            Passes(model, world, token_budget=batch_tokens),
            tokenizer,
            text,
            samples=samples,
            iw_samples=iw_samples,
            max_tokens=limit,
            seed=seed,
            noise_sentences=noise_sentences,
        )
        evaluation.metrics["model"] = str(model_dir)
        world.run_on_rank0(lambda: _write(directory, evaluation, text))
        return evaluation.metrics


def evaluate_sentences(
    passes: Passes,
    tokenizer: PreTrainedTokenizerBase,
    text: Sentences,
    *,
    samples: int,
    iw_samples: int | None,
    max_tokens: int,
    seed: int,
    noise_sentences: int = 0,
) -> Evaluation:
    """Measures a model and writes nothing; arguments as in `evaluate_model`.
    Collective."""
    split, config, world = text.split, passes.model.config, passes.world
    metrics, measured = evaluate(
        passes,
        split,
        samples=samples,
        iw_samples=iw_samples,
        seed=seed,
        entropy=None if text.factors is None else grammar.ENTROPY,
        unk=text.counts["unk"],
    )
    pairs: list[tuple[str, str]] = []
    prior: list[str] = []
    if config.has_latent:
        metrics["au_curve"] = active_unit_curve(measured.posterior)
        every = np.arange(len(split))
        options = (max_tokens, noise_sentences, seed)
        add(metrics, fidelity(passes, split, measured, every, text.texts, tokenizer, *options))
        metrics |= world.run_on_rank0(lambda: _use_of_latents(passes.model, measured, text, seed))
    if config.has_latent or config.conditional:
        shown = np.argsort(split.content_keys)[:SHOWN]
        pairs, prior = show_samples(passes, split, measured.encoded, tokenizer, shown, max_tokens)
        pairs = [(text.texts[i], decoded) for i, (_, decoded) in zip(shown, pairs, strict=False)]
        add(metrics, _generated(passes, tokenizer, measured, text, max_tokens, seed))
    metrics |= {name: count for name, count in text.counts.items() if name != "truncated"}
    metrics |= {
        "latent_dim": passes.family.units,
        "latent_vectors": config.latent_vectors if config.has_latent else 0,
        "source": text.source,
        "max_tokens": max_tokens,
        "precision": pretrained.precision_of(passes.model),
        "evaluator": f"dsvae {version('dsvae')}",
        "estimators": _estimators(samples, iw_samples, config.has_latent),
        "policies": _policies(max_tokens, tokenizer.is_fast, config, metrics.get("conditions")),
    }
    metrics["warnings"] += text.warnings
    if not metrics["au"] and ("probes" in metrics or "disentanglement" in metrics):
        metrics["warnings"].append(
            "no unit of z is active, so the probes and the scores of disentanglement are null"
        )
    return Evaluation(metrics, measured, pairs, prior)


def _generated(
    passes: Passes,
    tokenizer: PreTrainedTokenizerBase,
    measured: Measured,
    text: Sentences,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Computes the metrics of greedy sentences with z from the prior. Collective."""
    world = passes.world
    if not passes.model.config.conditional:
        outputs = generated.decode_prior(passes, tokenizer, max_tokens, seed)
        return world.run_on_rank0(lambda: generated.of_prior(outputs, seed))
    assert text.conditions is not None
    conditions, prior = text.conditions, measured.encoded.prior
    answers = generated.decode_conditions(passes, text.split, prior, tokenizer, max_tokens, seed)
    return world.run_on_rank0(
        lambda: generated.of_conditional(answers, text.split, text.texts, conditions)
    )


def _use_of_latents(model: T5VAE, measured: Measured, text: Sentences, seed: int) -> dict[str, Any]:
    """Computes probes for every label, and disentanglement if the factors are known, of
    the active units; null if none is active."""
    posterior = measured.posterior
    active = np.flatnonzero((posterior.activity() > ACTIVE).numpy())
    width = model.family.latent_width // model.family.units
    columns = (active[:, None] * width + np.arange(width)).ravel()
    means, drawn = (z.double().numpy()[:, columns] for z in (posterior.point, measured.draws))
    # Random numbers below follow the order of the rows, which must not be that of the file.
    keys = text.split.content_keys
    hashes = input_hashes(text.split, model.config)
    results: dict[str, Any] = {}
    if text.labels:
        # Sentences that the encoder reads alike have the same posterior. Which of their
        # labels gets which of their draws must not depend on the order of the file either.
        drawn_in_order = drawn[np.lexsort((keys, hashes))]
        results["probes"] = dict.fromkeys(text.labels)
        for name, values in text.labels.items() if len(active) else ():
            order = np.lexsort((values, hashes))
            place = np.flatnonzero(values[order] != "")
            order = order[place]
            arrays = means[order], drawn_in_order[place], values[order], hashes[order]
            results["probes"][name] = probe(*arrays, seed)
    if text.factors is not None:
        names, order = list(grammar.FACTORS), np.argsort(keys)
        results["disentanglement"] = None
        if len(active):
            inputs = means[order], drawn[order], text.factors[order]
            scores = disentanglement(*inputs, names, seed, width)
            results["disentanglement"] = {**scores, "dimensions": active.tolist()}
    return results


def _estimators(samples: int, iw_samples: int | None, has_latent: bool) -> dict[str, str]:
    """Returns the estimator of each likelihood."""
    bounded = "ppl_token, ppl_word, bits_per_byte"
    if not has_latent:
        return {f"rec, {bounded}": "log p(x) itself: without a latent, nothing is bounded"}
    estimators = {
        f"elbo, {bounded}": f"ELBO with closed-form KL and {samples} sample(s) of z per sentence "
        "(Kingma & Welling 2014): log p(x) from below, perplexities from above"
    }
    if iw_samples:
        names = ", ".join(f"{name}_iw" for name in ("nll", *bounded.split(", ")))
        estimators[names] = (
            f"importance-weighted bound with k = {iw_samples} (Burda et al. 2016): tighter, in "
            "the same direction"
        )
    return estimators


def _policies(
    max_tokens: int, offsets: bool, config: PreTrainedConfig, conditions: int | None
) -> dict[str, str]:
    """Says how everything was counted, for people.

    Args:
        conditions: how many have generated sentences, if any.
    """
    policies = {}
    only_z = "tokens are not sampled, only z varies"
    if config.conditional:
        draws = f"{generated.DRAWS} draws of z from p(z|c)" if config.has_latent else "a sentence"
        policies["condition"] = (
            "every likelihood is that of the sentence given its condition; rec_shuffled has the z "
            "of another text and the sentence's own condition"
        )
        policies["generated sentences"] = (
            f"greedy decoding of {draws} for each of {conditions} conditions, chosen by hash: "
            f"{only_z}; BLEU against at most {generated.REFERENCES} texts of the condition"
        )
    elif config.has_latent:
        policies["generated sentences"] = (
            f"greedy decoding of {generated.OUTPUTS} draws of z from p(z): {only_z}"
        )
    compared = "the end of its last token" if offsets else "its last token, as decoded text"
    return policies | {
        "end of sentence": "EOS is predicted: it is part of every likelihood, is one of the "
        "tokens, and counts as one more word in ppl_word and one more byte in bits_per_byte",
        "truncation": f"sentences over {max_tokens} tokens (EOS included) are cut to that, EOS "
        "last, and counted in truncated; words and bytes are those of the remaining text",
        "unknown": "tokens outside the vocabulary are predicted as one unknown piece and counted "
        "in unk: with many, likelihoods are too good, and comparable only under one tokenizer",
        "reconstruction": "exact_match, bleu and chrf compare with the sentence as it is in the "
        f"source; a truncated one is compared up to {compared}",
        "blank": "blank lines are skipped and counted in skipped_blank",
        "standard errors": "over sentences: deviation / sqrt(N); for ratios and perplexities by "
        "linearization (the delta method)",
    }


def _default_output(model_dir: str) -> Path:
    """Returns `evaluation` in the model's directory. For a hub id it is in the current
    directory: one with the name of the model would hide it."""
    directory = Path(model_dir).expanduser()
    return directory / "evaluation" if directory.is_dir() else Path("evaluation")


def _check_noise(model: T5VAE, noise_sentences: int) -> None:
    """Raises UserError if noise is asked for and z is not a point to add it to."""
    if noise_sentences and not (model.config.has_latent and model.family.continuous):
        what = "has no latent" if not model.config.has_latent else "has a latent of categories"
        raise UserError(f"noise_sentences {noise_sentences}: this model {what}; leave it out")


def _limit(model: T5VAE, max_tokens: int | None) -> int:
    """Returns the longest sentence in tokens: as given, or as in the model's
    training."""
    room = model.config.room
    if max_tokens and room and max_tokens > room:
        raise UserError(f"--max_tokens is {max_tokens}: the vectors of this model hold {room}")
    return max_tokens or model.config.max_tokens or room or DataConfig.max_tokens


def _main_first(world: World, load: Callable[[], T]) -> T:
    """Calls `load` on every rank, on rank 0 first. A UserError of one is raised on
    all."""
    box: list[T] = []
    world.run_on_rank0(lambda: box.append(load()))
    return world.run_on_all(lambda: box[0] if world.is_main else load())


_KINDS = {
    "samples": Count,
    "iw_samples": Count | None,
    "sentences": Count | None,
    "batch_tokens": Count,
    "max_tokens": Annotated[int, at_least(2)] | None,
    "seed": Seed,
    "noise_sentences": Amount,
}


def _check(given: Mapping[str, Any]) -> None:
    """Raises UserError for a number that its kind excludes."""
    for name, kind in _KINDS.items():
        value = given.get(name)
        if name in given and type(convert(value, kind, name)) is not type(value):
            raise UserError(f"{name} must be a whole number, not {value!r}")


def _write(directory: Path, evaluation: Evaluation, text: Sentences) -> None:
    """Writes and prints everything; metrics.json last, as a sign that all is there."""
    metrics, measured = evaluation.metrics, evaluation.measured
    write_projector(directory / "projector", measured.posterior, text)
    write_report(
        directory / "report.html", metrics, measured, text, evaluation.pairs, evaluation.prior
    )
    write_json(directory / "metrics.json", {"test": metrics})
    print(f"{table(metrics)}\n\nreport       {directory / 'report.html'}")
    print(f"metrics      {directory / 'metrics.json'}")
    if metrics["latent_dim"]:
        print(f"projector    tensorboard --logdir {directory / 'projector'}")
