"""What `dsvae sample` does: sentences from the prior, the model's or a fitted one,
under conditions, or from the aggregate posterior of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsvae.console import say
from dsvae.errors import UserError
from dsvae.generation.reading import draw_sentences, read_conditions, read_records
from dsvae.generation.sentence_vae import Prior, SentenceVAE


def check(
    condition: str | None,
    conditions_file: str | None,
    file: str | None,
    text_column: str,
    condition_column: str | None,
    source: str,
) -> None:
    """Raises UserError, without a model, for flags of `dsvae sample` that do not belong
    together and files that cannot be used."""
    if (source == "aggregate") != (file is not None):
        raise UserError(
            "--source aggregate and --file belong together: the file's sentences are encoded "
            "and their z sampled"
        )
    ways = {"--condition": condition, "--conditions_file": conditions_file, "--file": file}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{given[0]} and {given[1]} are given: use one of them; the conditions of the "
            f"sentences of --file are in its --condition_column"
        )
    if condition_column is not None and given in ([], ["--condition"]):
        raise UserError(
            "--condition_column is for --conditions_file, or for --source aggregate and "
            "--file: give one of them, or leave it out"
        )
    if file is not None:
        read_records(file, text_column, condition_column, "--file")
    if conditions_file is not None:
        next(read_conditions(conditions_file, condition_column), None)


def rows(
    vae: SentenceVAE,
    count: int,
    condition: str | None,
    conditions_file: str | None,
    file: str | None,
    text_column: str,
    condition_column: str | None,
    *,
    seed: int,
    prior: Prior | None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields the samples as `dsvae sample --json` prints them.

    Args:
        prior: in place of the model's own.
        options: of transformers' `generate`.
    """
    if not vae.model.config.has_latent and not options.get("do_sample"):
        say("the model has no latent: without --do_sample, a condition has one sentence")
    if conditions_file is not None:
        conditions = read_conditions(conditions_file, condition_column)
        drawn = vae.conditional_stream(conditions, count, seed=seed, prior=prior, **options)
        for i, (line, text) in enumerate(drawn):
            found = {"line": line.line, "condition": line.text, "sentence": text}
            yield {"sample": i % count + 1, **found}
    elif file is None:
        known = {} if condition is None else {"condition": condition}
        texts = vae.prior_stream(count, seed=seed, condition=condition, prior=prior, **options)
        yield from ({"sample": i, **known, "sentence": text} for i, text in enumerate(texts, 1))
    else:
        lines = draw_sentences(file, text_column, count, seed, condition_column)
        for i, (line, text) in enumerate(vae.posterior_stream(lines, seed=seed, **options), 1):
            own = line.fields
            source = own.pop("sentence")
            yield {"sample": i, "sentence": text, **own, "from": source}
