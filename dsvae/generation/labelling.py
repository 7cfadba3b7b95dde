"""What the heads of a model say of sentences: clusters, classes and tags.

Every function takes sentences, or records with their conditions, as they stand in files,
and yields in their order. Each raises UserError for a model without that head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsvae.data.records import Record
from dsvae.errors import UserError
from dsvae.generation.reading import Line
from dsvae.generation.sentence_vae import SentenceVAE
from dsvae.metrics.tagging import entities
from dsvae.modeling.crf import IGNORE

Records = Iterable[str | Record]


class Tagged(NamedTuple):
    """The words of a sentence and their most probable tags, one per word; words past
    `max_tokens` are left out."""

    words: list[str]
    tags: list[str]

    @property
    def entities(self) -> list[dict[str, Any]]:
        """Of each entity its `type`, its `first` and `last` word, from 0, and its
        `text`."""
        return [
            {
                "type": kind,
                "first": first,
                "last": after - 1,
                "text": " ".join(self.words[first:after]),
            }
            for kind, first, after in entities(self.tags)
        ]


def cluster_stream(vae: SentenceVAE, texts: Records) -> Iterator[tuple[Line, int, float]]:
    """(sentence, its most probable cluster from 0, its probability)."""
    _need(vae, vae.model.config.clusters, "clusters", "model.clusters")
    for lines, inputs in vae.inputs.stream(texts, vae.batch_size):
        (rows,) = vae.read(inputs, "clusters")
        for line, row in zip(lines, rows, strict=True):
            yield line, *_best(row)


def classify_stream(vae: SentenceVAE, texts: Records) -> Iterator[tuple[Line, str, float]]:
    """(sentence, its most probable class, its probability)."""
    names = vae.model.config.classes
    _need(vae, names, "classes", "data.label_column")
    for lines, inputs in vae.inputs.stream(texts, vae.batch_size):
        (rows,) = vae.read(inputs, "class_logits")
        for line, row in zip(lines, rows, strict=True):
            best, probability = _best(row.softmax(0))
            yield line, names[best], probability


def tag_stream(vae: SentenceVAE, texts: Records) -> Iterator[tuple[Line, Tagged]]:
    """(sentence, its words with the tags that are most probable together)."""
    names = vae.model.config.tags
    _need(vae, names, "tags", "data.tags_column")
    for lines, inputs in vae.inputs.stream(texts, vae.batch_size, tags=True):
        words = [each.words or [] for each in inputs]
        # The tags are not known: any label but -100 says that a word begins there.
        labels = [[IGNORE if word == IGNORE else 0 for word in row] for row in words]
        (found,) = vae.read(inputs, "tags", tag_labels=labels)
        for line, numbers, row in zip(lines, words, found, strict=True):
            text = line.text.split()
            places = [number for number in numbers if number != IGNORE]
            tags = [names[tag] for tag in row.tolist() if tag != IGNORE]
            yield line, Tagged([text[place] for place in places], tags)


def _best(probabilities: Tensor) -> tuple[int, float]:
    probability, best = torch.max(probabilities, 0)
    return int(best), float(probability)


def _need(vae: SentenceVAE, head: Any, name: str, setting: str) -> None:
    if not head:
        raise UserError(f"the model has no {name}: give one that was trained with {setting}")
