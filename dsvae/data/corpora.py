"""The sentences of a source as train, valid and test splits on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from dsvae.data.records import BATCH_ROWS, Record
from dsvae.data.sources import SPLITS, Source
from dsvae.errors import UserError

HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 5_000

_FEATURES = {
    "text": datasets.Value("string"),
    "condition": datasets.Value("string"),
    "label": datasets.Value("string"),
    "tags": datasets.List(datasets.Value("string")),
    "part": datasets.Value("int32"),
}


@dataclass(frozen=True)
class Corpus:
    """Sentences, stripped and not blank, as "train", "valid" and "test"."""

    source: Source
    splits: dict[str, datasets.Dataset]
    """Memory-mapped, each with the column `text`, and with `condition`, `label` (null if
    there is none) and `tags` (one per whitespace word, or null) if they were named. If
    the source has several training files, the training split has `part`, the place of
    each sentence's file among them."""
    skipped_blank: dict[str, int]
    """Blank sentences that were left out, by the split they were read for. A held-out
    split has 0."""
    repeated: dict[str, int]
    """By split, the sentences that occur earlier in the same split. Sentences with
    conditions are equal if their conditions are equal too."""
    in_train: dict[str, int]
    """By valid and test split, the sentences that are also training sentences. A
    held-out split has 0, and so has each of them with `data.deduplicate`."""
    dropped: int
    """Training sentences that `data.deduplicate` left out."""
    held_out: tuple[str, ...]
    """The splits that the source lacks and that were cut from the training
    sentences."""


def load_corpus(source: Source, seed: int, work_dir: Path) -> Corpus:
    """Reads the sentences of a source, in bounded memory.

    Splits that it lacks are held out from the training sentences.

    Args:
        seed: decides which sentences are held out.
        work_dir: the sentences are written there, and read while the corpus is used.

    Raises:
        UserError: any fault of the source.
    """
    source.check()
    splits: dict[str, datasets.Dataset] = {}
    skipped_blank = dict.fromkeys(SPLITS, 0)
    given = source.splits()
    for split, (records, where) in given.items():
        kinds = [*source.columns.named, *(["part"] if split == "train" and source.files else [])]
        path = work_dir / f"{split}.arrow"
        splits[split], skipped_blank[split] = _store(records, kinds, path, where)
    held_out = tuple(split for split in SPLITS if split not in given)
    if held_out:
        _hold_out(splits, held_out, seed, given["train"][1])
    keys = {split: _content_keys(splits[split]) for split in SPLITS}
    dropped = 0
    if source.data.deduplicate:
        own = ~np.isin(keys["train"], np.concatenate([keys["valid"], keys["test"]]))
        if not own.any():
            raise UserError(
                f"{source.description}: every training sentence is also a validation or test "
                f"sentence: give others, or leave --data.deduplicate out"
            )
        dropped = len(own) - int(own.sum())
        splits["train"] = splits["train"].select(np.flatnonzero(own))
        keys["train"] = keys["train"][own]
    return Corpus(
        source,
        {split: splits[split] for split in SPLITS},
        skipped_blank,
        {split: len(keys[split]) - len(np.unique(keys[split])) for split in SPLITS},
        {split: int(np.isin(keys[split], keys["train"]).sum()) for split in SPLITS[1:]},
        dropped,
        held_out,
    )


def _store(
    records: Iterator[Record], kinds: list[str], path: Path, where: str
) -> tuple[datasets.Dataset, int]:
    """Writes records with stripped texts to an Arrow file.

    Args:
        kinds: which fields of a record are written, as columns of the same names.

    Returns: that file, memory-mapped, and how many blank sentences were skipped.
    """
    read = kept = 0
    features = datasets.Features({kind: _FEATURES[kind] for kind in kinds})
    with ArrowWriter(path=str(path), features=features) as writer:
        while batch := list(islice(records, BATCH_ROWS)):
            read += len(batch)
            stripped = [record._replace(text=record.text.strip()) for record in batch]
            if full := [record for record in stripped if record.text]:
                kept += len(full)
                writer.write_batch({kind: [getattr(r, kind) for r in full] for kind in kinds})
        if not kept:
            raise UserError(
                f"{where} has no sentences, only {read} blank ones: give at least one sentence"
            )
        writer.finalize()
    return datasets.Dataset.from_file(str(path)), read - kept


def _hold_out(
    splits: dict[str, datasets.Dataset], names: tuple[str, ...], seed: int, where: str
) -> None:
    """Cuts the splits `names` from splits["train"], in place, each in the order of the
    source.

    They are cut by content: all copies of a sentence (with the same condition, if it has
    one) go to the same split. The held-out splits have the same number of different
    sentences.
    """
    train = splits["train"]
    _, first, content = np.unique(_content_keys(train), return_index=True, return_inverse=True)
    total = len(first)
    size = min(HELD_OUT_MOST, max(1, int(total * HELD_OUT_SHARE)))
    if total <= size * len(names):
        different = "sentences" if total == len(train) else "different sentences"
        raise UserError(
            f"{where} has {total} {different}, too few to hold out {' and '.join(names)}: give at "
            f"least {len(names) + 1}"
        )
    # Contents are permuted in the order of their first occurrence. `part` says which split
    # each of them goes to, with the training split last.
    part = np.empty(total, dtype=np.int64)
    permuted = np.argsort(first)[np.random.default_rng(seed % 2**64).permutation(total)]
    part[permuted] = np.minimum(np.arange(total) // size, len(names))
    for position, name in enumerate((*names, "train")):
        splits[name] = train.select(np.flatnonzero(part[content] == position))


def _content_keys(split: datasets.Dataset) -> NDArray[np.uint64]:
    """Returns (N,), a hash of each sentence, with its condition if it has one."""
    kinds = [kind for kind in ("text", "condition") if kind in split.column_names]
    digests = (
        hashlib.blake2b("\0".join(content).encode(), digest_size=8).digest()
        for batch in split.iter(BATCH_ROWS)
        for content in zip(*(batch[kind] for kind in kinds), strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")
