"""What `dsvae sample` does: sentences from the prior, the model's or a fitted one, under
conditions, or from the aggregate posterior of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsvae.console import say
from dsvae.errors import UserError
from dsvae.generation.reading import draw_sentences, read_conditions, read_records
from dsvae.generation.sentence_vae import SentenceVAE
from dsvae.modeling.densities import Density


@dataclass(frozen=True)
class Request:
    """The flags of `dsvae sample` that say what is drawn, by their names there."""

    count: int
    condition: str | None
    conditions_file: str | None
    source: str
    file: str | None
    text_column: str
    condition_column: str | None

    @property
    def conditional(self) -> bool:
        """Whether there are conditions."""
        given = (self.condition, self.conditions_file, self.condition_column)
        return any(each is not None for each in given)

    def check(self) -> None:
        """Raises UserError, without a model, for flags that do not belong together and
        files that cannot be used."""
        if (self.source == "aggregate") != (self.file is not None):
            raise UserError(
                "--source aggregate and --file belong together: the file's sentences are encoded "
                "and their z sampled"
            )
        ways = {
            "--condition": self.condition,
            "--conditions_file": self.conditions_file,
            "--file": self.file,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise UserError(
                f"{given[0]} and {given[1]} are given: use one of them; the conditions of the "
                f"sentences of --file are in its --condition_column"
            )
        if self.condition_column is not None and given in ([], ["--condition"]):
            raise UserError(
                "--condition_column is for --conditions_file, or for --source aggregate and "
                "--file: give one of them, or leave it out"
            )
        if self.file is not None:
            read_records(self.file, self.text_column, self.condition_column, "--file")
        if self.conditions_file is not None:
            next(read_conditions(self.conditions_file, self.condition_column), None)


def rows(
    vae: SentenceVAE,
    request: Request,
    prior: Density | None,
    seed: int,
    options: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """The samples as `dsvae sample --json` prints them.

    Args:
        prior: in place of the model's own.
    """
    if vae.latent_dim == 0 and not options.get("do_sample"):
        say("the model has no latent: without --do_sample, a condition has one sentence")
    if request.conditions_file is not None:
        conditions = read_conditions(request.conditions_file, request.condition_column)
        drawn = vae.conditional_stream(conditions, request.count, seed=seed, prior=prior, **options)
        for i, (line, text) in enumerate(drawn):
            sample = i % request.count + 1
            yield {"sample": sample, "line": line.line, "condition": line.text, "sentence": text}
    elif request.file is None:
        condition = {} if request.condition is None else {"condition": request.condition}
        texts = vae.prior_stream(
            request.count, seed=seed, condition=request.condition, prior=prior, **options
        )
        for i, text in enumerate(texts, 1):
            yield {"sample": i, **condition, "sentence": text}
    else:
        lines = draw_sentences(
            request.file, request.text_column, request.count, seed, request.condition_column
        )
        for i, (line, text) in enumerate(vae.posterior_stream(lines, seed=seed, **options), 1):
            own = line.fields
            source = own.pop("sentence")
            yield {"sample": i, "sentence": text, **own, "from": source}
