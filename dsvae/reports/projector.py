"""The latents for TensorBoard's projector, with sentences and labels as metadata."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dsvae.files import replace_directory
from dsvae.modeling.families import Distribution
from dsvae.reports.sentences import Sentences

POINTS = 10_000
"""The most points that the projector shows smoothly."""


def write_projector(directory: Path, posterior: Distribution, text: Sentences) -> None:
    """Writes the posterior means of at most `POINTS` sentences as a TensorBoard log
    directory, whole or not at all.

    A model without a latent has none: only an older directory is removed.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if posterior.point.shape[1]:
        chosen = np.sort(np.argsort(text.split.content_keys)[:POINTS])
        columns = {
            "sentence": [text.texts[i] for i in chosen],
            "tokens": text.split.lengths[chosen].tolist(),
            **{name: values[chosen].tolist() for name, values in text.labels.items()},
        }
        rows = [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
        with SummaryWriter(str(temporary)) as writer:
            writer.add_embedding(
                posterior.point[chosen],
                metadata=rows,
                metadata_header=list(columns),
                tag="posterior_mean",
            )
    if temporary.is_dir():
        replace_directory(temporary, directory)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def _cell(value: object) -> str:
    """Text in a cell of a .tsv file, which has no escapes."""
    return " ".join(str(value).split()) or " "
