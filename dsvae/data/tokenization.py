"""Tokenizers, sentences as token ids, and splits of them that are read
memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dsvae.data.lists import Lists
from dsvae.data.noise import mix
from dsvae.errors import UserError, first_line


def _column(name: str) -> cached_property[Any]:
    """Makes a property with the numbers of a column; None if the split does not have
    it."""

    def read(split: TokenizedSplit) -> np.ndarray | None:
        present = name in split.dataset.column_names
        return split.dataset.data.column(name).to_numpy() if present else None

    return cached_property(read)


class TokenizedSplit:
    """N sentences as token ids, memory-mapped, in the order of the source.

    Columns of `dataset`: `input_ids` (EOS last and nowhere else, at most max_tokens);
    `words` (whitespace words) and `bytes` (UTF-8) of the text that the ids stand for;
    `truncated`; `hash` (of the ids). If they were named: `condition_ids` (as
    `input_ids`) and `condition_hash`; `class_label`; `tag_ids` (one per input id).

    The methods with `indices` read these rows alone. The properties hold a number per
    sentence in memory: they are for splits that are evaluated.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._ids = Lists(dataset, "input_ids")
        self._conditions, self._tags = (
            Lists(dataset, name) if name in dataset.column_names else None
            for name in ("condition_ids", "tag_ids")
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def ids(self, index: int) -> np.ndarray:
        """Returns (T,) int64, the token ids of one sentence, EOS last."""
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Returns the token ids of the sentences `indices`, (T_i,) int64 each.

        Raises:
            IndexError: an index outside 0..N-1.
        """
        return self._ids.rows(indices)

    def conditions(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray] | None:
        """Returns the token ids of the conditions of the sentences `indices`, (C_i,)
        int64 each, EOS last; None if sentences have no conditions."""
        return None if self._conditions is None else self._conditions.rows(indices)

    def tags(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray] | None:
        """Returns the tags of the tokens of the sentences `indices`, (T_i,) int64 each.

        A tag stands at the first piece of its word, and -100 at other pieces, at EOS and
        in a record without tags. None if no record has tags.
        """
        return None if self._tags is None else self._tags.rows(indices)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedSplit:
        """Returns the sentences `indices` as another split, held in memory."""
        with no_progress_bars():
            return TokenizedSplit(self.dataset.select(indices).flatten_indices(keep_in_memory=True))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32, tokens of each sentence, EOS included."""
        return self._ids.lengths()

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns `lengths` of the sentences `indices`."""
        return self._ids.lengths(indices)

    def condition_lengths_of(self, indices: np.ndarray | None = None) -> np.ndarray | None:
        """Returns (N,) int32, tokens of the conditions of the sentences `indices`, or
        of all, EOS included; None without conditions."""
        return None if self._conditions is None else self._conditions.lengths(indices)

    def class_labels_of(self, indices: np.ndarray | slice) -> np.ndarray | None:
        """Returns (N,) int64, the numbers of the labels of the records `indices`, -100
        if a record has none; None if no record has one."""
        if "class_label" not in self.dataset.column_names:
            return None
        column = self.dataset.select_columns("class_label").with_format("numpy", dtype=np.int64)
        return column[indices]["class_label"]

    @cached_property
    def class_labels(self) -> np.ndarray | None:
        """`class_labels_of` all records."""
        return self.class_labels_of(slice(None))

    words = _column("words")
    """(N,) int32, whitespace words of each truncated sentence."""
    bytes = _column("bytes")
    """(N,) int32, UTF-8 bytes of each truncated sentence."""
    truncated = _column("truncated")
    """(N,) bool, whether the sentence was longer than max_tokens."""
    hashes = _column("hash")
    """(N,) uint64, a hash of each sentence's token ids."""
    condition_hashes = _column("condition_hash")
    """(N,) uint64, a hash of each condition's token ids; None without conditions."""

    @cached_property
    def record_hashes(self) -> np.ndarray:
        """(N,) uint64, a hash of each sentence and its condition."""
        conditions = self.condition_hashes
        return self.hashes if conditions is None else self.hashes + mix(conditions)

    @cached_property
    def text_keys(self) -> np.ndarray:
        """(N,) uint64, a key of each sentence made only of its token ids: the content key
        of the first sentence that is equal to it."""
        return mix(self.hashes)

    @cached_property
    def content_keys(self) -> np.ndarray:
        """(N,) uint64, a key of each sentence made of its token ids, of those of its
        condition, and of the number of equal records before it.

        Repeated sentences have different keys. As a set, the keys do not depend on the
        order of the sentences.
        """
        hashes = self.record_hashes
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        first = np.flatnonzero(
            np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
        )
        runs = np.diff(np.append(first, len(ordered)))
        occurrence = np.empty(len(hashes), np.uint64)
        occurrence[order] = np.arange(len(ordered)) - np.repeat(first, runs)
        return mix(hashes + occurrence * np.uint64(0x9E3779B97F4A7C15))


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that stands for a masked token: the mask token, the first sentinel,
    or the unknown piece."""
    vocabulary = tokenizer.get_vocab()
    names = (tokenizer.mask_token, "<extra_id_0>", tokenizer.unk_token)
    return next(vocabulary[name] for name in names if name in vocabulary)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a T5, mT5, umT5 or ByT5.

    Args:
        name_or_path: a directory, or a hub id.

    Raises:
        UserError: no usable tokenizer there.
    """
    local = Path(name_or_path).expanduser()
    if not local.is_dir() and (
        local.exists() or local.is_absolute() or name_or_path.startswith((".", "~"))
    ):
        raise UserError(
            f"{name_or_path}: no such directory; name a directory with a tokenizer, or a hub model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(local) if local.is_dir() else name_or_path)
    except Exception as error:  # transformers, tokenizers and the network each raise their own
        reason = first_line(error)
        if local.is_dir():
            raise UserError(
                f"{name_or_path}: its tokenizer cannot be loaded ({reason}); save the tokenizer "
                f"next to the model"
            ) from error
        raise UserError(
            f"tokenizer {name_or_path}: neither a directory nor a hub model that can be reached "
            f"({reason}); "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error
    # If a directory has no vocabulary, transformers makes an empty tokenizer of the kind
    # that config.json names.
    if len(tokenizer) - len(tokenizer.all_special_ids) < 2:
        raise UserError(f"{name_or_path}: no tokenizer there; save the tokenizer next to the model")
    for kind in ("eos", "pad", "unk"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise UserError(
                f"{name_or_path}: its tokenizer has no {kind} token; use one of a T5, mT5 or ByT5"
            )
    return tokenizer


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[tuple[list[int], bool]]:
    """Returns for each text its ids, with EOS last and nowhere else, and whether they
    were truncated to `max_tokens`.

    If the tokenizer leaves nothing of a text, its ids are EOS alone.
    """
    if not texts:
        return []
    # EOS is added after the cut. `split_special_tokens` reads a "</s>" in the text as
    # text.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    most = max_tokens - 1
    return [
        ([*ordinary_ids(ids[:most], tokenizer), tokenizer.eos_token_id], len(ids) > most)
        for ids in encoded
    ]


def ordinary_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns token ids of a text with the unknown piece in place of EOS and
    padding."""
    # In T5's own vocabulary "</s>" is an ordinary piece, too. It would end a sentence in
    # its middle.
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [tokenizer.unk_token_id if i in special else i for i in ids]


def hash_of(ids: list[int]) -> int:
    """Returns a hash of token ids, 64 bits."""
    digest = hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text that `ids` spell, without the bytes of a character that was cut.

    A single such byte makes the decoder drop the bytes before it.
    """
    for end in range(len(ids), max(len(ids) - 4, -1), -1):
        text = str(
            tokenizer.decode(
                ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        if not text.endswith("\ufffd"):
            break
    return text


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Lets `tokenizers` use threads inside, and none afterwards: otherwise it would warn
    about every later fork."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
