"""What one row of a source gives: a text and, if their columns are named, a
condition, a label and tags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from dsvae.config import DataConfig
from dsvae.errors import UserError, nearest

BATCH_ROWS = 10_000
"""Sentences that are read, tokenized or written at a time."""


class Record(NamedTuple):
    """A sentence with what belongs to it."""

    text: str
    """As it stands in the source, maybe blank."""
    condition: str | None = None
    """Not blank, stripped; None if no condition column is named or the text is
    blank."""
    label: str | None = None
    """None: the record has no label."""
    tags: tuple[str, ...] | None = None
    """One per whitespace word of the text; None: the record has no tags."""
    part: int = 0
    """Which file of a mixture it comes from."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read. None: not read."""

    text: str = "text"
    condition: str | None = None
    label: str | None = None
    tags: str | None = None
    text_kind: str = "text"
    """What `text` is: condition, if a file is read for its conditions alone."""

    @staticmethod
    def of(data: DataConfig) -> Columns:
        """Returns the columns that a configuration names."""
        return Columns(data.text_column, data.condition_column, data.label_column, data.tags_column)

    @cached_property
    def extra(self) -> dict[str, str]:
        """Those besides the text's by their kinds: condition, label, tags."""
        named = {"condition": self.condition, "label": self.label, "tags": self.tags}
        return {kind: column for kind, column in named.items() if column is not None}

    @cached_property
    def named(self) -> dict[str, str]:
        """All by their kinds."""
        return {self.text_kind: self.text, **self.extra}


def record_of(row: Mapping[str, Any], columns: Columns, where: str) -> Record:
    """Returns the record of one row.

    Args:
        row: the values of the row by their columns. A label and tags may be missing.
        where: what errors call the row, e.g. "train.jsonl:3".

    Raises:
        UserError: a column is missing, or its value is not what it should be.
    """
    text = _text(row, columns.text, columns.text_kind, where)
    if not columns.extra or not text.strip():
        return Record(text)
    condition = label = tags = None
    if columns.condition is not None:
        condition = _text(row, columns.condition, "condition", where).strip()
        if not condition:
            raise UserError(
                f"{where}: column {columns.condition} is blank; give every record a condition"
            )
    if columns.label is not None:
        label = _label(row.get(columns.label), columns.label, where)
    if columns.tags is not None:
        tags = _tags(row.get(columns.tags), columns.tags, where)
        words = len(text.split())
        if tags is not None and len(tags) != words:
            raise UserError(
                f"{where}: {len(tags)} tags for {words} words; give one tag per whitespace word"
            )
    return Record(text, condition, label, tags)


def check_columns(present: Iterable[str], columns: Columns, where: str) -> None:
    """Raises UserError for a named column that a table does not have."""
    present = list(present)
    for kind, column in columns.named.items():
        if column not in present:
            raise unknown_column(column, present, where, kind)


def unknown_column(column: str, present: list[str], where: str, kind: str = "text") -> UserError:
    """Returns the error for a column that a source does not have.

    Args:
        kind: text, condition, label or tags.
    """
    close, flag = nearest(column, present), f"--{kind}_column"
    hint = f"did you mean {flag} {close}?" if close else f"choose one with {flag}"
    return UserError(
        f"{where}: no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; {hint}"
    )


def kind_of(value: Any) -> str:
    """Returns what a value is, in words."""
    return "nothing (null)" if value is None else f"a value of type {type(value).__name__}"


def _text(row: Mapping[str, Any], column: str, kind: str, where: str) -> str:
    if column not in row:
        raise unknown_column(column, list(row), where, kind)
    value = row[column]
    if isinstance(value, str):
        return value
    raise _wrong(value, column, kind, "a sentence" if kind == "text" else "a text", where)


def _label(value: Any, column: str, where: str) -> str | None:
    """Returns a label as text: numbers as Python writes them, true and false as JSON
    does."""
    if value is None or value != value:  # nan is how some tools write "nothing"
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value).strip() or None
    raise _wrong(value, column, "label", "a label (a text, a number, true or false)", where)


def _tags(value: Any, column: str, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return tuple(value.split()) or None
    if not isinstance(value, list):
        raise _wrong(value, column, "tags", "a list of tags", where)
    for tag in value:
        if not isinstance(tag, str) or tag.split() != [tag]:
            found = kind_of(tag) if not isinstance(tag, str) else repr(tag)
            raise UserError(
                f"{where}: column {column} contains {found} in its list, not a tag; give one text "
                f"without white space per word"
            )
    return tuple(value) or None


def _wrong(value: Any, column: str, kind: str, expected: str, where: str) -> UserError:
    return UserError(
        f"{where}: column {column} contains {kind_of(value)}, not {expected}; correct it or "
        f"choose another --{kind}_column"
    )
