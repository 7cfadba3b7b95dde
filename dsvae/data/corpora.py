"""Where sentences come from: files, hub data sets and the built-in corpus, as train,
valid and test splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from dsvae.config import DataConfig
from dsvae.data import grammar
from dsvae.data.readers import (
    TEXT_SUFFIXES,
    check_file,
    read_records,
    reason_of,
)
from dsvae.data.records import Columns, Record, check_columns, record_of
from dsvae.errors import UserError

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 5_000

_HUB_NAMES = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
_FEATURES = {
    "text": datasets.Value("string"),
    "condition": datasets.Value("string"),
    "label": datasets.Value("string"),
    "tags": datasets.List(datasets.Value("string")),
    "part": datasets.Value("int32"),
}
_WRITE_ROWS = 10_000


@dataclass(frozen=True)
class Corpus:
    """Sentences, stripped and not blank, as "train", "valid" and "test"."""

    splits: dict[str, datasets.Dataset]
    """Memory-mapped, each with the column `text`, and with `condition`, `label` (null
    where there is none) and `tags` (one per whitespace word, or null) where they were
    named."""
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
    """The splits that had no source and were cut from the training sentences."""
    source: str
    """What it was read from, in words."""
    files: tuple[str, ...]
    """The names of the training files. Where they are several, the training split has the
    column `part`, with the place of each sentence's file."""


def load_corpus(data: DataConfig, seed: int, work_dir: Path) -> Corpus:
    """Reads the sentences that `data` names, in bounded memory.

    Splits that it does not name are held out from the training sentences.

    Args:
        seed: decides which sentences are held out.
        work_dir: the sentences are written there, and read while the corpus is used.

    Raises:
        UserError: any fault of the source.
    """
    check_source(data)
    splits: dict[str, datasets.Dataset] = {}
    skipped_blank = dict.fromkeys(SPLITS, 0)
    kinds = tuple(Columns.of(data).named)
    files = tuple(file.name for file in _files(data).get("train", ()))
    for split, (records, where) in _sources(data).items():
        path = work_dir / f"{split}.arrow"
        mixed = ("part",) if split == "train" and len(files) > 1 else ()
        splits[split], skipped_blank[split] = _store(records, kinds + mixed, path, where)
    held_out = tuple(split for split in SPLITS if split not in splits)
    if held_out:
        _hold_out(splits, held_out, seed, data.dataset or data.train_file or "the built-in corpus")
    keys = {split: _content_keys(splits[split]) for split in SPLITS}
    dropped = 0
    if data.deduplicate:
        own = ~np.isin(keys["train"], np.concatenate([keys["valid"], keys["test"]]))
        if not own.any():
            raise UserError(
                f"{describe(data)}: every training sentence is also a validation or test "
                f"sentence: give others, or leave --data.deduplicate out"
            )
        dropped = len(own) - int(own.sum())
        splits["train"] = splits["train"].select(np.flatnonzero(own))
        keys["train"] = keys["train"][own]
    return Corpus(
        {split: splits[split] for split in SPLITS},
        skipped_blank,
        {split: len(keys[split]) - len(np.unique(keys[split])) for split in SPLITS},
        {split: int(np.isin(keys[split], keys["train"]).sum()) for split in SPLITS[1:]},
        dropped,
        held_out,
        describe(data),
        files,
    )


def fingerprint(data: DataConfig, seed: int) -> dict[str, Any]:
    """What decides the sentences of `load_corpus(data, seed)`, as a JSON object.

    It is equal for equal content. Files are told apart by their bytes and their names,
    not their folders. The seed is in it only where it matters.
    """
    check_source(data)
    if data.dataset is not None:
        _, content = _load_hub(data)
        identity: dict[str, Any] = {
            "dataset": data.dataset,
            "splits": content,
            "column": data.text_column,
        }
        cut = any(not any(name in content for name in names) for names in _HUB_NAMES.values())
    elif data.train_file is not None:
        files = _files(data)
        columned = any(
            file.suffix.lower() not in TEXT_SUFFIXES for named in files.values() for file in named
        )
        identity = {
            "files": {
                split: [each for file in named for each in (file.name, _hash_file(file))]
                for split, named in files.items()
            },
            "column": data.text_column if columned else None,
        }
        cut = len(files) < len(SPLITS)
    else:
        sample = "\n".join(drawn.text for drawn in grammar.draw(256, seed=0))
        identity = {
            "grammar": hashlib.sha256(sample.encode()).hexdigest(),
            "size": data.builtin_size,
            "seed": data.builtin_seed,
        }
        cut = True
    # Only where they are named: caches and runs of text alone keep their identity.
    extra: dict[str, Any] = {
        f"{kind}_column": name for kind, name in Columns.of(data).extra.items()
    }
    if data.deduplicate:
        extra["deduplicate"] = True
    if data.max_sentences:
        extra["max_sentences"] = data.max_sentences
    return identity | extra | {"held_out_seed": seed if cut else None}


def describe(data: DataConfig) -> str:
    """The source in words, e.g. "train.txt, valid.txt" or "the built-in corpus (20000
    sentences, seed 0)"."""
    source = f"the built-in corpus ({data.builtin_size} sentences, seed {data.builtin_seed})"
    if data.dataset is not None:
        source = f"data set {data.dataset}"
    elif data.train_file is not None:
        names = (file.name for named in _files(data).values() for file in named)
        source = ", ".join(dict.fromkeys(names))
    return f"{source}, at most {data.max_sentences} of each" if data.max_sentences else source


def entropy(data: DataConfig) -> float | None:
    """The entropy of the source in nats per sentence, which is known of the built-in
    corpus alone."""
    return grammar.ENTROPY if data.dataset is None and data.train_file is None else None


def check_source(data: DataConfig) -> None:
    """Raises UserError for a source that is contradictory, missing, of an unknown kind,
    or empty; reads no content."""
    files, columns = _files(data), Columns.of(data)
    if data.dataset is not None:
        if files:
            raise UserError(
                f"both --dataset and --{next(iter(files))}_file are given: choose files or a "
                f"data set"
            )
        return
    for split, named in files.items():
        if data.train_file is None:
            raise UserError(
                f"--{split}_file is given without --train_file: name the training sentences too"
            )
        if split == "train" and not data.weights and "," in str(named[0]) and not named[0].exists():
            raise UserError(
                f"{named[0]} (--train_file): no such file; to mix several files, give "
                f"--data.weights too, e.g. [1, 1]"
            )
        for file in named:
            check_file(file, f"--{split}_file", columns)
    if data.train_file is None and columns.extra:
        raise UserError(
            f"--{next(iter(columns.extra))}_column is given, and the built-in corpus has no "
            f"columns: name a --train_file or a --dataset that has"
        )


def _files(data: DataConfig) -> dict[str, list[Path]]:
    """The files that are named, by split: one each, but for the training files of a
    mixture."""
    named = {"train": data.train_file, "valid": data.valid_file, "test": data.test_file}
    files = {split: [Path(name).expanduser()] for split, name in named.items() if name is not None}
    if data.weights and data.train_file is not None:
        mixed = data.train_file.split(",")
        files["train"] = [Path(name.strip()).expanduser() for name in mixed]
    return files


def _sources(data: DataConfig) -> dict[str, tuple[Iterator[Record], str]]:
    """Split -> its records as they stand in the source, the first `data.max_sentences` of
    each file or split, and what errors call the source."""
    columns, most = Columns.of(data), data.max_sentences or None
    if data.dataset is not None:
        parts, _ = _load_hub(data)
        names = {
            split: next((name for name in candidates if name in parts), None)
            for split, candidates in _HUB_NAMES.items()
        }
        if names["train"] is None:
            raise UserError(
                f"data set {data.dataset} has no split train, only {', '.join(parts)}: choose "
                f"another one"
            )
        sources: dict[str, tuple[Iterator[Record], str]] = {}
        for split, name in names.items():
            if name is not None:
                where = f"data set {data.dataset}, split {name}"
                records = _read_dataset(parts[name], columns, where, min(1000, most or 1000))
                sources[split] = (islice(records, most), where)
        return sources
    if data.train_file is None:
        drawn = grammar.draw(data.builtin_size, data.builtin_seed)
        texts = (Record(item.text) for item in drawn)
        return {"train": (islice(texts, most), "the built-in corpus (--data.builtin_size)")}

    def read(split: str, files: list[Path]) -> Iterator[Record]:
        for part, file in enumerate(files):
            for record in islice(read_records(file, f"--{split}_file", columns), most):
                yield record._replace(part=part)

    return {
        split: (read(split, files), ", ".join(map(str, files)))
        for split, files in _files(data).items()
    }


def _store(
    records: Iterator[Record], kinds: tuple[str, ...], path: Path, where: str
) -> tuple[datasets.Dataset, int]:
    """Writes records with stripped texts to an Arrow file.

    Args:
        kinds: which fields of a record are written, as columns of the same names.

    Returns: that file, memory-mapped, and how many blank sentences were skipped.
    """
    blank = kept = 0
    batch: list[Record] = []
    features = datasets.Features({kind: _FEATURES[kind] for kind in kinds})

    def columns() -> dict[str, list[Any]]:
        return {kind: [getattr(record, kind) for record in batch] for kind in kinds}

    with ArrowWriter(path=str(path), features=features) as writer:
        for record in records:
            stripped = record.text.strip()
            if not stripped:
                blank += 1
                continue
            batch.append(record._replace(text=stripped))
            kept += 1
            if len(batch) == _WRITE_ROWS:
                writer.write_batch(columns())
                batch = []
        if batch:
            writer.write_batch(columns())
        if not kept:
            raise UserError(
                f"{where} has no sentences, only {blank} blank ones: give at least one sentence"
            )
        writer.finalize()
    return datasets.Dataset.from_file(str(path)), blank


def _hold_out(
    splits: dict[str, datasets.Dataset], names: tuple[str, ...], seed: int, where: str
) -> None:
    """Cuts the splits `names` from splits["train"], in place, each in the order of the
    source.

    They are cut by content: all copies of a sentence (with the same condition, where it
    has one) go to the same split. The held-out splits have the same number of different
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
    """(N,), a hash of each sentence, with its condition where it has one."""
    digests = (
        int.from_bytes(
            hashlib.blake2b("\0".join(content).encode(), digest_size=8).digest(), "little"
        )
        for batch in split.iter(_WRITE_ROWS)
        for content in zip(
            *(batch[kind] for kind in ("text", "condition") if kind in batch), strict=True
        )
    )
    return np.fromiter(digests, dtype=np.uint64, count=len(split))


def _read_dataset(
    part: datasets.Dataset | datasets.IterableDataset, columns: Columns, where: str, rows: int
) -> Iterator[Record]:
    """The records of a split, which is read `rows` at a time."""
    wanted = list(dict.fromkeys(columns.named.values()))
    number = 0
    try:
        # A stream may know its columns only from its first row.
        check_columns(part.column_names or next(iter(part), {}), columns, where)
        features = part.features or {}
        for batch in part.select_columns(wanted).iter(batch_size=rows):
            for values in zip(*(batch[column] for column in wanted), strict=True):
                number += 1
                row = {
                    column: _named(value, features.get(column))
                    for column, value in zip(wanted, values, strict=True)
                }
                yield record_of(row, columns, f"{where}, row {number}")
    except UserError:
        raise
    except Exception as error:  # `datasets`, its builders and the network each raise their own
        raise UserError(
            f"{where}: cannot be read behind row {number} ({reason_of(error)}); check the network, "
            f"and start again"
        ) from error


def _named(value: Any, feature: Any) -> Any:
    """A value, with the names that a data set gives to its class numbers."""
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return None if value < 0 else feature.int2str(value)  # -1: the set hides its labels
    if isinstance(feature, datasets.List) and isinstance(value, list):
        return [_named(each, feature.feature) for each in value]
    return value


def _load_hub(data: DataConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The splits of a data set, and what decides the content of each: `datasets` derives
    it from the builder, its configuration and the revision of the repository."""
    dataset = str(data.dataset)
    name, _, config = dataset.partition(":")
    try:
        if data.streaming:
            builder = datasets.load_dataset_builder(name, config or None)
            streams = dict(builder.as_streaming_dataset())
            return streams, dict.fromkeys(streams, builder._relative_data_dir())
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # `datasets`, its builders and the network each raise their own
        raise UserError(
            f"data set {dataset} cannot be loaded ({reason_of(error)}); check its name (ID or "
            f"ID:CONFIG), the network and HF_HUB_OFFLINE"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise UserError(
            f"data set {dataset} is one split saved by save_to_disk: name a data set with a "
            f"split train"
        )
    return loaded, {name: part._fingerprint for name, part in loaded.items()}


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; check its permissions"
        ) from error
    return digest.hexdigest()
