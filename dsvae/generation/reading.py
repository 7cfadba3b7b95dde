"""Sentences and labels from files and stdin, one at a time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from dsvae.data import readers
from dsvae.data.noise import ORDER, generator
from dsvae.data.records import Columns, Record
from dsvae.errors import UserError

T = TypeVar("T")

WINDOW = 32
"""Batches of a full window (see `windows`)."""


class Line(NamedTuple):
    """A sentence and its place in the source."""

    line: int
    """Number of the sentence in its source, from 1, blank ones counted."""
    text: str
    """Stripped; not blank."""
    condition: str | None = None
    """Stripped; None if the source gives none."""
    label: str | None = None
    """None if the source gives none."""

    @property
    def fields(self) -> dict[str, Any]:
        """`line`, `sentence`, and `condition` if there is one, for the output."""
        condition = {} if self.condition is None else {"condition": self.condition}
        return {"line": self.line, **condition, "sentence": self.text}


def read_records(
    file: str | None, text_column: str, condition_column: str | None = None, option: str = "FILE"
) -> Iterator[Record]:
    """Reads the records of a file or of stdin as they stand there, blank ones included.

    Args:
        file: .txt (one sentence per line), .jsonl, .csv, .tsv or .parquet. None or "-":
            stdin, one sentence per line.
        text_column: the column of the sentence, if the file has columns.
        condition_column: the column of its condition. None: records have none.
        option: the flag that named the file, for errors.

    Raises:
        UserError: at once, for a file that is missing, empty, of an unknown kind or
            without columns for the condition; while reading, for a line that is not UTF-8
            or does not fit the kind of file.
    """
    if file is not None and file != "-":
        columns = Columns(text_column, condition_column)
        return readers.read_records(Path(file).expanduser(), option, columns)
    if condition_column is not None:
        raise UserError(
            f"--condition_column needs a file with columns, and stdin has none: give {option}"
        )
    if sys.stdin is None:
        raise UserError(f"stdin is closed: give {option}, or sentences on stdin")
    return map(Record, _stdin_lines(sys.stdin.buffer))


def read_conditions(file: str, column: str | None) -> Iterator[str]:
    """Reads the conditions of a file as they stand there, blank ones included.

    Args:
        column: of the condition, if the file has columns; None: "condition".

    Raises:
        UserError: as `read_records`.
    """
    columns = Columns(column or "condition", text_kind="condition")
    records = readers.read_records(Path(file).expanduser(), "--conditions_file", columns)
    return (record.text for record in records)


def not_blank(
    sentences: Iterable[str | Record], skipped: Callable[[], None] = lambda: None
) -> Iterator[Line]:
    """Yields the sentences that are not blank, stripped. `skipped` is called for each
    of the others."""
    for number, each in enumerate(sentences, 1):
        record = each if isinstance(each, Record) else Record(each)
        if text := record.text.strip():
            yield Line(number, text, record.condition, record.label)
        else:
            skipped()


def draw_sentences(
    file: str, text_column: str, count: int, seed: int, condition_column: str | None = None
) -> Iterator[Line]:
    """Draws `count` sentences of a file, maybe with their conditions, uniformly with
    replacement, in the order of the file.

    The file is read twice, and only `count` numbers are held in memory.
    """

    def lines() -> Iterator[Line]:
        return not_blank(read_records(file, text_column, condition_column, "--file"))

    total = sum(1 for _ in lines())
    if not total:
        raise no_sentences(file)
    drawn = np.sort(generator(seed, ORDER, 0, 0).integers(total, size=count))
    wanted = iter(drawn.tolist())
    position = next(wanted, None)
    for index, line in enumerate(lines()):
        while position == index:
            yield line
            position = next(wanted, None)
        if position is None:
            return


def read_labels(file: str) -> Iterable[str]:
    """Reads one label per line, stripped. Raises UserError as `read_records`."""
    return readers.read_labels(Path(file).expanduser(), "--labels_file")


def check_labels(labels_file: str, text_file: str, text_column: str, toward: str) -> None:
    """Raises UserError unless every sentence has a label, and both `toward` and another
    label occur.

    It reads both files once, before any model runs.
    """
    records = read_records(text_file, text_column, None, "--text_file")
    every = readers.labelled(records, read_labels(labels_file), text_file, labels_file)
    counts = Counter(str(record.label) for record in every if record.text.strip())
    if toward not in counts:
        shown = [label for label, _ in counts.most_common(8)] + ["..."] * (len(counts) > 8)
        raise UserError(
            f"--toward {toward}: no such label in {labels_file}, only {', '.join(shown)}; give "
            f"one of them"
        )
    if len(counts) == 1:
        raise UserError(
            f"{labels_file} has no label but {toward}: a direction needs sentences with another one"
        )


def no_sentences(source: str) -> UserError:
    """Makes the error for a source that is empty or has only blank sentences."""
    return UserError(f"{source} has no sentences: give at least one that is not blank")


def windows(items: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Yields lists of consecutive items, to be sorted by length.

    The first is one batch, so that output starts at once. Each of the next has twice as
    many items, up to `WINDOW` batches.
    """
    iterator, size = iter(items), batch_size
    while window := list(islice(iterator, size)):
        yield window
        size = min(2 * size, WINDOW * batch_size)


def _stdin_lines(stream: BinaryIO) -> Iterator[str]:
    if stream.isatty():
        print(
            "dsvae: reading sentences from the terminal, one per line; Ctrl-D ends", file=sys.stderr
        )
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8").removeprefix("\ufeff" if number == 1 else "")
        except UnicodeDecodeError:
            raise UserError(
                f"stdin:{number}: not UTF-8; convert it, e.g. with iconv -t UTF-8"
            ) from None
