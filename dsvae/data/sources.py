"""Where sentences come from: one class per kind of source.

A new kind is a subclass of `Source` with its abstract members, a field of `DataConfig`,
and a line in `source_of`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from dsvae.config import DataConfig
from dsvae.data import grammar
from dsvae.data.readers import TEXT_SUFFIXES, check_file, read_records, reason_of
from dsvae.data.records import Columns, Record, check_columns, record_of
from dsvae.errors import UserError

SPLITS = ("train", "valid", "test")
_HUB_NAMES = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}


class Source(ABC):
    """The sentences that a configuration names."""

    entropy: float | None = None
    """The entropy of a sentence in nats, if it is known."""
    unused: tuple[str, ...] = ("data.builtin_",)
    """Prefixes of the fields of the configuration that do not matter to this source."""
    files: tuple[str, ...] = ()
    """The names of the training files, if they are several: `Record.part` counts
    them."""

    def __init__(self, data: DataConfig) -> None:
        self.data, self.columns = data, Columns.of(data)

    @property
    @abstractmethod
    def name(self) -> str:
        """The source in words, e.g. "train.txt, valid.txt"."""

    @abstractmethod
    def check(self) -> None:
        """Raises UserError for a source that is contradictory, missing, of an unknown
        kind, or empty; reads no content."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Returns what decides the records: a JSON object, equal for equal content."""

    @abstractmethod
    def splits(self) -> dict[str, tuple[Iterator[Record], str]]:
        """Returns the records of each split that the source has, as they stand there, and
        what errors call them. Of a file or split, only the first `data.max_sentences` are
        read."""

    @property
    def description(self) -> str:
        """The source in words, with the limit on its sentences."""
        most = self.data.max_sentences
        return f"{self.name}, at most {most} of each" if most else self.name

    def identity(self, seed: int) -> dict[str, Any]:
        """Returns what decides the sentences of `load_corpus`, as a JSON object.

        It is equal for equal content. Files are told apart by their bytes and their names,
        not their folders. The seed is in it only if a split is held out.

        Raises:
            UserError: as `check`, or the content cannot be read.
        """
        self.check()
        # Only those that are set: caches and runs of text alone keep their identity.
        given = {f"{kind}_column": column for kind, column in self.columns.extra.items()}
        limits = {name: getattr(self.data, name) for name in ("deduplicate", "max_sentences")}
        given |= {name: value for name, value in limits.items() if value}
        held_out = len(self.splits()) < len(SPLITS)
        return self.content() | given | {"held_out_seed": seed if held_out else None}

    def distinguishes(self, split: str, seed: int) -> str | None:
        """Returns in words what decides the sentences of a split besides the content of
        files; None if nothing does."""
        return self.description

    def first(self, records: Iterator[Record]) -> Iterator[Record]:
        """Yields the records that are read of one file or split."""
        return islice(records, self.data.max_sentences or None)


class BuiltIn(Source):
    """The built-in corpus (`dsvae.data.grammar`)."""

    entropy = grammar.ENTROPY
    unused = ()

    @property
    def name(self) -> str:
        return (
            f"the built-in corpus ({self.data.builtin_size} sentences, seed "
            f"{self.data.builtin_seed})"
        )

    def check(self) -> None:
        for split in _named_files(self.data):
            raise UserError(
                f"--{split}_file is given without --train_file: name the training sentences too"
            )
        for kind in self.columns.extra:
            raise UserError(
                f"--{kind}_column is given, and the built-in corpus has no columns: name a "
                f"--train_file or a --dataset that has"
            )

    def content(self) -> dict[str, Any]:
        sample = "\n".join(drawn.text for drawn in grammar.draw(256, seed=0))
        return {
            "grammar": hashlib.sha256(sample.encode()).hexdigest(),
            "size": self.data.builtin_size,
            "seed": self.data.builtin_seed,
        }

    def splits(self) -> dict[str, tuple[Iterator[Record], str]]:
        drawn = grammar.draw(self.data.builtin_size, self.data.builtin_seed)
        records = self.first(Record(sentence.text) for sentence in drawn)
        return {"train": (records, "the built-in corpus (--data.builtin_size)")}

    def distinguishes(self, split: str, seed: int) -> str | None:
        return f"{self.description}, held out with seed {seed}"


class Files(Source):
    """A file per split; splits without one are held out."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        named = _named_files(data)
        self.paths = {split: [Path(file).expanduser()] for split, file in named.items()}

    @property
    def name(self) -> str:
        names = (path.name for paths in self.paths.values() for path in paths)
        return ", ".join(dict.fromkeys(names))

    def check(self) -> None:
        train = self.paths["train"][0]
        if "," in str(train) and not (self.files or train.exists()):
            raise UserError(
                f"{train} (--train_file): no such file; to mix several files, give "
                f"--data.weights too, e.g. [1, 1]"
            )
        for split, paths in self.paths.items():
            for path in paths:
                check_file(path, f"--{split}_file", self.columns)

    def content(self) -> dict[str, Any]:
        every = (path for paths in self.paths.values() for path in paths)
        has_columns = any(path.suffix.lower() not in TEXT_SUFFIXES for path in every)
        files = {
            split: [part for path in paths for part in (path.name, _hash_file(path))]
            for split, paths in self.paths.items()
        }
        return {"files": files, "column": self.data.text_column if has_columns else None}

    def splits(self) -> dict[str, tuple[Iterator[Record], str]]:
        return {
            split: (self._read(split, paths), ", ".join(map(str, paths)))
            for split, paths in self.paths.items()
        }

    def distinguishes(self, split: str, seed: int) -> str | None:
        return None if split in self.paths else f"held out with seed {seed}"

    def _read(self, split: str, paths: list[Path]) -> Iterator[Record]:
        for part, path in enumerate(paths):
            for record in self.first(read_records(path, f"--{split}_file", self.columns)):
                yield record._replace(part=part)


class MixedFiles(Files):
    """Files of which several are for training, with weights
    (`dsvae.data.order.Mixture`)."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        train = str(data.train_file).split(",")
        self.paths["train"] = [Path(file.strip()).expanduser() for file in train]
        self.files = tuple(path.name for path in self.paths["train"])


class HubDataSet(Source):
    """A data set of the hub, or a local one that `datasets` can load."""

    @property
    def name(self) -> str:
        return f"data set {self.data.dataset}"

    def check(self) -> None:
        for split in _named_files(self.data):
            raise UserError(
                f"both --dataset and --{split}_file are given: choose files or a data set"
            )

    def content(self) -> dict[str, Any]:
        return {
            "dataset": self.data.dataset,
            "splits": self._loaded[1],
            "column": self.data.text_column,
        }

    def splits(self) -> dict[str, tuple[Iterator[Record], str]]:
        parts, _ = self._loaded
        found: dict[str, tuple[Iterator[Record], str]] = {}
        for split, candidates in _HUB_NAMES.items():
            for name in [name for name in candidates if name in parts][:1]:
                where = f"{self.name}, split {name}"
                found[split] = (self.first(self._read(parts[name], where)), where)
        if "train" not in found:
            raise UserError(
                f"{self.name} has no split train, only {', '.join(parts)}: choose another one"
            )
        return found

    @cached_property
    def _loaded(self) -> tuple[dict[str, Any], dict[str, str]]:
        name, _, config = str(self.data.dataset).partition(":")
        try:
            parts, content = self._load(name, config or None)
        except Exception as error:  # `datasets`, its builders and the network each raise their own
            raise UserError(
                f"{self.name} cannot be loaded ({reason_of(error)}); check its name (ID or "
                f"ID:CONFIG), the network and HF_HUB_OFFLINE"
            ) from error
        if not isinstance(parts, dict):
            raise UserError(
                f"{self.name} is one split saved by save_to_disk: name a data set with a split "
                f"train"
            )
        return parts, content

    def _load(self, name: str, config: str | None) -> tuple[Any, dict[str, str]]:
        """Returns the splits, and what decides the content of each: `datasets` derives it
        from the builder, its configuration and the revision of the repository."""
        parts = datasets.load_dataset(name, config)
        named = parts.items() if isinstance(parts, dict) else ()
        return parts, {split: part._fingerprint for split, part in named}

    def _read(self, part: datasets.Dataset | datasets.IterableDataset, where: str) -> Any:
        """Yields the records of a split."""
        wanted = list(dict.fromkeys(self.columns.named.values()))
        rows = min(1000, self.data.max_sentences or 1000)
        number = 0
        try:
            # A stream may know its columns only from its first row.
            check_columns(part.column_names or next(iter(part), {}), self.columns, where)
            features = part.features or {}
            for batch in part.select_columns(wanted).iter(batch_size=rows):
                for values in zip(*(batch[column] for column in wanted), strict=True):
                    number += 1
                    row = {
                        column: _with_names(value, features.get(column))
                        for column, value in zip(wanted, values, strict=True)
                    }
                    yield record_of(row, self.columns, f"{where}, row {number}")
        except UserError:
            raise
        except Exception as error:  # as above
            raise UserError(
                f"{where}: cannot be read after row {number} ({reason_of(error)}); check the "
                f"network, and start again"
            ) from error


class Stream(HubDataSet):
    """A data set of the hub that is read from the network and not downloaded."""

    def _load(self, name: str, config: str | None) -> tuple[Any, dict[str, str]]:
        builder = datasets.load_dataset_builder(name, config)
        parts = dict(builder.as_streaming_dataset())
        return parts, dict.fromkeys(parts, builder._relative_data_dir())


def source_of(data: DataConfig) -> Source:
    """Returns the source that a configuration names, unchecked."""
    if data.dataset is not None:
        return Stream(data) if data.streaming else HubDataSet(data)
    if data.train_file is not None:
        return MixedFiles(data) if len(data.weights) > 1 else Files(data)
    return BuiltIn(data)


def _named_files(data: DataConfig) -> dict[str, str]:
    """Returns the files of a configuration by split."""
    files = {"train": data.train_file, "valid": data.valid_file, "test": data.test_file}
    return {split: file for split, file in files.items() if file is not None}


def _with_names(value: Any, feature: Any) -> Any:
    """Returns a value, with the names that a data set gives to its class numbers."""
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return None if value < 0 else feature.int2str(value)  # -1: the set hides its labels
    if isinstance(feature, datasets.List) and isinstance(value, list):
        return [_with_names(each, feature.feature) for each in value]
    return value


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
