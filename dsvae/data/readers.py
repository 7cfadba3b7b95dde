"""Records and labels from files, one at a time, with the file and the line in every
error.

`datasets` has builders for these kinds of files, and none of them is used: docs/design.md
says why.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsvae.data.records import BATCH_ROWS, Columns, Record, check_columns, kind_of, record_of
from dsvae.errors import UserError, first_line, nearest

TEXT_SUFFIXES = ("", ".txt", ".text")
"""Endings of the files that have no columns."""
# Characters of a csv field. The csv module takes only 131,072, and documents are longer.
# A quote that is never closed still ends here and does not fill the memory.
_LONGEST_FIELD = 1 << 24
_Row = tuple[str, dict[str, Any] | None]
"""Where a row is, to follow the name of the file, and its values by their columns; None
for an empty row."""


def read_file(file: Path, option: str, column: str) -> Iterator[str]:
    """Yields the sentences of a file as they stand in it, blank ones included.

    Args:
        file: of any kind that training reads.
        option: the flag that named the file, for errors.
        column: of the sentence, if the file has columns.

    Raises:
        UserError: at once if the file cannot be used; while reading if a line cannot.
    """
    return (record.text for record in read_records(file, option, Columns(column)))


def read_records(file: Path, option: str, columns: Columns) -> Iterator[Record]:
    """Yields the records of a file, those with a blank text included. Arguments and
    errors are those of `read_file`."""
    check_file(file, option, columns)
    rows = _READERS.get(file.suffix.lower(), _read_text)(file, columns)
    return (
        Record("") if row is None else record_of(row, columns, f"{file}{place}")
        for place, row in rows
    )


def read_labels(file: Path, option: str) -> list[str]:
    """Returns the lines of a text file with any ending, stripped. Raises what
    `read_file` raises."""
    _check_readable(file, option)
    return [line.strip() for line in _lines(file)]


def labelled(
    records: Iterable[Record], labels: Iterable[str], source: str, labels_source: str
) -> Iterator[Record]:
    """Yields records with the labels beside them. Only a blank sentence may have a blank
    label.

    Args:
        source, labels_source: what errors call the two.

    Raises:
        UserError: there are more of one than of the other, or a label is missing.
    """
    pairs = enumerate(zip_longest(records, labels))
    for number, (record, label) in pairs:
        if record is None or label is None:
            counts = [number, number + 1 + sum(1 for _ in pairs)]
            more, fewer = (labels_source, source) if record is None else (source, labels_source)
            raise UserError(
                f"{fewer} has {counts[0]:,} lines, but {more} has {counts[1]:,}: give one label "
                f"per line, in the order of the sentences"
            )
        if not label and record.text.strip():
            raise UserError(f"{labels_source}:{number + 1}: no label; give every sentence a label")
        yield record._replace(label=label)


def check_file(file: Path, option: str, columns: Columns | None = None) -> None:
    """Raises UserError for a file that is missing, empty or of an unknown kind, or that
    cannot have the `columns` besides the text's."""
    _check_readable(file, option)
    if columns is not None and columns.extra and file.suffix.lower() in TEXT_SUFFIXES:
        raise UserError(
            f"{file} ({option}) has no columns, and --{next(iter(columns.extra))}_column is "
            f"given: use one of {', '.join(_READERS)}"
        )
    if file.suffix.lower() not in (*TEXT_SUFFIXES, *_READERS):
        supported = ", ".join((*TEXT_SUFFIXES[1:], *_READERS))
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


def _lines(file: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, each with its end. Only "\\n" ends a line, and a
    byte order mark is dropped."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column "
                        f"{error.start + 1}); convert the file, e.g. with iconv -t UTF-8"
                    ) from error
                yield text.removeprefix("\ufeff") if number == 1 else text
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; check its permissions"
        ) from error


def _read_text(file: Path, columns: Columns) -> Iterator[_Row]:
    return ((f":{number}", {columns.text: line}) for number, line in enumerate(_lines(file), 1))


def _read_json(file: Path, columns: Columns) -> Iterator[_Row]:
    """Yields the rows of a file with one object per line. A blank line is a blank
    sentence."""
    seen: dict[str, None] = {}
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            yield f":{number}", None
            continue
        row = _json_object(line, columns, f"{file}:{number}")
        if columns.extra:
            seen.update(dict.fromkeys(row))
        yield f":{number}", row
    # A row may lack a label or tags. A file in which all of them do has another name for
    # the column.
    if seen:
        check_columns(seen, columns, str(file))


def _json_object(line: str, columns: Columns, where: str) -> dict[str, Any]:
    if line.lstrip().startswith("["):
        raise UserError(f"{where}: a json array; write one object per line instead")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not valid json ({reason_of(error)}); write one object per line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: expected a json object, not {kind_of(row)}; write "
            f"{{{json.dumps(columns.text)}: ...}}"
        )
    for column in columns.named.values() if "\\" in line else ():
        try:
            json.dumps(row.get(column), ensure_ascii=False).encode()
        # json can escape half a surrogate pair, which is not a character
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: column {column} has half a surrogate pair (\\ud800 to \\udfff); "
                f"correct it"
            ) from error
    return row


def _read_csv(file: Path, columns: Columns) -> Iterator[_Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(_lines(file), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        before = 0
        for row in rows:
            # A stray quote would otherwise merge the rows up to the next one.
            if rows.line_num > before + 1:
                raise UserError(
                    f"{file}:{before + 1}: a field continues until line {rows.line_num}; correct "
                    f"its quotes, or remove the line breaks from it"
                )
            before = rows.line_num
            yield rows.line_num, row

    try:
        yield from _table(file, columns, numbered(), "quote the fields that contain a comma")
    except csv.Error as error:
        raise UserError(
            f"{file}:{rows.line_num}: not valid csv ({error}); correct its quotes"
        ) from error


def _read_tsv(file: Path, columns: Columns) -> Iterator[_Row]:
    # A quote is a character like any other: most .tsv files are written without
    # quoting, and contain quotes that nobody closes.
    rows = (line.rstrip("\r\n") for line in _lines(file))
    split = ((number, row.split("\t") if row else []) for number, row in enumerate(rows, 1))
    yield from _table(file, columns, split, "remove the tabs from the fields")


def _table(
    file: Path, columns: Columns, rows: Iterator[tuple[int, list[str]]], remedy: str
) -> Iterator[_Row]:
    """Yields the rows of a table of (line number, fields); the first row that is not
    empty has the names."""
    header = next((row for _, row in rows if row), [])
    check_columns(header, columns, str(file))
    positions = {column: header.index(column) for column in columns.named.values()}
    for number, row in rows:
        if row and len(row) != len(header):
            raise UserError(
                f"{file}:{number}: {len(row)} fields, but the header has {len(header)}; {remedy}"
            )
        values = {column: row[position] for column, position in positions.items()} if row else None
        yield f":{number}", values


def _read_parquet(file: Path, columns: Columns) -> Iterator[_Row]:
    wanted = list(dict.fromkeys(columns.named.values()))
    try:
        with pq.ParquetFile(file) as table:
            check_columns(table.schema_arrow.names, columns, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f", row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read as parquet ({reason_of(error)}); write it again"
        ) from error


_READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's first cause: libraries wrap errors and write
    paragraphs."""
    return first_line(error.__cause__ or error)
