"""Tokenized corpora, cached by content."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dsvae.config import DataConfig
from dsvae.data import cache
from dsvae.data.batches import row_lengths
from dsvae.data.corpora import Corpus, load_corpus
from dsvae.data.order import Mixture
from dsvae.data.processes import map_batches, usable_cores
from dsvae.data.record_tokens import Names, TokenizedBatch, encode, features_of
from dsvae.data.records import BATCH_ROWS
from dsvae.data.sources import SPLITS, Source, source_of
from dsvae.data.tokenization import TokenizedSplit, load_tokenizer, parallel_tokenizers
from dsvae.data.tokenizer_training import train_tokenizer
from dsvae.errors import UserError
from dsvae.modeling.settings import PosteriorReads

# Raise this whenever the same sentences and options would give other files.
_FORMAT = 5
_TOKENIZER_SENTENCES = 1_000_000
# A process needs about 5 seconds of its core to begin, and one tokenizes this many in 10.
_ROWS_PER_PROCESS = 300_000
# What the report says of every split, and what more of one that has a column.
_COUNTS = ("sentences", "tokens", "words", "bytes", "unk", "truncated")
_FIGURES = {
    "condition": ("conditions_truncated",),
    "label": ("labelled",),
    "tags": ("tagged", "tags_truncated"),
}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made: the tokenizer, the tokenized "train", "valid" and "test", and
    the report on them."""

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, TokenizedSplit]
    report: dict[str, Any]
    labels: tuple[str, ...] = ()
    """The different labels of the training sentences, sorted: label i of a split is the
    i-th."""
    tags: tuple[str, ...] = ()
    """Their different tags, sorted, e.g. B-PER, I-PER, O."""
    lock: IO[str] | None = None
    """Keeps the cache entry from `dsvae cache --clear`."""

    def longest(self, reads: PosteriorReads, most: int) -> NDArray[np.int32]:
        """Returns the `row_lengths` of the `most` longest training sentences, from the
        longest."""
        lengths, counts = np.array(self.report["row_lengths"][reads], dtype=np.int32)
        return np.repeat(lengths[::-1], np.minimum(counts[::-1], most))[:most]

    def vector_counts(self, reads: PosteriorReads, chunk: int, most: int) -> list[int]:
        """Returns how many training sentences have 1, 2, .. `most` chunks of so many
        tokens."""
        lengths, counts = np.array(self.report["row_lengths"][reads], dtype=np.int64)
        chunks = np.minimum(-(-lengths // chunk), most)
        return np.bincount(chunks, counts, minlength=most + 1)[1:].astype(int).tolist()

    def class_vector_counts(self, reads: PosteriorReads, chunk: int, most: int) -> list[list[int]]:
        """Returns the same for the training sentences of each label. They are read in
        parts: there may be more than fit in memory."""
        train, counts = self.splits["train"], np.zeros((len(self.labels), most), dtype=np.int64)
        for start in range(0, len(train), 1 << 20):
            rows = np.arange(start, min(start + (1 << 20), len(train)))
            lengths, labels = row_lengths(train, reads, rows), train.class_labels_of(rows)
            if labels is None:
                break
            known = labels >= 0
            chunks = np.minimum(-(-lengths.astype(np.int64) // chunk), most) - 1
            np.add.at(counts, (labels[known], chunks[known]), 1)
        return counts.tolist()

    def mixture(self, weights: list[float]) -> Mixture | None:
        """Returns how the training files are mixed; None if there is only one."""
        files = self.report["splits"]["train"].get("files")
        return Mixture.of([file["sentences"] for file in files], weights) if files else None


def prepare(
    data: DataConfig,
    *,
    tokenizer: str | None,
    vocab_size: int | None,
    seed: int,
    corpus: dict[str, Any] | None = None,
) -> Path:
    """Makes a directory with the tokenizer, the tokenized splits and the report, unless
    it exists, and returns it.

    Call this on one process. The directory's name is a hash of everything that decides
    its content. It appears complete, by a rename, or not at all.

    Args:
        tokenizer: one to load. None: one is trained on the training sentences.
        vocab_size: pieces of the tokenizer to train.
        corpus: the identity of the sentences (`Source.identity`), if it is already known.

    Raises:
        UserError: a fault of the source, the tokenizer or the cache directory.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either a tokenizer or the vocab_size of one to train")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    source = source_of(data)
    identity = {
        "format": _FORMAT,
        "corpus": source.identity(seed) if corpus is None else corpus,
        "tokenizer": {"trained": vocab_size} if loaded is None else _tokenizer_identity(loaded),
        "max_tokens": data.max_tokens,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    root = cache.root_of(data.cache_dir)
    final = root / key
    if final.is_dir():
        cache.use(final)
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        cache.sweep(root)
        temporary = cache.temporary(root, key)
        temporary.mkdir()
        try:
            with parallel_tokenizers():
                _fill(temporary, source, loaded, vocab_size, seed)
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenized corpus to {root}: {error.strerror or error}; "
            "free some space, or choose another --data.cache_dir"
        ) from error
    return final


def load_prepared(path: str | os.PathLike[str]) -> Prepared:
    """Opens the directory that `prepare` returned, memory-mapped; any rank may.

    Raises:
        UserError: it is damaged.
    """
    path = Path(path)
    try:
        lock = cache.hold(path)
        report = json.load(lock)
        splits = {
            name: TokenizedSplit(datasets.Dataset.from_file(str(path / f"{name}.arrow")))
            for name in SPLITS
        }
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: the cached corpus is damaged ({type(error).__name__}); delete this directory"
        ) from error
    labels, tags = (tuple(report.get(name, ())) for name in ("labels", "tags"))
    return Prepared(load_tokenizer(str(path / "tokenizer")), splits, report, labels, tags, lock)


def _fill(
    directory: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None,
    seed: int,
) -> None:
    """Writes everything of one cache entry into `directory`."""
    work_dir = directory / "work"
    work_dir.mkdir()
    corpus = load_corpus(source, seed, work_dir)
    if tokenizer is None:
        assert vocab_size is not None  # `prepare` checked that one of the two is given
        tokenizer = train_tokenizer(_sample(corpus.splits["train"]), vocab_size)
    tokenizer.save_pretrained(directory / "tokenizer")
    report: dict[str, Any] = {
        "source": source.description,
        "vocab_size": len(tokenizer),
        "max_tokens": source.data.max_tokens,
    }
    kinds = corpus.splits["train"].column_names
    names = Names(_values(corpus, "label"), _values(corpus, "tags"))
    if "label" in kinds:
        report["labels"] = names.labels
    if "tags" in kinds:
        report["tags"] = names.tags
    encode_batch = functools.partial(
        encode, tokenizer=tokenizer, max_tokens=source.data.max_tokens, names=names
    )
    report["splits"] = {
        name: _tokenize(corpus, name, encode_batch, directory / f"{name}.arrow") for name in SPLITS
    }
    train = TokenizedSplit(datasets.Dataset.from_file(str(directory / "train.arrow")))
    # The different lengths and how many sentences have each: all that a start needs of them.
    report["row_lengths"] = {
        reads: np.stack(np.unique(row_lengths(train, reads), return_counts=True)).tolist()
        for reads in get_args(PosteriorReads)
    }
    (directory / cache.REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work_dir)


def _tokenize(
    corpus: Corpus, name: str, encode_batch: Callable[..., TokenizedBatch], target: Path
) -> dict[str, Any]:
    """Writes one tokenized split to `target`, an Arrow file.

    Returns: what the report says about it.
    """
    figures: Counter[str] = Counter()
    split, source = corpus.splits[name], corpus.source
    encoded = functools.partial(encode_batch, where=f"{source.description}, split {name}")
    features = features_of(split.column_names)
    processes = min(usable_cores(), len(split) // _ROWS_PER_PROCESS)
    # Every chunk of the file costs each rank memory: a chunk is a batch, and not 1,000 rows.
    with ArrowWriter(path=str(target), features=features, writer_batch_size=BATCH_ROWS) as writer:
        for batch in map_batches(encoded, split, BATCH_ROWS, processes):
            figures.update(batch.figures)
            if len(batch.table):
                writer.write_table(batch.table)
        if not figures["sentences"]:
            raise UserError(
                f"{source.description}: the tokenizer leaves nothing of the {name} sentences; use "
                f"another tokenizer"
            )
        writer.finalize()
    mixed = enumerate(source.files if "part" in split.column_names else ())
    files = [{"name": file, "sentences": figures[f"part {i}"]} for i, file in mixed]
    for file in files if name == "train" else ():
        if not file["sentences"]:
            raise UserError(
                f"{file['name']} (--train_file) has no sentence that is left for training: leave "
                f"it out"
            )
    return {
        **{name: figures[name] for name in _COUNTS},
        "skipped_blank": corpus.skipped_blank[name] + figures["blank"],
        "repeated": corpus.repeated[name],
        **({"in_train": corpus.in_train[name]} if name in corpus.in_train else {}),
        **({"dropped": corpus.dropped} if name == "train" and corpus.dropped else {}),
        "held_out": name in corpus.held_out,
        **({"files": files} if files else {}),
        **{name: figures[name] for kind in split.column_names for name in _FIGURES.get(kind, ())},
    }


def _values(corpus: Corpus, kind: str) -> tuple[str, ...]:
    """Returns the different labels or tags of the training sentences, sorted.

    Raises:
        UserError: the column is read, and no training sentence has one.
    """
    train = corpus.splits["train"]
    if kind not in train.column_names:
        return ()
    found: set[str] = set()
    for batch in train.select_columns([kind]).iter(BATCH_ROWS):
        for value in batch[kind]:
            found.update(() if value is None else [value] if kind == "label" else value)
    if not found:
        raise UserError(
            f"{corpus.source.description}: no training sentence has a value in --{kind}_column; "
            f"fill it, or leave the flag out"
        )
    return tuple(sorted(found))


def _sample(split: datasets.Dataset) -> Iterator[str]:
    """Returns the sentences to train a tokenizer on, with their conditions: all, or
    evenly spaced ones if there are more than `_TOKENIZER_SENTENCES`."""
    step = -(-len(split) // _TOKENIZER_SENTENCES)
    for batch in split.select(range(0, len(split), step)).iter(BATCH_ROWS):
        yield from batch["text"]
        yield from batch.get("condition", ())


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what decides the ids of a tokenizer, wherever it was loaded from."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    return {"class": type(tokenizer).__name__, "content": digest.hexdigest(), "special": special}


def _publish(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():  # another run may have finished first; its entry is equal
            raise
