"""Records as token ids: conditions, label numbers and tags beside the ids of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from dsvae.data.records import Columns, Record
from dsvae.data.tagging import tagged_ids
from dsvae.data.tokenization import (
    FEATURES,
    TokenizedSplit,
    collect,
    encode,
    hash_of,
    token_ids,
)
from dsvae.errors import UserError
from dsvae.modeling.crf import IGNORE

_EXTRA = {
    "condition": {
        "condition_ids": datasets.List(datasets.Value("int32")),
        "condition_hash": datasets.Value("uint64"),
    },
    "label": {"class_label": datasets.Value("int32")},
    "tags": {"tag_ids": datasets.List(datasets.Value("int32"))},
}


class Names(NamedTuple):
    """The labels and tags that a model knows. Their places are its numbers for them."""

    labels: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def features_of(kinds: Iterable[str]) -> datasets.Features:
    """The columns of tokenized records that have `kinds`: text, condition, label,
    tags."""
    extra = {name: value for kind in kinds for name, value in _EXTRA.get(kind, {}).items()}
    return datasets.Features({**FEATURES, **extra})


def encode_records(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    figures: Counter[str],
    names: Names,
    where: str,
    kept: list[int] | None = None,
) -> dict[str, list]:
    """The columns of one batch, those of `encode` and what `features_of` adds.

    Args:
        batch: kind -> (B,) values of the records: `text`, and `condition`, `label` and
            `tags` where they are read.
        figures: counts are added to it, beside those of `encode`:
            `conditions_truncated`, `labelled`, `tagged`, and `tags_truncated` (tags).
        names: the numbers of labels and tags.
        where: what errors call the source.
        kept: as in `encode`.

    Raises:
        UserError: a label or a tag is not in `names`, or tags with a slow tokenizer.
    """
    texts = list(batch["text"])
    tagged = tagged_ids(texts, tokenizer, max_tokens) if "tags" in batch else None
    ids = None if tagged is None else [(each.ids, each.truncated) for each in tagged]
    places: list[int] = []
    columns = encode(texts, tokenizer, max_tokens, figures, places, ids)
    if "condition" in batch:
        conditions = [batch["condition"][i] for i in places]
        encoded = token_ids(conditions, tokenizer, max_tokens) if conditions else []
        columns["condition_ids"] = [ids for ids, _ in encoded]
        columns["condition_hash"] = [hash_of(ids) for ids, _ in encoded]
        figures["conditions_truncated"] += sum(truncated for _, truncated in encoded)
    if "label" in batch:
        number = {label: i for i, label in enumerate(names.labels)}
        labels = [batch["label"][i] for i in places]
        _check_known(labels, number, "label", where)
        columns["class_label"] = [IGNORE if each is None else number[each] for each in labels]
        figures["labelled"] += sum(each is not None for each in labels)
    if tagged is not None:
        number = {tag: i for i, tag in enumerate(names.tags)}
        columns["tag_ids"] = []
        for i in places:
            tags, words = batch["tags"][i], tagged[i].words
            if tags is None:
                columns["tag_ids"].append([IGNORE] * len(words))
                continue
            _check_known(tags, number, "tag", where)
            columns["tag_ids"].append(
                [IGNORE if word == IGNORE else number[tags[word]] for word in words]
            )
            figures["tagged"] += 1
            figures["tags_truncated"] += len(tags) - sum(word != IGNORE for word in words)
    if kept is not None:
        kept += places
    return columns


def tokenize_records(
    records: Iterable[Record],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    where: str,
    names: Names,
) -> tuple[TokenizedSplit, np.ndarray, Counter[str]]:
    """What `tokenize` is for texts, for records of `columns`.

    Args:
        names: what the model calls labels and tags.

    Returns: the split; (N,) int64, which of the records each of its sentences is; and the
        counts, `skipped_blank` and those of `encode_records`.

    Raises:
        UserError: as `tokenize` and `encode_records`.
    """

    def columns_of(batch: list[Record], figures: Counter[str], kept: list[int]) -> dict[str, list]:
        fields = {kind: [getattr(record, kind) for record in batch] for kind in columns.named}
        return encode_records(fields, tokenizer, max_tokens, figures, names, where, kept)

    stripped = (record._replace(text=record.text.strip()) for record in records)
    return collect(
        stripped, lambda record: record.text, columns_of, features_of(columns.named), where
    )


def _check_known(
    values: Sequence[str | None], known: Mapping[str, int], kind: str, where: str
) -> None:
    for value in values:
        if value is not None and value not in known:
            raise UserError(
                f"{where}: {kind} {value!r} is not among those of the training sentences "
                f"({', '.join(sorted(known)[:10]) or 'none'}); correct it, or train on it"
            )
