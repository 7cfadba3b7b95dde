"""What `dsvae edit` does: categories that are set, or a move toward a label."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsvae.console import progress
from dsvae.errors import UserError
from dsvae.generation.inputs import repeated
from dsvae.generation.reading import check_labels, read_labels, read_records
from dsvae.generation.sentence_vae import SentenceVAE

Change = Callable[[SentenceVAE, Tensor], tuple[Tensor, dict[str, Any]]]
"""Maps a model and z (1, Z) to the edited z and what was asked for, for the output."""


def read_change(
    categories: str | None,
    toward: str | None,
    labels_file: str | None,
    text_file: str | None,
    strength: float | None,
    text_column: str,
    condition: str | None,
    condition_column: str | None,
) -> Change:
    """Reads the flags of `dsvae edit`; returns what they ask for, checked as far as it
    can be without a model: categories to set, or a move along an attribute vector.

    Raises:
        UserError: flags that do not belong together, or files that do not fit.
    """
    if condition_column is not None and (condition is None or text_file is None):
        raise UserError(
            "--condition_column is for the sentences of --text_file, beside --condition for the "
            "edited one: give all three, or leave it out"
        )
    if condition is not None and text_file is not None and condition_column is None:
        raise UserError(
            "--condition is given, and the sentences of --text_file have no conditions: give "
            "--condition_column, too"
        )
    needed = {"--toward": toward, "--labels_file": labels_file, "--text_file": text_file}
    if categories is not None:
        given = [
            name for name, value in {**needed, "--strength": strength}.items() if value is not None
        ]
        if given:
            raise UserError(f"--set and {given[0]} are given: use one way to edit")
        asked = read_categories(categories)
        names = {str(variable): category for variable, category in asked.items()}
        return lambda vae, point: (vae.with_categories(point, asked), {"set": names})
    if toward is None or labels_file is None or text_file is None:
        missing = next(name for name, value in needed.items() if value is None)
        raise UserError(
            f"{missing} is missing: give --toward, --labels_file and --text_file, or --set for a "
            f"categorical latent"
        )
    check_labels(labels_file, text_file, text_column, toward)
    if condition_column is not None:  # checks the column before the model loads
        next(read_records(text_file, text_column, condition_column, "--text_file"), None)

    def move(vae: SentenceVAE, point: Tensor) -> tuple[Tensor, dict[str, Any]]:
        records = read_records(text_file, text_column, condition_column, "--text_file")
        shown = progress(records, prints_rows=False)
        direction = vae.attribute_vector(shown, read_labels(labels_file), toward)
        length = 1.0 if strength is None else strength
        return vae.move(point, length * direction), {"strength": length}

    return move


def read_categories(text: str) -> dict[int, int]:
    """Reads variable -> category of `3=7,5=0`.

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
    change: Change,
    seed: int,
    condition: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Decodes a sentence as it is and edited; returns both with what was asked for.

    Sampled tokens of the reconstruction and of the edited sentence come from the same
    random numbers: they differ by the edit alone.
    """
    # Checks the sentence before a file is encoded.
    point = vae.encode([sentence], repeated(condition)).point
    edited, asked = change(vae, point)
    row: dict[str, Any] = {"sentence": sentence}
    for name, latent in (("reconstruction", point), ("edited", edited)):
        torch.manual_seed(seed)
        row[name] = vae.decode(latent, repeated(condition), **options)[0]
    return {**row, **asked}
