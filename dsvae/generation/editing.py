"""What `dsvae edit` does: categories that are set, or a move toward a label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsvae.console import progress
from dsvae.errors import UserError
from dsvae.generation.reading import check_labels, read_labels, read_sentences
from dsvae.generation.sentence_vae import SentenceVAE


@dataclass(frozen=True)
class Toward:
    """A move along the attribute vector of a label."""

    label: str
    labels_file: str
    text_file: str
    text_column: str
    strength: float


def read_request(
    categories: str | None,
    toward: str | None,
    labels_file: str | None,
    text_file: str | None,
    strength: float | None,
    text_column: str,
) -> dict[int, int] | Toward:
    """What the flags of `dsvae edit` ask for, checked as far as it can be without a
    model.

    Returns: variable -> category, or a move.

    Raises:
        UserError: flags that do not belong together, or files that do not fit.
    """
    needed = {"--toward": toward, "--labels_file": labels_file, "--text_file": text_file}
    if categories is not None:
        given = [
            name for name, value in {**needed, "--strength": strength}.items() if value is not None
        ]
        if given:
            raise UserError(f"--set and {given[0]} are given: use one way to edit")
        return read_categories(categories)
    if toward is None or labels_file is None or text_file is None:
        missing = next(name for name, value in needed.items() if value is None)
        raise UserError(
            f"{missing} is missing: give --toward, --labels_file and --text_file, or --set for a "
            f"categorical latent"
        )
    check_labels(labels_file, text_file, text_column, toward)
    strength = 1.0 if strength is None else strength
    return Toward(toward, labels_file, text_file, text_column, strength)


def read_categories(text: str) -> dict[int, int]:
    """Variable -> category of `3=7,5=0`.

    Raises:
        UserError: anything else.
    """
    found: dict[int, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)=(\d+)\s*", part, re.ASCII)
        if match is None:
            raise UserError(
                f"--set is {text!r}: write VARIABLE=CATEGORY, for example 3=7 or 3=7,5=0"
            )
        variable, category = map(int, match.groups())
        if variable in found:
            raise UserError(f"--set names variable {variable} twice")
        found[variable] = category
    return found


def edit(
    vae: SentenceVAE,
    sentence: str,
    request: dict[int, int] | Toward,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """A sentence as it is, reconstructed, and edited, with what was asked for.

    Sampled tokens of the reconstruction and of the edited sentence come from the same
    random numbers: they differ by the edit alone.
    """
    point = vae.encode([sentence]).point  # checks the sentence before a file is encoded
    if isinstance(request, Toward):
        texts = read_sentences(request.text_file, request.text_column, "--text_file")
        direction = vae.attribute_vector(
            progress(texts, prints_rows=False), read_labels(request.labels_file), request.label
        )
        edited = point + request.strength * direction
        asked: dict[str, Any] = {"strength": request.strength}
    else:
        edited = vae.with_categories(point, request)
        asked = {"set": {str(variable): category for variable, category in request.items()}}
    row: dict[str, Any] = {"sentence": sentence}
    for name, latent in (("reconstruction", point), ("edited", edited)):
        torch.manual_seed(seed)
        row[name] = vae.decode(latent, **options)[0]
    return {**row, **asked}
