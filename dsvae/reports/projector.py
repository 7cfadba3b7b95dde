"""The latents for TensorBoard's projector, with sentences and labels as metadata."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dsvae.files import whole_directory
from dsvae.modeling.families import Distribution
from dsvae.reports.sentences import Sentences

POINTS = 10_000
"""The largest number of points that the projector shows smoothly."""


def write_projector(directory: Path, posterior: Distribution, text: Sentences) -> None:
    """Writes at most `POINTS` posterior means as a TensorBoard log directory, whole or
    not at all. Without a latent, an older directory is removed."""
    if posterior.point.shape[1]:
        chosen = np.sort(np.argsort(text.split.content_keys)[:POINTS])
        names = ["sentence", "tokens", *text.labels]
        columns: list[Any] = [text.texts, text.split.lengths, *text.labels.values()]
        # a .tsv file, which has no escapes
        rows = [[" ".join(str(c[i]).split()) or " " for c in columns] for i in chosen]
        with whole_directory(directory) as temporary, SummaryWriter(str(temporary)) as writer:
            point = posterior.point[chosen]
            writer.add_embedding(point, rows, metadata_header=names, tag="posterior_mean")
    else:
        shutil.rmtree(directory, ignore_errors=True)
