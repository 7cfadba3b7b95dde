"""The sentences that a finished model is measured on, with what belongs to them:
conditions, labels and tags of their records, or the factors that they were generated
from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dsvae.data import grammar
from dsvae.data.readers import labelled, read_labels, read_records
from dsvae.data.record_tokens import Names, tokenize
from dsvae.data.records import Columns, Record
from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import UserError
from dsvae.inference.passes import texts_of
from dsvae.metrics.probes import usable_labels

_COUNTED = ("unk", "truncated", "skipped_blank")
BUILTIN_SENTENCES = 5_000
BUILTIN_SEED = 1_000_003
"""Seed of the built-in corpus for evaluation, which no training uses."""


@dataclass(frozen=True)
class Sentences:
    """N sentences."""

    split: TokenizedSplit
    texts: list[str]
    """As the user wrote them, without surrounding white space; truncated ones up to the
    end of their last token."""
    source: str
    """Where they come from, for people."""
    counts: dict[str, int]
    """`unk`, `truncated`, `skipped_blank`, and of records with conditions or tags
    `conditions_truncated`, `tags_truncated`."""
    labels: dict[str, NDArray[np.str_]] = field(default_factory=dict)
    """Name -> (N,): the labels for the probes, which are those of `labels_file` or of the
    label column, or every factor of the built-in corpus. Blank: a record has none."""
    factors: NDArray[np.int64] | None = None
    """(N, K), indices of values in `grammar.FACTORS`, for the built-in corpus."""
    conditions: list[str] | None = None
    """As the user wrote them; None if none are read."""
    kept: NDArray[np.int64] | None = None
    """(N,), which of the records each sentence is; None for the built-in corpus."""
    warnings: list[str] = field(default_factory=list)
    """What cannot be measured on them, one sentence each."""


def read(
    test_file: str | None,
    labels_file: str | None,
    columns: Columns,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    most: int | None = None,
) -> Sentences:
    """Reads the sentences of a file, with what belongs to them in `columns` or another
    file; without a file those of the built-in corpus.

    Args:
        config: of the model, which knows its classes and tags. Without classes, the
            labels are those of the file.
        most: take this many of the sentences, chosen by a hash of their texts, which is the
            same choice in every order of the file. None: all.

    Raises:
        UserError: a file is missing, empty or not what it should be, the labels do not
            fit the sentences, or the columns do not fit the model.
    """
    _check_model(columns, config)
    _check_columns(test_file, labels_file, columns)
    if test_file is None:
        return _builtin(tokenizer, max_tokens, min(most or BUILTIN_SENTENCES, BUILTIN_SENTENCES))
    path = Path(test_file).expanduser()
    records = list(read_records(path, "--test_file", columns))
    texts = [record.text for record in records]
    labels = None
    if labels_file is not None:
        given = read_labels(Path(labels_file).expanduser(), "--labels_file")
        every = labelled(records, given, str(path), labels_file)
        labels = np.array([record.label for record in every])
    source, rows = path.name, _chosen(records, most)
    if len(rows) < len(records):
        source = f"{most:,} sentences of {source}, chosen by hash"
        records, texts = [records[i] for i in rows], [texts[i] for i in rows]
        labels = None if labels is None else labels[rows]
    found = of_records(records, columns, config, tokenizer, max_tokens, str(path), source)
    if labels is not None:
        # Checked before hours of work.
        labels = labels[found.kept]
        usable_labels(_pairs(labels, found.split, config), str(labels_file))
        found.labels["label"] = labels
    return found


def of_records(
    records: Sequence[Record],
    columns: Columns,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    where: str,
    source: str,
) -> Sentences:
    """Makes the sentences of records, with what belongs to them in `columns`; arguments
    as in `read`.

    Args:
        where: what errors call the place of the records.
        source: what the report calls it.

    Raises:
        UserError: no sentence is left, or the columns do not fit the model.
    """
    _check_model(columns, config)
    known = tuple(config.classes) or tuple(sorted({r.label for r in records if r.label}))
    names = Names(known, tuple(config.tags))
    split, kept, figures = tokenize(records, tokenizer, max_tokens, where, columns, names)
    counted = [*_COUNTED]
    counted += ["conditions_truncated"] * (columns.condition is not None)
    counted += ["tags_truncated"] * (columns.tags is not None)
    found = Sentences(
        split,
        _as_seen([records[i].text for i in kept], split, tokenizer),
        source,
        {name: figures[name] for name in counted},
        conditions=None if columns.condition is None else [str(records[i].condition) for i in kept],
        kept=kept,
    )
    if columns.label is not None:
        _probe_column(found, [records[i] for i in kept], config, f"{where}, {columns.label}")
    return found


def _chosen(records: list[Record], most: int | None) -> list[int]:
    """Returns the places of `most` records whose hashes are the smallest, and of the
    blank ones, which are counted."""

    def key(i: int) -> bytes:
        content = f"{records[i].text.strip()}\0{records[i].condition or ''}"
        return hashlib.sha256(content.encode()).digest()

    blank = [i for i, record in enumerate(records) if not record.text.strip()]
    if most is None or most >= len(records) - len(blank):
        return list(range(len(records)))
    return sorted(blank + sorted(set(range(len(records))) - set(blank), key=key)[:most])


def input_hashes(split: TokenizedSplit, config: PreTrainedConfig) -> NDArray[np.uint64]:
    """Returns (N,), equal for sentences that the encoder reads alike, so that their
    posteriors are the same."""
    if config.posterior_reads == "condition" and split.condition_hashes is not None:
        return split.condition_hashes
    return split.record_hashes


def _check_model(columns: Columns, config: PreTrainedConfig) -> None:
    reads = config.conditional or config.posterior_reads == "condition"
    if reads and columns.condition is None:
        raise UserError(
            "this model reads conditions: give every sentence its own (Record.condition, or "
            "--condition_column of --test_file)"
        )
    if not reads and columns.condition is not None:
        raise UserError("this model reads no conditions: leave out theirs (--condition_column)")
    if columns.tags is not None and not config.tags:
        raise UserError("this model predicts no tags: leave out theirs (--tags_column)")


def _check_columns(test_file: str | None, labels_file: str | None, columns: Columns) -> None:
    flags = {"labels_file": labels_file is not None}
    flags |= {f"{kind}_column": True for kind in columns.extra}
    for flag in (name for name, given in flags.items() if given):
        if test_file is None:
            raise UserError(f"--{flag} is given without --test_file; give both")
    if labels_file is not None and columns.label is not None:
        raise UserError("--labels_file and --label_column are both given: use one of them")


def _probe_column(
    sentences: Sentences, records: list[Record], config: PreTrainedConfig, where: str
) -> None:
    """Adds the labels of records, if a probe can use them: few may have one."""
    labels = np.array([record.label or "" for record in records])
    try:
        usable_labels(_pairs(labels, sentences.split, config), where)
    except UserError as error:
        sentences.warnings.append(f"no probe of the label: {error}")
    else:
        sentences.labels["label"] = labels


def _pairs(
    labels: NDArray[np.str_], split: TokenizedSplit, config: PreTrainedConfig
) -> list[tuple[str, int]]:
    """Returns (label, sentence) of each sentence that has one. Sentences that the
    encoder reads alike are equal."""
    inputs = input_hashes(split, config).tolist()
    return [pair for pair in zip(labels.tolist(), inputs, strict=True) if pair[0]]


def check_factors(text: Sentences) -> None:
    """Raises UserError, before hours of work, if truncation leaves too few different
    sentences of the built-in corpus for the probes."""
    for name, labels in text.labels.items() if text.factors is not None else ():
        where = f"{text.source}, truncated to {text.split.lengths.max()} tokens: {name}"
        try:
            usable_labels(zip(labels.tolist(), text.split.hashes.tolist(), strict=True), where)
        except UserError as error:
            raise UserError(f"{error}; give a larger --max_tokens") from None


def _as_seen(
    texts: list[str], split: TokenizedSplit, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Returns the part of each text that the model sees: up to the end of its last
    token. Only a fast tokenizer knows where that is; with any other, the tokens are
    decoded."""
    texts = [text.strip() for text in texts]
    for i in np.flatnonzero(split.truncated).tolist():
        ids = split.ids(i)[:-1]  # without EOS
        if tokenizer.is_fast:
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            spans = tokenizer(texts[i], return_offsets_mapping=True, **plain)["offset_mapping"]
            texts[i] = texts[i][: spans[len(ids) - 1][1]]
        else:
            texts[i] = texts_of([ids], tokenizer)[0]
    return texts


def _builtin(tokenizer: PreTrainedTokenizerBase, max_tokens: int, count: int) -> Sentences:
    drawn = grammar.generate(count, BUILTIN_SEED)
    source = f"the built-in corpus ({count} sentences, seed {BUILTIN_SEED})"
    texts = [item.text for item in drawn]
    split, kept, counts = tokenize(texts, tokenizer, max_tokens, source)
    seen = _as_seen([texts[i] for i in kept], split, tokenizer)
    factors = np.array([item.factors for item in drawn], dtype=np.int64)[kept]
    labels = {
        name: np.array(values)[factors[:, k]]
        for k, (name, values) in enumerate(grammar.FACTORS.items())
    }
    counted = {name: counts[name] for name in _COUNTED}
    return Sentences(split, seen, source, counted, labels, factors)
