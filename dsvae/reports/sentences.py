"""The sentences that a finished model is measured on, with their labels, or with the
factors that they were generated from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dsvae.data import grammar
from dsvae.data.readers import read_file, read_labels
from dsvae.data.tokenization import TokenizedSplit, tokenize
from dsvae.errors import UserError
from dsvae.metrics.probes import usable_labels
from dsvae.metrics.reconstruction import texts as decoded

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
    """`unk`, `truncated`, `skipped_blank`."""
    labels: dict[str, NDArray[np.str_]] = field(default_factory=dict)
    """Name -> (N,): the labels of `labels_file`, or every factor of the built-in
    corpus."""
    factors: NDArray[np.int64] | None = None
    """(N, K), indices of values in `grammar.FACTORS`, for the built-in corpus."""


def read(
    test_file: str | None,
    labels_file: str | None,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> Sentences:
    """The sentences of a file, with labels if they are given; without a file those of
    the built-in corpus.

    Raises:
        UserError: a file is missing, empty or not what it should be, or the labels do not
            fit the sentences.
    """
    if test_file is None:
        if labels_file is not None:
            raise UserError("--labels_file is given without --test_file; give both")
        return _builtin(tokenizer, max_tokens)
    path = Path(test_file).expanduser()
    texts = list(read_file(path, "--test_file", text_column))
    labels = None if labels_file is None else _labels(Path(labels_file).expanduser(), path, texts)
    split, kept, counts = tokenize(texts, tokenizer, max_tokens, str(path))
    seen = _as_seen([texts[i] for i in kept], split, tokenizer)
    if labels is None:
        return Sentences(split, seen, path.name, counts)
    # Checked before hours of work. Sentences with equal tokens are equal.
    usable_labels(zip(labels[kept].tolist(), split.hashes.tolist(), strict=True), str(labels_file))
    return Sentences(split, seen, path.name, counts, {"label": labels[kept]})


def check_factors(text: Sentences) -> None:
    """Raises UserError, before hours of work, where truncation leaves too few different
    sentences of the built-in corpus for the probes."""
    for name, labels in text.labels.items() if text.factors is not None else ():
        where = f"{text.source}, truncated to {text.split.lengths.max()} tokens: {name}"
        try:
            usable_labels(zip(labels.tolist(), text.split.hashes.tolist(), strict=True), where)
        except UserError as error:
            raise UserError(f"{error}; give a larger --max_tokens") from None


def _labels(path: Path, sentences: Path, texts: list[str]) -> NDArray[np.str_]:
    """(N,), one label per text; blank only where the text is blank too."""
    labels = read_labels(path, "--labels_file")
    if len(labels) != len(texts):
        raise UserError(
            f"{path} has {len(labels):,} lines, but {sentences} has {len(texts):,}: "
            "give one label per line, in the order of the sentences"
        )
    for number, (label, text) in enumerate(zip(labels, texts, strict=True), 1):
        if not label and text.strip():
            raise UserError(f"{path}:{number}: no label; give every sentence a label")
    return np.array(labels)


def _as_seen(
    texts: list[str], split: TokenizedSplit, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The part of each text that the model sees: up to the end of its last token. Only a
    fast tokenizer knows where that is; with any other, the tokens are decoded."""
    texts = [text.strip() for text in texts]
    for i in np.flatnonzero(split.truncated).tolist():
        ids = split.ids(i)[:-1]  # without EOS
        if tokenizer.is_fast:
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            spans = tokenizer(texts[i], return_offsets_mapping=True, **plain)["offset_mapping"]
            texts[i] = texts[i][: spans[len(ids) - 1][1]]
        else:
            texts[i] = decoded([ids], tokenizer)[0]
    return texts


def _builtin(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Sentences:
    drawn = grammar.generate(BUILTIN_SENTENCES, BUILTIN_SEED)
    source = f"the built-in corpus ({BUILTIN_SENTENCES} sentences, seed {BUILTIN_SEED})"
    texts = [item.text for item in drawn]
    split, kept, counts = tokenize(texts, tokenizer, max_tokens, source)
    seen = _as_seen([texts[i] for i in kept], split, tokenizer)
    factors = np.array([item.factors for item in drawn], dtype=np.int64)[kept]
    labels = {
        name: np.array(values)[factors[:, k]]
        for k, (name, values) in enumerate(grammar.FACTORS.items())
    }
    return Sentences(split, seen, source, counts, labels, factors)
