"""Where sentences come from: files, hub data sets and the built-in corpus, as train,
valid and test splits."""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from dsvae.config import DataConfig
from dsvae.data import grammar
from dsvae.errors import UserError, first_line, nearest

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 5_000

_HUB_NAMES = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
_TEXT_SUFFIXES = ("", ".txt", ".text")
_FEATURES = datasets.Features({"text": datasets.Value("string")})
_WRITE_ROWS = 10_000
# Characters of a csv field, where the csv module takes 131,072: documents are longer. A
# quote that is never closed still ends here, and not in memory.
_LONGEST_FIELD = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Sentences, stripped and not blank, memory-mapped: "train", "valid" and "test",
    each with one column, `text`."""

    splits: dict[str, datasets.Dataset]
    skipped_blank: dict[str, int]
    """Blank sentences left out, by the split that they were read for; a held-out split
    has 0."""
    repeated: dict[str, int]
    """By split, the sentences whose text stands earlier in the same split."""
    in_train: dict[str, int]
    """By valid and test split, the sentences whose text is also a training sentence; 0
    for a held-out split."""
    held_out: tuple[str, ...]
    """The splits that had no source of their own and were cut from the training
    sentences."""
    source: str
    """What it was read from, in words."""
    workspace: tempfile.TemporaryDirectory | None = field(default=None, repr=False, compare=False)
    """Owns the files under the splits where the caller named no `work_dir`: they last
    as long as the corpus."""


def load_corpus(data: DataConfig, seed: int, work_dir: Path | None = None) -> Corpus:
    """Read the sentences that `data` names; splits that it does not name are held out
    from the training sentences.

    `seed` decides which sentences are held out. The sentences are written to
    `work_dir`, or to a temporary directory that goes with the corpus. Raises UserError
    for every fault of the source; memory is bounded whatever its size (but for a .json
    file that is one array).
    """
    check_source(data)
    workspace = None
    if work_dir is None:
        workspace = tempfile.TemporaryDirectory(prefix="dsvae-")
        work_dir = Path(workspace.name)
    splits: dict[str, datasets.Dataset] = {}
    skipped_blank = dict.fromkeys(SPLITS, 0)
    for split, (sentences, where) in _readers(data).items():
        splits[split], skipped_blank[split] = _store(sentences, work_dir / f"{split}.arrow", where)
    held_out = tuple(split for split in SPLITS if split not in splits)
    _hold_out(splits, held_out, seed, _where(data))
    keys = {split: _text_keys(splits[split]) for split in SPLITS}
    return Corpus(
        {split: splits[split] for split in SPLITS},
        skipped_blank,
        {split: len(keys[split]) - len(np.unique(keys[split])) for split in SPLITS},
        {split: int(np.isin(keys[split], keys["train"]).sum()) for split in SPLITS[1:]},
        held_out,
        describe(data),
        workspace,
    )


def fingerprint(data: DataConfig, seed: int) -> dict[str, Any]:
    """What decides the sentences of `load_corpus(data, seed)`, as a json object: equal
    for equal content.

    Files are told apart by their bytes and their names (not their folders). The seed is
    in it only where it matters.
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
        cut = _held_out_names(content)
    elif data.train_file is not None:
        files = {split: file for split, file in _files(data).items() if file is not None}
        columned = any(file.suffix.lower() not in _TEXT_SUFFIXES for file in files.values())
        identity = {
            "files": {split: [file.name, _hash_file(file)] for split, file in files.items()},
            "column": data.text_column if columned else None,
        }
        cut = len(files) < len(SPLITS)
    else:
        sample = "\n".join(drawn.text for drawn in grammar.generate(256, seed=0))
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
        return ", ".join(
            dict.fromkeys(file.name for file in _files(data).values() if file is not None)
        )
    return f"the built-in corpus ({data.builtin_size} sentences, seed {data.builtin_seed})"


def entropy(data: DataConfig) -> float | None:
    """The entropy of the source in nats per sentence; None where nobody knows it, which
    is everywhere but in the built-in corpus."""
    return grammar.ENTROPY if data.dataset is None and data.train_file is None else None


def check_source(data: DataConfig) -> None:
    """Raise UserError for a source that is contradictory, missing, of an unknown kind,
    or empty; reads no content."""
    if data.dataset is not None:
        given = [
            name
            for name in ("train_file", "valid_file", "test_file")
            if getattr(data, name) is not None
        ]
        if given:
            raise UserError(
                f"both --dataset and --{given[0]} are given: choose files or a data set"
            )
        return
    for split, file in _files(data).items():
        if file is None:
            continue
        if data.train_file is None:
            raise UserError(
                f"--{split}_file is given without --train_file: name the training sentences too"
            )
        _check_file(file, f"--{split}_file")


def read_file(file: Path, option: str, column: str) -> Iterator[str]:
    """The sentences of one file as they stand in it, blank ones included; of any kind
    of file that training reads.

    `option` is the flag that named the file, for errors. Raises UserError: at once
    where the file cannot be used, on the way where a line cannot.
    """
    _check_file(file, option)
    return _READERS.get(file.suffix.lower(), _read_text)(file, column)


def read_labels(file: Path, option: str) -> list[str]:
    """The lines of a text file of labels, stripped; the file's suffix says nothing.
    Raises UserError as `read_file` does."""
    _check_readable(file, option)
    return [line.strip() for line in _lines(file)]


def _files(data: DataConfig) -> dict[str, Path | None]:
    named = {"train": data.train_file, "valid": data.valid_file, "test": data.test_file}
    return {
        split: None if name is None else Path(name).expanduser() for split, name in named.items()
    }


def _check_file(file: Path, option: str) -> None:
    _check_readable(file, option)
    if file.suffix.lower() not in (*_TEXT_SUFFIXES, *_READERS):
        supported = ", ".join((*_TEXT_SUFFIXES[1:], *_READERS))
        raise UserError(
            f"{file} ({option}): unknown kind of file {file.suffix}; supported are {supported}"
        )


def _check_readable(file: Path, option: str) -> None:
    try:
        if not file.exists():
            raise UserError(f"{file} ({option}): no such file; check the path{_similar_file(file)}")
        if file.is_dir():
            raise UserError(f"{file} ({option}) is a directory: name one file of sentences")
        if not file.is_file():
            raise UserError(
                f"{file} ({option}) is not a regular file: save its content to one first"
            )
        if file.stat().st_size == 0:
            raise UserError(f"{file} ({option}) is empty: give a file with at least one line")
    except OSError as error:
        raise UserError(
            f"{file} ({option}) cannot be read: {error.strerror}; check its permissions"
        ) from error


def _similar_file(file: Path) -> str:
    names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    close = nearest(file.name, names)
    return f" (is it {file.with_name(close)}?)" if close else ""


def _where(data: DataConfig) -> str:
    return data.dataset or data.train_file or "the built-in corpus"


def _readers(data: DataConfig) -> dict[str, tuple[Iterator[str], str]]:
    """Split -> its sentences as they stand in the source, and what to call the source
    in an error."""
    if data.dataset is not None:
        parts = _load_hub(data.dataset)
        found = {
            split: next((name for name in names if name in parts), None)
            for split, names in _HUB_NAMES.items()
        }
        if found["train"] is None:
            raise UserError(
                f"data set {data.dataset} has no split train, only {', '.join(parts)}: choose "
                f"another one"
            )
        named = {
            split: (parts[name], f"data set {data.dataset}, split {name}")
            for split, name in found.items()
            if name
        }
        return {
            split: (_read_dataset(part, data.text_column, at), at)
            for split, (part, at) in named.items()
        }
    if data.train_file is None:
        drawn = grammar.draw(data.builtin_size, data.builtin_seed)
        return {
            "train": ((item.text for item in drawn), "the built-in corpus (--data.builtin_size)")
        }
    readers = {}
    for split, file in _files(data).items():
        if file is not None:
            read = _READERS.get(file.suffix.lower(), _read_text)
            readers[split] = (read(file, data.text_column), str(file))
    return readers


def _store(sentences: Iterator[str], path: Path, where: str) -> tuple[datasets.Dataset, int]:
    """Write the stripped sentences to an Arrow file; that file, memory-mapped, and how
    many blank ones were skipped."""
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
    """Cut the splits `names` from splits["train"], in place, each in the order of the
    source.

    They are cut by text: all copies of a sentence go to the same split. The held-out
    splits have the same number of different sentences.
    """
    if not names:
        return
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
    # Texts are permuted as they first appear. `part` says for each of them to which
    # split it goes, with the training split last.
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


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, each with its end. Only "\\n" ends a line; a byte
    order mark is dropped."""
    # Not `datasets`' text builder: it also ends a line at a lone "\r", keeps the byte
    # order mark, and names no line in its errors.
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column "
                        f"{error.start + 1}); "
                        "convert the file, e.g. with iconv -t UTF-8"
                    ) from error
                yield text.removeprefix("\ufeff") if number == 1 else text
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; check its permissions"
        ) from error


def _read_text(file: Path, column: str) -> Iterator[str]:
    return _lines(file)


def _read_json(file: Path, column: str) -> Iterator[str]:
    """One object a line, or one array of objects (which is read whole)."""
    # Not `datasets`' json builder: it turns a column of dates into timestamps,
    # re-encodes a column of mixed types as json, and knows no line numbers.
    first = next((line for line in _lines(file) if line.strip()), "")
    if first.lstrip().startswith("["):
        records = _parse("".join(_lines(file)), str(file))
        for number, record in enumerate(records, 1):
            yield _field(record, column, f"{file}, record {number}")
    else:
        for number, line in enumerate(_lines(file), 1):
            where = f"{file}:{number}"
            # blank: counted like any other
            yield _field(_parse(line, where), column, where) if line.strip() else ""


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not valid json ({_reason(error)}); repair it (.jsonl: one object a line)"
        ) from error


def _field(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: expected a json object, not {_kind(record)}; write "
            f"{{{json.dumps(column)}: ...}}"
        )
    if column not in record:
        raise _unknown_column(column, list(record), where)
    text = _string(record[column], column, where)
    try:
        text.encode()
    # json can escape half a surrogate pair, which is no character
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: column {column} has half a surrogate pair (\\ud800 to \\udfff); repair it"
        ) from error
    return text


def _read_csv(file: Path, column: str) -> Iterator[str]:
    # Not `datasets`' csv builder: it reads "NA" and "None" as missing, drops or shifts
    # the fields that an unquoted comma makes, and takes a row that is too short for a
    # blank one.
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(_lines(file), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        before = 0
        for row in rows:
            # A stray quote would otherwise merge the rows up to the next one.
            if rows.line_num > before + 1:
                raise UserError(
                    f"{file}:{before + 1}: a field goes on until line {rows.line_num}; repair its "
                    f"quotes, or take the line breaks out of it"
                )
            before = rows.line_num
            yield rows.line_num, row

    try:
        yield from _column(file, column, numbered(), "quote the fields that contain a comma")
    except csv.Error as error:
        raise UserError(
            f"{file}:{rows.line_num}: not valid csv ({error}); repair its quotes"
        ) from error


def _read_tsv(file: Path, column: str) -> Iterator[str]:
    # A quote is a character like any other: most .tsv files are written without
    # quoting, and hold quotes that nobody closes.
    rows = (line.rstrip("\r\n") for line in _lines(file))
    split = ((number, row.split("\t") if row else []) for number, row in enumerate(rows, 1))
    yield from _column(file, column, split, "take the tabs out of the fields")


def _column(
    file: Path, column: str, rows: Iterator[tuple[int, list[str]]], remedy: str
) -> Iterator[str]:
    """One column of a table of (line number, fields); the first row that is not empty
    has the names."""
    header = next((row for _, row in rows if row), [])
    if column not in header:
        raise _unknown_column(column, header, str(file))
    position = header.index(column)
    for number, row in rows:
        if row and len(row) != len(header):
            raise UserError(
                f"{file}:{number}: {len(row)} fields where the header has {len(header)}; {remedy}"
            )
        yield row[position] if row else ""


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise _unknown_column(column, names, str(file))
            row = 0
            for batch in table.iter_batches(batch_size=_WRITE_ROWS, columns=[column]):
                for value in batch[column].to_pylist():
                    row += 1
                    yield _string(value, column, f"{file}, row {row}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read as parquet ({_reason(error)}); write it anew"
        ) from error


_READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_dataset(part: datasets.Dataset, column: str, where: str) -> Iterator[str]:
    if column not in part.column_names:
        raise _unknown_column(column, part.column_names, where)
    row = 0
    for batch in part.select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            row += 1
            yield _string(value, column, f"{where}, row {row}")


def _load_hub(dataset: str) -> datasets.DatasetDict:
    name, _, config = dataset.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # `datasets`, its builders and the network each raise their own
        raise UserError(
            f"data set {dataset} cannot be loaded ({_reason(error)}); "
            "check its name (ID or ID:CONFIG), the network and HF_HUB_OFFLINE"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise UserError(
            f"data set {dataset} is one split saved by save_to_disk: name a data set with a "
            f"split train"
        )
    return loaded


def _held_out_names(parts: dict[str, Any]) -> bool:
    return any(not any(name in parts for name in names) for names in _HUB_NAMES.values())


def _hash_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; check its permissions"
        ) from error


def _string(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise UserError(
        f"{where}: column {column} holds {_kind(value)}, not a sentence; repair it or choose "
        f"--text_column"
    )


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: libraries wrap it, and write
    paragraphs."""
    return first_line(error.__cause__ or error)


def _kind(value: Any) -> str:
    return "nothing (null)" if value is None else f"a value of type {type(value).__name__}"


def _unknown_column(column: str, present: list[str], where: str) -> UserError:
    close = nearest(column, present)
    hint = f"did you mean --text_column {close}?" if close else "choose one with --text_column"
    return UserError(
        f"{where}: no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; {hint}"
    )
