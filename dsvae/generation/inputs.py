"""Sentences, and their conditions, as the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dsvae.data.records import Record
from dsvae.data.tagging import tagged_ids
from dsvae.data.tokenization import token_ids
from dsvae.errors import UserError
from dsvae.generation.reading import Line, not_blank, windows
from dsvae.modeling.crf import IGNORE
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


class Input(NamedTuple):
    """A sentence for the model."""

    ids: list[int]
    """What the encoder reads: `x EOS`, or `c EOS x EOS` with a condition."""
    condition: list[int] | None = None
    """`c EOS`, which the decoder and a learned prior read."""
    words: list[int] | None = None
    """For tags: the number of the word whose first piece each of `ids` is, or -100."""


class InputReader:
    """Makes the `Input` of a model from sentences, tokenized as in training.

    Args:
        max_tokens: longest sentence, and longest condition, EOS included.

    Raises:
        UserError: max_tokens is too small.
    """

    def __init__(self, model: T5VAE, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if max_tokens < 2:
            raise UserError(f"max_tokens is {max_tokens}: give at least 2, one token and EOS")
        self.config, self.tokenizer, self.max_tokens = model.config, tokenizer, max_tokens
        self.counts = Counts()

    def check(self, conditions: bool) -> None:
        """Raises UserError unless conditions are given exactly where the model reads
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

    def sentences(
        self, texts: Sequence[str], conditions: Sequence[str] | None = None
    ) -> list[Input]:
        """The inputs of a list of sentences, each with its condition where the model
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
        ids = self._whole(texts, "sentence")
        return [_packed(row, None if read is None else read[i]) for i, row in enumerate(ids)]

    def conditions(self, conditions: Sequence[str] | None, count: int) -> list[list[int]] | None:
        """The ids of the conditions of `count` sentences; None where the model reads
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
    ) -> Iterator[tuple[list[Line], list[Input]]]:
        """(sentences, their inputs), window by window. Blank sentences are skipped, long
        ones truncated, and both counted.

        Args:
            tags: make `Input.words`, too.

        Raises:
            UserError: as `check`.
        """
        for window in windows(not_blank(texts, self._skipped), batch_size):
            lines, inputs = [], []
            for line, each in zip(window, self.of_lines(window, tags=tags), strict=True):
                # Nothing but EOS; training skips it, too.
                if len(each.ids) == len(each.condition or ()) + 1:
                    self._skipped()
                    continue
                lines.append(line)
                inputs.append(each)
            if lines:
                self.counts.sentences += len(lines)
                yield lines, inputs

    def of_lines(self, lines: Sequence[Line], *, tags: bool = False) -> list[Input]:
        """The inputs of sentences of a stream, long ones truncated and counted. Raises
        what `check` raises."""
        for line in lines:
            self.check(line.condition is not None)
        texts = [line.text for line in lines]
        words: list[list[int] | None] = [None] * len(texts)
        if tags:
            found = tagged_ids(texts, self.tokenizer, self.max_tokens)
            ids = [(each.ids, each.truncated) for each in found]
            words = [each.words for each in found]
        else:
            ids = token_ids(texts, self.tokenizer, self.max_tokens)
        self.counts.truncated += sum(truncated for _, truncated in ids)
        conditions: list[list[int] | None] = [None] * len(texts)
        if self.config.conditional:
            conditions = [*self._of_conditions([line.condition or "" for line in lines])]
        return [
            _packed(row, condition, places)
            for (row, _), condition, places in zip(ids, conditions, words, strict=True)
        ]

    def condition_stream(
        self, conditions: Iterable[str], batch_size: int
    ) -> Iterator[tuple[list[Line], list[list[int]]]]:
        """(conditions, their ids), window by window, as `stream` takes sentences."""
        for window in windows(not_blank(conditions, self._skipped), batch_size):
            self.counts.sentences += len(window)
            yield window, self._of_conditions([line.text for line in window])

    def _of_conditions(self, conditions: list[str]) -> list[list[int]]:
        found = token_ids(conditions, self.tokenizer, self.max_tokens)
        self.counts.conditions_truncated += sum(truncated for _, truncated in found)
        return [ids for ids, _ in found]

    def _whole(self, texts: Sequence[str], what: str) -> list[list[int]]:
        """The ids of texts. Raises UserError for one that cannot be read whole."""
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
                raise UserError(
                    f"the {what} {text[:40]!r}... is longer than max_tokens ({self.max_tokens}): "
                    f"shorten it, or raise --max_tokens"
                )
        return [ids for ids, _ in tokenized]

    def _skipped(self) -> None:
        self.counts.blank += 1


def repeated(condition: str | None, count: int = 1) -> list[str] | None:
    """The conditions of `count` sentences that have the same one."""
    return None if condition is None else [condition] * count


def by_length(inputs: Sequence[Input], batch_size: int) -> Iterator[list[int]]:
    """Indices of inputs, a batch at a time, longest first. Rows of similar length need
    little padding, and their sentences end at about the same time."""
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one tensor, and its mask (1 = number, 0 = padding), both (B, S)
    int64."""
    tensor = pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=pad
    )
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(tensor.shape[1]) < lengths[:, None]).long()
    return tensor.to(device), mask.to(device)


def _packed(ids: list[int], condition: list[int] | None, words: list[int] | None = None) -> Input:
    if condition is None:
        return Input(ids, None, words)
    if words is not None:
        words = [IGNORE] * len(condition) + words
    return Input(condition + ids, condition, words)
