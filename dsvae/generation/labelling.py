"""What the heads of a model say of sentences: clusters, classes and tags.

Every function takes sentences, or records with their conditions, as they stand in files,
and yields in their order. Each raises UserError for a model without that head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
    """Yields (sentence, its most probable cluster from 0, its probability)."""
    _need(vae.model.config.clusters, "clusters", "model.clusters")
    for lines, inputs in vae.inputs.stream(texts, vae.batch_size):
        yield from _most_probable(lines, vae.encode_inputs(inputs).clusters)


def classify_stream(vae: SentenceVAE, texts: Records) -> Iterator[tuple[Line, str, float]]:
    """Yields (sentence, its most probable class, its probability)."""
    names = vae.model.config.classes
    _need(names, "classes", "data.label_column")
    for lines, inputs in vae.inputs.stream(texts, vae.batch_size):
        logits = vae.encode_inputs(inputs).class_logits
        assert logits is not None
        for line, best, probability in _most_probable(lines, logits.softmax(1)):
            yield line, names[best], probability


def tag_stream(vae: SentenceVAE, texts: Records) -> Iterator[tuple[Line, Tagged]]:
    """Yields (sentence, its words with the tags that are most probable together)."""
    names = vae.model.config.tags
    _need(names, "tags", "data.tags_column")
    for lines, inputs in vae.inputs.stream(texts, vae.batch_size, tags=True):
        found = vae.encode_inputs(inputs).tags
        assert found is not None
        assert inputs.words is not None
        for line, numbers, row in zip(lines, inputs.words, found.tolist(), strict=True):
            words = line.text.split()
            own = [words[number] for number in numbers if number != IGNORE]
            yield line, Tagged(own, [names[tag] for tag in row if tag != IGNORE])


def _most_probable(lines: list[Line], rows: Tensor | None) -> Iterator[tuple[Line, int, float]]:
    assert rows is not None
    probabilities, best = rows.max(1)
    return zip(lines, best.tolist(), probabilities.tolist(), strict=True)


def _need(head: Any, name: str, setting: str) -> None:
    if not head:
        raise UserError(f"the model has no {name}: give one that was trained with {setting}")
