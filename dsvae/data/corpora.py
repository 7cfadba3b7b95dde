"""Where sentences come from: files, hub data sets and the built-in corpus, as train,
valid and test splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    read_file,
    reason_of,
    string_of,
    unknown_column,
)
from dsvae.errors import UserError

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 5_000

_HUB_NAMES = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
_FEATURES = datasets.Features({"text": datasets.Value("string")})
_WRITE_ROWS = 10_000


@dataclass(frozen=True)
class Corpus:
    """Sentences, stripped and not blank, as "train", "valid" and "test"."""

    splits: dict[str, datasets.Dataset]
    """Memory-mapped, each with one column, `text`."""
    skipped_blank: dict[str, int]
    """Blank sentences that were left out, by the split they were read for. A held-out
    split has 0."""
    repeated: dict[str, int]
    """By split, the sentences whose text occurs earlier in the same split."""
    in_train: dict[str, int]
    """By valid and test split, the sentences whose text is also a training sentence. A
    held-out split has 0."""
    held_out: tuple[str, ...]
    """The splits that had no source and were cut from the training sentences."""
    source: str
    """What it was read from, in words."""


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
    for split, (sentences, where) in _sources(data).items():
        splits[split], skipped_blank[split] = _store(sentences, work_dir / f"{split}.arrow", where)
    held_out = tuple(split for split in SPLITS if split not in splits)
    if held_out:
        _hold_out(splits, held_out, seed, data.dataset or data.train_file or "the built-in corpus")
    keys = {split: _text_keys(splits[split]) for split in SPLITS}
    return Corpus(
        {split: splits[split] for split in SPLITS},
        skipped_blank,
        {split: len(keys[split]) - len(np.unique(keys[split])) for split in SPLITS},
        {split: int(np.isin(keys[split], keys["train"]).sum()) for split in SPLITS[1:]},
        held_out,
        describe(data),
    )


def fingerprint(data: DataConfig, seed: int) -> dict[str, Any]:
    """What decides the sentences of `load_corpus(data, seed)`, as a JSON object.

    It is equal for equal content. Files are told apart by their bytes and their names,
    not their folders. The seed is in it only where it matters.
    """
    check_source(data)
    if data.dataset is not None:
        # `datasets` derives this from the builder, its configuration and the revision
        # of the repository.
        content = {name: part._fingerprint for name, part in _load_hub(data.dataset).items()}
        identity: dict[str, Any] = {
            "dataset": data.dataset,
            "splits": content,
            "column": data.text_column,
        }
        cut = any(not any(name in content for name in names) for names in _HUB_NAMES.values())
    elif data.train_file is not None:
        files = _files(data)
        columned = any(file.suffix.lower() not in TEXT_SUFFIXES for file in files.values())
        identity = {
            "files": {split: [file.name, _hash_file(file)] for split, file in files.items()},
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
    return identity | {"held_out_seed": seed if cut else None}


def describe(data: DataConfig) -> str:
    """The source in words, e.g. "train.txt, valid.txt" or "the built-in corpus (20000
    sentences, seed 0)"."""
    if data.dataset is not None:
        return f"data set {data.dataset}"
    if data.train_file is not None:
        return ", ".join(dict.fromkeys(file.name for file in _files(data).values()))
    return f"the built-in corpus ({data.builtin_size} sentences, seed {data.builtin_seed})"


def entropy(data: DataConfig) -> float | None:
    """The entropy of the source in nats per sentence, which is known of the built-in
    corpus alone."""
    return grammar.ENTROPY if data.dataset is None and data.train_file is None else None


def check_source(data: DataConfig) -> None:
    """Raises UserError for a source that is contradictory, missing, of an unknown kind,
    or empty; reads no content."""
    files = _files(data)
    if data.dataset is not None:
        if files:
            raise UserError(
                f"both --dataset and --{next(iter(files))}_file are given: choose files or a "
                f"data set"
            )
        return
    for split, file in files.items():
        if data.train_file is None:
            raise UserError(
                f"--{split}_file is given without --train_file: name the training sentences too"
            )
        check_file(file, f"--{split}_file")


def _files(data: DataConfig) -> dict[str, Path]:
    """The files that are named, by split."""
    named = {"train": data.train_file, "valid": data.valid_file, "test": data.test_file}
    return {split: Path(name).expanduser() for split, name in named.items() if name is not None}


def _sources(data: DataConfig) -> dict[str, tuple[Iterator[str], str]]:
    """Split -> its sentences as they stand in the source, and what errors call the
    source."""
    if data.dataset is not None:
        parts = _load_hub(data.dataset)
        names = {
            split: next((name for name in candidates if name in parts), None)
            for split, candidates in _HUB_NAMES.items()
        }
        if names["train"] is None:
            raise UserError(
                f"data set {data.dataset} has no split train, only {', '.join(parts)}: choose "
                f"another one"
            )
        sources = {}
        for split, name in names.items():
            if name is not None:
                where = f"data set {data.dataset}, split {name}"
                sources[split] = (_read_dataset(parts[name], data.text_column, where), where)
        return sources
    if data.train_file is None:
        drawn = grammar.draw(data.builtin_size, data.builtin_seed)
        return {
            "train": ((item.text for item in drawn), "the built-in corpus (--data.builtin_size)")
        }
    return {
        split: (read_file(file, f"--{split}_file", data.text_column), str(file))
        for split, file in _files(data).items()
    }


def _store(sentences: Iterator[str], path: Path, where: str) -> tuple[datasets.Dataset, int]:
    """Writes the stripped sentences to an Arrow file.

    Returns: that file, memory-mapped, and how many blank sentences were skipped.
    """
    blank = kept = 0
    batch: list[str] = []
    with ArrowWriter(path=str(path), features=_FEATURES) as writer:
        for sentence in sentences:
            stripped = sentence.strip()
            if not stripped:
                blank += 1
                continue
            batch.append(stripped)
            kept += 1
            if len(batch) == _WRITE_ROWS:
                writer.write_batch({"text": batch})
                batch = []
        if batch:
            writer.write_batch({"text": batch})
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

    They are cut by text: all copies of a sentence go to the same split. The held-out
    splits have the same number of different sentences.
    """
    train = splits["train"]
    _, first, text = np.unique(_text_keys(train), return_index=True, return_inverse=True)
    total = len(first)
    size = min(HELD_OUT_MOST, max(1, int(total * HELD_OUT_SHARE)))
    if total <= size * len(names):
        different = "sentences" if total == len(train) else "different sentences"
        raise UserError(
            f"{where} has {total} {different}, too few to hold out {' and '.join(names)}: give at "
            f"least {len(names) + 1}"
        )
    # Texts are permuted in the order of their first occurrence. `part` says which split
    # each of them goes to, with the training split last.
    part = np.empty(total, dtype=np.int64)
    permuted = np.argsort(first)[np.random.default_rng(seed % 2**64).permutation(total)]
    part[permuted] = np.minimum(np.arange(total) // size, len(names))
    for position, name in enumerate((*names, "train")):
        splits[name] = train.select(np.flatnonzero(part[text] == position))


def _text_keys(split: datasets.Dataset) -> NDArray[np.uint64]:
    """(N,), a hash of each sentence."""
    digests = (
        hashlib.blake2b(text.encode(), digest_size=8).digest()
        for batch in split.iter(_WRITE_ROWS)
        for text in batch["text"]
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _read_dataset(part: datasets.Dataset, column: str, where: str) -> Iterator[str]:
    if column not in part.column_names:
        raise unknown_column(column, part.column_names, where)
    row = 0
    for batch in part.select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            row += 1
            yield string_of(value, column, f"{where}, row {row}")


def _load_hub(dataset: str) -> datasets.DatasetDict:
    name, _, config = dataset.partition(":")
    try:
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
    return loaded


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
