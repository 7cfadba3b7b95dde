"""Records as token ids: the columns of a `TokenizedSplit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dsvae.data.records import BATCH_ROWS, Columns, Record
from dsvae.data.tagging import tagged_ids
from dsvae.data.tokenization import (
    TokenizedSplit,
    hash_of,
    parallel_tokenizers,
    spelled,
    token_ids,
)
from dsvae.errors import UserError
from dsvae.modeling.crf import IGNORE

_FEATURES: dict[str, dict[str, Any]] = {
    "text": {
        "input_ids": datasets.List(datasets.Value("int32")),
        "words": datasets.Value("int32"),
        "bytes": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "hash": datasets.Value("uint64"),
    },
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


_TEXT, _NO_NAMES = Columns(), Names()


class TokenizedBatch(NamedTuple):
    """A batch of records as rows of a split."""

    table: pa.Table
    """The columns of `features_of`."""
    figures: Counter[str]
    """Counts: `sentences`, `tokens`, `words`, `bytes`, `unk` (tokens), `truncated`
    (sentences), `blank`; `conditions_truncated`, `labelled`, `tagged`, `tags_truncated`
    (tags) if they are read; and `part P`, the sentences of file P of a mixture."""
    kept: list[int]
    """The places in the batch of the records that have a row."""


def features_of(kinds: Iterable[str]) -> datasets.Features:
    """Returns the columns of tokenized records that have `kinds`: text, condition, label,
    tags."""
    return datasets.Features(
        {name: value for kind in kinds for name, value in _FEATURES.get(kind, {}).items()}
    )


def encode(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    names: Names = _NO_NAMES,
    where: str = "",
) -> TokenizedBatch:
    """Turns records into token ids and what is counted of them.

    A text of which the tokenizer leaves nothing counts as blank.

    Args:
        batch: kind -> (B,) values of the records: `text` (stripped), and `condition`,
            `label`, `tags` and `part` if they are read.
        names: the numbers of labels and tags.
        where: what errors call the source.

    Raises:
        UserError: a label or a tag is not in `names`, or tags with a slow tokenizer.
    """
    texts = batch["text"]
    tagged = tagged_ids(texts, tokenizer, max_tokens) if "tags" in batch else []
    found = [(each.ids, each.truncated) for each in tagged]
    found = found or token_ids(texts, tokenizer, max_tokens)
    kept = [i for i, (ids, _) in enumerate(found) if texts[i] and len(ids) > 1]
    rows = [found[i][0] for i in kept]
    unknown = [ids.count(tokenizer.unk_token_id) for ids in rows]
    # Numbers per word and per byte must count what the ids can spell.
    seen = [
        spelled(ids[:-1], tokenizer) if found[i][1] or unk else texts[i]
        for i, ids, unk in zip(kept, rows, unknown, strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "input_ids": rows,
        "words": [len(text.split()) for text in seen],
        "bytes": [len(text.encode()) for text in seen],
        "truncated": [found[i][1] for i in kept],
        "hash": [hash_of(ids) for ids in rows],
    }
    figures = Counter({name: sum(columns[name]) for name in ("words", "bytes", "truncated")})
    figures.update(sentences=len(rows), tokens=sum(map(len, rows)), unk=sum(unknown))
    figures["blank"] = len(texts) - len(rows)
    if "condition" in batch:
        conditions = token_ids([batch["condition"][i] for i in kept], tokenizer, max_tokens)
        columns["condition_ids"] = [ids for ids, _ in conditions]
        columns["condition_hash"] = [hash_of(ids) for ids, _ in conditions]
        figures["conditions_truncated"] = sum(truncated for _, truncated in conditions)
    if "label" in batch:
        labels = [batch["label"][i] for i in kept]
        columns["class_label"] = _numbers(labels, names.labels, "label", where)
        figures["labelled"] = sum(label is not None for label in labels)
    if "tags" in batch:
        columns["tag_ids"] = []
        for i in kept:
            tags, words = batch["tags"][i] or (), tagged[i].words
            numbers = _numbers(tags, names.tags, "tag", where)
            placed = [IGNORE if word == IGNORE or not tags else numbers[word] for word in words]
            columns["tag_ids"].append(placed)
            figures["tagged"] += bool(tags)
            figures["tags_truncated"] += len(tags) - sum(tag != IGNORE for tag in placed)
    if "part" in batch:
        figures.update(f"part {batch['part'][i]}" for i in kept)
    schema = features_of(batch).arrow_schema
    return TokenizedBatch(pa.Table.from_pydict(columns, schema=schema), figures, kept)


def tokenize(
    records: Iterable[str | Record],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    where: str,
    columns: Columns = _TEXT,
    names: Names = _NO_NAMES,
) -> tuple[TokenizedSplit, NDArray[np.int64], Counter[str]]:
    """Turns records into a split that is held in memory and not cached, for the evaluation
    of a finished model.

    Args:
        records: texts or records as they stand in the source. Blank ones are skipped, and
            those of which the tokenizer leaves nothing.
        where: what errors call the source.
        columns: which fields of the records are read.
        names: what the model calls labels and tags.

    Returns: the split; (N,) int64, which of the records each of its sentences is; and the
        counts of `TokenizedBatch`, with `skipped_blank` in place of `blank`.

    Raises:
        UserError: no sentence is left, or as `encode`.
    """
    figures: Counter[str] = Counter()
    tables: list[pa.Table] = []
    kept: list[int] = []
    read = 0
    rest = iter(records)
    with parallel_tokenizers():
        while batch := list(islice(rest, BATCH_ROWS)):
            full = [each if isinstance(each, Record) else Record(each) for each in batch]
            fields = {kind: [getattr(each, kind) for each in full] for kind in columns.named}
            fields["text"] = [text.strip() for text in fields["text"]]
            found = encode(fields, tokenizer, max_tokens, names, where)
            figures.update(found.figures)
            tables.append(found.table)
            kept += [read + place for place in found.kept]
            read += len(batch)
    figures["skipped_blank"] = figures.pop("blank", 0)
    if not kept:
        raise UserError(
            f"{where} has no sentences, only {figures['skipped_blank']} blank ones: give at least "
            f"one sentence"
        )
    split = TokenizedSplit(datasets.Dataset(pa.concat_tables(tables)))
    return split, np.array(kept, dtype=np.int64), figures


def _numbers(
    values: Sequence[str | None], known: Sequence[str], kind: str, where: str
) -> list[int]:
    """Returns the places of labels or tags among the known ones; -100 for None."""
    place: dict[str | None, int] = {name: i for i, name in enumerate(known)}
    place[None] = IGNORE
    for value in values:
        if value not in place:
            raise UserError(
                f"{where}: {kind} {value!r} is not among those of the training sentences "
                f"({', '.join(sorted(known)[:10]) or 'none'}); correct it, or train on it"
            )
    return [place[value] for value in values]
