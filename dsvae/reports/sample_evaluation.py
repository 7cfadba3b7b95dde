"""`dsvae evaluate_samples`: measures generated texts beside held-out ones, those of a
language model, and those of N(0, I)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from dsvae import pretrained
from dsvae.console import say
from dsvae.data.readers import read_file
from dsvae.errors import UserError
from dsvae.files import make_writable, write_json, write_text
from dsvae.generation.fitted_prior import load_prior
from dsvae.generation.flow_prior import FlowPrior
from dsvae.generation.options import SolverKind, SourceKind, check
from dsvae.generation.sentence_vae import find_device
from dsvae.generation.session import session
from dsvae.inference.passes import Passes, texts_of
from dsvae.metrics import catalog
from dsvae.metrics.samples import LONGEST, Reader, by_hash, has_mauve, of_samples
from dsvae.modeling.settings import Precision
from dsvae.parallel.world import World
from dsvae.reports.table import error, markdown, number
from dsvae.reports.templates import render

OWN, HELD_OUT, LANGUAGE_MODEL, NORMAL = "samples", "held-out", "language model", "N(0, I)"
"""Names of the rows."""
ENOUGH = 2_000
"""Texts below which the numbers are hard to compare with those of others."""
SHOWN = 8
BUDGET = 16_384
"""Padded tokens per pass of the language model."""


def evaluate_samples(
    model_or_file: str,
    reference: str,
    lm: str,
    train_file: str | None,
    source: SourceKind,
    steps: int | None,
    solver: SolverKind | None,
    guidance: float | None,
    label: str | None,
    samples: int,
    output: str | None,
    text_column: str,
    seed: int,
    max_tokens: int,
    batch_size: int,
    device: str | None,
    precision: Precision,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Runs `dsvae evaluate_samples`: prints the table, and writes samples.json and
    samples.html. The arguments are its flags, which its help describes.

    Returns: what is in samples.json.

    Raises:
        UserError: before anything is written.
    """
    check(options)
    logging.disable_progress_bar()
    is_file = Path(model_or_file).expanduser().is_file()
    if is_file and (source != "prior" or options):
        raise UserError(f"{model_or_file} is a file of texts: leave out --source and options")
    flow = FlowPrior.of(source, steps, solver, guidance, label)
    if source == "aggregate" and train_file is None:
        raise UserError("--source aggregate draws from q(z|x) of texts: give --train_file")
    train = None
    if train_file is not None:
        train = functools.partial(_file, train_file, "--train_file", text_column)
        train()  # a mistake in it is an error now
    held_out = by_hash(_texts(_file(reference, "--reference", text_column)))
    own = by_hash(_texts(_file(model_or_file, "FILE", text_column))) if is_file else []
    # As many in each row, because most numbers depend on it; and as many or more held out.
    count = min(samples, len(held_out) // 2, len(own) if is_file else samples)
    if count < 2:
        raise UserError(
            f"{count} texts to compare: give at least 2 texts, and 4 of --reference, half of which "
            "are a row of their own"
        )
    directory = Path(output).expanduser() if output else _default_output(model_or_file, is_file)
    make_writable(directory, "--output")

    where = find_device(device)
    model, tokenizer = pretrained.load(lm, where, precision)
    if model.config.has_latent or model.config.conditional:
        raise UserError(f"{lm} is not a language model: give a model of injection none")
    passes = Passes(model, World(0, 0, 1, where), token_budget=BUDGET)
    rows: dict[str, Sequence[str]] = {OWN: own[:count]}
    if not is_file:
        texts = list(_texts(train())) if source == "aggregate" and train else None
        prior = load_prior(model_or_file) if source == "fitted" else flow
        opened = session(
            model_or_file,
            device=device,
            precision=precision,
            max_tokens=max_tokens,
            batch_size=batch_size,
            options=options,
            seed=seed,
        )
        with opened as (vae, seed):
            rows[OWN] = vae.sample(count, texts=texts, prior=prior, seed=seed, **options)
            if source != "prior":
                torch.manual_seed(seed)
                rows[NORMAL] = vae.sample(count, seed=seed, **options)
    rows[HELD_OUT] = held_out[:count]
    rows[LANGUAGE_MODEL] = _of_language_model(passes, tokenizer, count, seed)
    reader, rest = Reader(passes, tokenizer), held_out[count:]
    metrics = of_samples(rows, rest, _texts(train()) if train else None, reader, seed)
    for name, row in rows.items():
        metrics[name]["examples"] = list(row[:SHOWN])
    results = {
        "model": model_or_file,
        "source": "file" if is_file else source,
        "flow": None if flow is None else vars(flow),
        "options": options,
        "reference": str(reference),
        "train_file": train_file,
        "language_model": lm,
        "features": f"the last decoder state of {lm}",
        "samples": count,
        "reference_texts": len(rest),
        "seed": seed,
        "precision": precision,
        "evaluator": f"dsvae {version('dsvae')}",
        "warnings": _warnings(count, train_file),
        "rows": metrics,
    }
    print(table(results))
    html = render("samples.html.jinja", m=results, columns=columns(results), about=_about(results))
    write_text(directory / "samples.html", html)
    write_json(directory / "samples.json", results)
    print(f"\nreport       {directory / 'samples.html'}")
    print(f"metrics      {directory / 'samples.json'}")
    return results


def columns(results: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the table as text: heading -> a cell per row."""
    rows = results["rows"]
    found = {"texts of": list(rows)}
    for metric in _metrics(rows):
        name = metric.name.removeprefix("samples.")
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]
        found[name + arrow] = [
            f"{number(row[name])} ± {error(row[name], row['se'][name])}"
            if name in row["se"]
            else number(row[name])
            for row in rows.values()
        ]
    return found


def table(results: dict[str, Any]) -> str:
    """Writes the results for the console: a Markdown table, what its columns mean, and
    what the numbers depend on."""
    shown = columns(results)
    lines = [markdown(shown, set(shown) - {"texts of"}), ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in _about(results).items()]
    lines += [
        "",
        f"{results['samples']:,} texts per row; {results['reference_texts']:,} other held-out "
        f"texts of {results['reference']}; language model {results['language_model']}; features "
        f"of MAUVE: {results['features']}.",
    ]
    return "\n".join([*lines, *(f"\nwarning: {warning}" for warning in results["warnings"])])


def _metrics(rows: dict[str, dict[str, Any]]) -> list[catalog.Metric]:
    return [
        metric
        for metric in catalog.METRICS
        if metric.name.startswith("samples.")
        and all(metric.name.removeprefix("samples.") in row for row in rows.values())
    ]


def _about(results: dict[str, Any]) -> dict[str, str]:
    """Returns the meaning of each column, with its unit."""
    return {
        metric.name.removeprefix("samples."): ", ".join(filter(None, (metric.meaning, metric.unit)))
        for metric in _metrics(results["rows"])
    }


def _warnings(count: int, train_file: str | None) -> list[str]:
    """Writes down what a reader of the numbers must know, one sentence each."""
    found = []
    if count < ENOUGH:
        found.append(
            f"{count:,} texts per row: the numbers depend on how many there are, and {ENOUGH:,} "
            "are usual; give more --samples and more --reference texts"
        )
    if train_file is None:
        found.append("memorisation and copies are null: give the training text (--train_file)")
    if not has_mauve():
        found.append("mauve is null: pip install 'dsvae[mauve]'")
    return found


def _of_language_model(passes: Passes, tokenizer: Any, count: int, seed: int) -> list[str]:
    """Draws texts from a language model, token by token."""
    say(f"{count:,} texts of the language model")
    torch.manual_seed(seed)
    limit = passes.model.config.max_tokens or LONGEST
    drawn = passes.generate(torch.zeros(count, 0), do_sample=True, top_k=0, max_new_tokens=limit)
    return texts_of(drawn, tokenizer)


def _file(file: str, option: str, text_column: str) -> Iterator[str]:
    return read_file(Path(file).expanduser(), option, text_column)


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """Yields the texts that are not blank, stripped."""
    return (text.strip() for text in lines if text.strip())


def _default_output(model_or_file: str, is_file: bool) -> Path:
    """Returns `evaluation` in the model's directory; for a file or a hub id, in the
    current one."""
    directory = Path(model_or_file).expanduser()
    return directory / "evaluation" if directory.is_dir() and not is_file else Path("evaluation")
