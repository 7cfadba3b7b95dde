"""Sentences with labels as tokens, for the other scripts here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dsvae.config import DataConfig
from dsvae.data.readers import labelled, read_labels, read_records
from dsvae.data.record_tokens import tokenize
from dsvae.data.records import Columns
from dsvae.data.tokenization import TokenizedSplit
from dsvae.modeling.t5_vae import T5VAE


@dataclass(frozen=True)
class Labelled:
    """N sentences, none of them blank."""

    texts: list[str]
    labels: NDArray[np.str_]
    """(N,)"""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, places: NDArray[np.integer]) -> Labelled:
        return Labelled([self.texts[i] for i in places], self.labels[places])

    def draw(self, count: int, seed: int) -> Labelled:
        """`count` sentences without replacement, in the order of the file; all if there
        are no more."""
        rng = np.random.default_rng(seed)
        return self.select(np.sort(rng.choice(len(self), min(count, len(self)), replace=False)))


def read(text_file: str, labels_file: str) -> Labelled:
    """The sentences of a file with their labels. Raises UserError as the library's
    readers, and where there are not as many labels as sentences."""
    records = read_records(Path(text_file), "FILE", Columns())
    every = labelled(records, read_labels(Path(labels_file), "LABELS"), text_file, labels_file)
    kept = [record for record in every if record.text.strip()]
    labels = np.array([record.label for record in kept])
    return Labelled([record.text.strip() for record in kept], labels)


def longest(model: T5VAE) -> int:
    """The longest sentence in tokens that a model was trained on."""
    return model.config.max_tokens or DataConfig.max_tokens


def tokens(
    sentences: Labelled, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[TokenizedSplit, Labelled]:
    """The sentences as token ids, and those of which the tokenizer leaves something."""
    split, kept, _ = tokenize(sentences.texts, tokenizer, max_tokens, "the file")
    return split, sentences.select(kept)
