"""Sentences, and their conditions, as the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dsvae.data.records import Record
from dsvae.data.tagging import tagged_ids
from dsvae.data.tokenization import token_ids
from dsvae.errors import UserError
from dsvae.generation.reading import Line, not_blank, windows
from dsvae.inference.passes import Rows
from dsvae.modeling.t5_vae import T5VAE


@dataclass
class Counts:
    """Counts of the sentences that a `SentenceVAE` has processed."""

    sentences: int = 0
    """Sentences, and conditions, of streams that were taken."""
    blank: int = 0
    """Blank ones of streams, skipped."""
    truncated: int = 0
    """Sentences of streams that were longer than `max_tokens`."""
    conditions_truncated: int = 0
    """Conditions of streams that were longer than `max_tokens`."""
    unfinished: int = 0
    """Generated sentences that reached `max_new_tokens` before EOS."""


@dataclass(frozen=True)
class Inputs:
    """N sentences for the model (`Texts`), in memory."""

    ids: list[list[int]]
    """`x EOS` of each."""
    condition_ids: list[list[int]] | None = None
    """`c EOS` of each; None if the model reads no conditions."""
    words: list[list[int]] | None = None
    """For tags: the number of the word whose first piece each of `ids` is, or -100."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int32]:
        return _lengths(self.ids)

    def lengths_of(self, indices: Rows) -> NDArray[np.int32]:
        return self.lengths[indices]

    def condition_lengths_of(self, indices: Rows | None = None) -> NDArray[np.int32] | None:
        if self.condition_ids is None:
            return None
        lengths = _lengths(self.condition_ids)
        return lengths if indices is None else lengths[indices]

    def rows(self, indices: Sequence[int] | Rows) -> list[Rows]:
        return [np.array(self.ids[i]) for i in indices]

    def conditions(self, indices: Sequence[int] | Rows) -> list[Rows] | None:
        given = self.condition_ids
        return None if given is None else [np.array(given[i]) for i in indices]

    def tags(self, indices: Sequence[int] | Rows) -> list[Rows] | None:
        """Marks the words that have a tag. The tags are not known: any number but -100
        says that a word begins there."""
        given = self.words
        return None if given is None else [np.minimum(given[i], 0) for i in indices]

    def select(self, indices: Sequence[int]) -> Inputs:
        """Returns the inputs of some sentences."""

        def part(rows: list[list[int]] | None) -> list[list[int]] | None:
            return rows and [rows[i] for i in indices]

        return Inputs([self.ids[i] for i in indices], part(self.condition_ids), part(self.words))

    def class_labels_of(self, indices: Rows) -> None:
        return None


class InputReader:
    """Makes the `Inputs` of a model from sentences, tokenized as in training.

    Args:
        max_tokens: longest sentence, and longest condition, EOS included.

    Raises:
        UserError: max_tokens is too small.
    """

    def __init__(self, model: T5VAE, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if max_tokens < 2:
            raise UserError(f"max_tokens is {max_tokens}: give at least 2, one token and EOS")
        self.config, self.tokenizer = model.config, tokenizer
        self.max_tokens = min(max_tokens, self.config.room or max_tokens)
        self.counts = Counts()

    def check(self, conditions: bool) -> None:
        """Raises UserError unless conditions are given exactly if the model reads
        them."""
        if conditions == self.config.conditional:
            return
        if self.config.conditional:
            raise UserError(
                "the model is conditional, and no condition is given: give --condition, or "
                "--condition_column for the sentences of a file"
            )
        if self.config.posterior_reads == "condition":
            raise UserError(
                "the model's encoder reads only what was the condition in training, and its "
                "decoder reads no condition: give that as the sentence, and leave the condition out"
            )
        raise UserError(
            "the model is not conditional, and a condition is given: leave it out, or give a "
            "model that was trained with data.condition_column"
        )

    def sentences(self, texts: Sequence[str], conditions: Sequence[str] | None = None) -> Inputs:
        """Makes the inputs of a list of sentences, each with its condition if the model
        reads them.

        Raises:
            UserError: one of them cannot be read whole, or conditions are missing, too
                many or not read.
        """
        if isinstance(texts, str):
            raise TypeError("give a list of sentences, not one string")
        if not texts:
            raise UserError("no sentences: give at least one")
        read = self.conditions(conditions, len(texts))
        return Inputs(self._whole(texts, "sentence"), read)

    def conditions(self, conditions: Sequence[str] | None, count: int) -> list[list[int]] | None:
        """Makes the ids of the conditions of `count` sentences; None if the model reads
        none. Raises what `sentences` raises."""
        if isinstance(conditions, str):
            raise TypeError("give a list of conditions, not one string")
        self.check(conditions is not None)
        if conditions is None:
            return None
        if len(conditions) != count:
            raise UserError(
                f"{len(conditions)} conditions for {count} sentences: give one per sentence"
            )
        return self._whole(conditions, "condition")

    def stream(
        self, texts: Iterable[str | Record], batch_size: int, *, tags: bool = False
    ) -> Iterator[tuple[list[Line], Inputs]]:
        """Yields (sentences, their inputs), window by window. Blank sentences are
        skipped, long ones truncated, and both counted.

        Args:
            tags: make `Inputs.words`, too.

        Raises:
            UserError: as `check`.
        """
        for lines in windows(not_blank(texts, self._skipped), batch_size):
            inputs = self.of_lines(lines, tags=tags)
            # Nothing but EOS; training skips it, too.
            kept = [i for i, ids in enumerate(inputs.ids) if len(ids) > 1]
            self.counts.blank += len(lines) - len(kept)
            self.counts.sentences += len(kept)
            if kept:
                yield [lines[i] for i in kept], inputs.select(kept)

    def of_lines(self, lines: Sequence[Line], *, tags: bool = False) -> Inputs:
        """Makes the inputs of sentences of a stream, long ones truncated and counted.
        Raises what `check` raises."""
        for line in lines:
            self.check(line.condition is not None)
        texts = [line.text for line in lines]
        words = conditions = None
        if tags:
            tagged = tagged_ids(texts, self.tokenizer, self.max_tokens)
            ids = [(each.ids, each.truncated) for each in tagged]
            words = [each.words for each in tagged]
        else:
            ids = token_ids(texts, self.tokenizer, self.max_tokens)
        self.counts.truncated += sum(truncated for _, truncated in ids)
        if self.config.conditional:
            conditions = self._of_conditions([line.condition or "" for line in lines])
        return Inputs([row for row, _ in ids], conditions, words)

    def condition_stream(
        self, conditions: Iterable[str], batch_size: int
    ) -> Iterator[tuple[list[Line], list[list[int]]]]:
        """Yields (conditions, their ids), window by window, as `stream` takes
        sentences."""
        for window in windows(not_blank(conditions, self._skipped), batch_size):
            self.counts.sentences += len(window)
            yield window, self._of_conditions([line.text for line in window])

    def _of_conditions(self, conditions: list[str]) -> list[list[int]]:
        found = token_ids(conditions, self.tokenizer, self.max_tokens)
        self.counts.conditions_truncated += sum(truncated for _, truncated in found)
        return [ids for ids, _ in found]

    def _whole(self, texts: Sequence[str], what: str) -> list[list[int]]:
        """Returns the ids of texts. Raises UserError for one that cannot be read
        whole."""
        for text in texts:
            if not text.strip():
                raise UserError(f"a {what} is blank: give one with words")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"the {what} {text[:40]!r} is not UTF-8: convert it") from None
        stripped = [text.strip() for text in texts]
        tokenized = token_ids(stripped, self.tokenizer, self.max_tokens)
        for text, (ids, truncated) in zip(stripped, tokenized, strict=True):
            if len(ids) == 1:
                raise UserError(
                    f"the tokenizer leaves nothing of the {what} {text!r}: give one with words"
                )
            if truncated:
                full = self.max_tokens == self.config.room
                rest = "the model has no more vectors" if full else "or raise --max_tokens"
                raise UserError(
                    f"the {what} {text[:40]!r}... is longer than max_tokens ({self.max_tokens}): "
                    f"shorten it, {rest}"
                )
        return [ids for ids, _ in tokenized]

    def _skipped(self) -> None:
        self.counts.blank += 1


def repeated(condition: str | None, count: int = 1) -> list[str] | None:
    """Repeats the condition of `count` sentences that have the same one."""
    return None if condition is None else [condition] * count


def _lengths(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.array([len(row) for row in rows], dtype=np.int32)
