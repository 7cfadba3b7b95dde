"""Tokenizers, sentences as token ids, and splits of them that are read memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dsvae.data.lists import Lists
from dsvae.data.noise import mix
from dsvae.errors import UserError, first_line

T = TypeVar("T")
BATCH_ROWS = 10_000
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "words": datasets.Value("int32"),
        "bytes": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "hash": datasets.Value("uint64"),
    }
)


class TokenizedSplit:
    """N sentences as token ids, memory-mapped, in the order of the source.

    Columns of `dataset`: `input_ids` (EOS last and nowhere else, at most max_tokens);
    `words` (whitespace words) and `bytes` (UTF-8) of the text that the ids stand for;
    `truncated`; `hash` (of the ids). Where they were named: `condition_ids` (as
    `input_ids`) and `condition_hash`; `class_label`; `tag_ids` (one per input id).

    The methods with `indices` read these rows alone. The properties hold a number per
    sentence in memory: they are for splits that are evaluated.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._ids = Lists(dataset, "input_ids")

    def __len__(self) -> int:
        return len(self.dataset)

    def ids(self, index: int) -> np.ndarray:
        """(T,) int64, the token ids of one sentence, EOS last."""
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The token ids of the sentences `indices`, (T_i,) int64 each.

        Raises:
            IndexError: an index outside 0..N-1.
        """
        return self._ids.rows(indices)

    def conditions(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray] | None:
        """The token ids of the conditions of the sentences `indices`, (C_i,) int64 each,
        EOS last; None where sentences have no conditions."""
        return None if self._conditions is None else self._conditions.rows(indices)

    def tags(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray] | None:
        """The tags of the tokens of the sentences `indices`, (T_i,) int64 each.

        A tag stands at the first piece of its word, and -100 at other pieces, at EOS and
        where a record has no tags. None where sentences have no tags at all.
        """
        return None if self._tags is None else self._tags.rows(indices)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedSplit:
        """The sentences `indices` as another split, held in memory."""
        with no_progress_bars():
            return TokenizedSplit(self.dataset.select(indices).flatten_indices(keep_in_memory=True))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32, tokens of each sentence, EOS included."""
        return self._ids.lengths()

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """`lengths` of the sentences `indices`."""
        return self._ids.lengths(indices)

    def condition_lengths_of(self, indices: np.ndarray | None = None) -> np.ndarray | None:
        """(N,) int32, tokens of the conditions of the sentences `indices`, or of all, EOS
        included; None without conditions."""
        return None if self._conditions is None else self._conditions.lengths(indices)

    @cached_property
    def class_labels(self) -> np.ndarray | None:
        """(N,) int64, the number of each record's label, -100 where it has none; None
        where sentences have no labels at all."""
        return None if self._labels is None else self._column("class_label").astype(np.int64)

    def class_labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """`class_labels` of the sentences `indices`."""
        return None if self._labels is None else self._labels[indices]["class_label"]

    @cached_property
    def words(self) -> np.ndarray:
        """(N,) int32, whitespace words of each truncated sentence."""
        return self._column("words")

    @cached_property
    def bytes(self) -> np.ndarray:
        """(N,) int32, UTF-8 bytes of each truncated sentence."""
        return self._column("bytes")

    @cached_property
    def truncated(self) -> np.ndarray:
        """(N,) bool, whether the sentence was longer than max_tokens."""
        return self._column("truncated")

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N,) uint64, a hash of each sentence's token ids."""
        return self._column("hash")

    @cached_property
    def condition_hashes(self) -> np.ndarray | None:
        """(N,) uint64, a hash of each condition's token ids; None without conditions."""
        return None if self._conditions is None else self._column("condition_hash")

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

    @cached_property
    def _conditions(self) -> Lists | None:
        return self._lists("condition_ids")

    @cached_property
    def _tags(self) -> Lists | None:
        return self._lists("tag_ids")

    @cached_property
    def _labels(self) -> datasets.Dataset | None:
        if "class_label" not in self.dataset.column_names:
            return None
        return self.dataset.select_columns("class_label").with_format("numpy", dtype=np.int64)

    def _lists(self, name: str) -> Lists | None:
        return Lists(self.dataset, name) if name in self.dataset.column_names else None

    def _column(self, name: str) -> np.ndarray:
        return self.dataset.data.column(name).to_numpy()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a T5, mT5, umT5 or ByT5.

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


def tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, where: str
) -> tuple[TokenizedSplit, np.ndarray, dict[str, int]]:
    """Sentences as a split that is held in memory and not cached, for the evaluation of a
    finished model.

    Args:
        texts: as they stand in the source. Blank ones are skipped, and those of which
            the tokenizer leaves nothing.
        where: what errors call the source.

    Returns: the split; (N,) int64, which of the texts each of its sentences is; and the
        counts `unk`, `truncated` and `skipped_blank`.

    Raises:
        UserError: no sentence is left.
    """

    def columns_of(batch: list[str], figures: Counter[str], kept: list[int]) -> dict[str, list]:
        return encode(batch, tokenizer, max_tokens, figures, kept)

    split, kept, figures = collect(
        (text.strip() for text in texts), str, columns_of, FEATURES, where
    )
    return split, kept, {name: figures[name] for name in ("unk", "truncated", "skipped_blank")}


def collect(
    records: Iterable[T],
    text_of: Callable[[T], str],
    columns_of: Callable[[list[T], Counter[str], list[int]], dict[str, list]],
    features: datasets.Features,
    where: str,
) -> tuple[TokenizedSplit, np.ndarray, Counter[str]]:
    """Records as a split that is held in memory.

    Args:
        text_of: the stripped text of a record. Records with a blank one are skipped.
        columns_of: the columns of a batch, as `encode` makes them of its texts.
        features: the types of these columns.

    Returns, Raises: as `tokenize`, with all counts.
    """
    figures: Counter[str] = Counter()
    columns: dict[str, list] = {name: [] for name in features}
    kept: list[int] = []
    numbered = enumerate(records)
    with parallel_tokenizers():
        while batch := list(islice(numbered, BATCH_ROWS)):
            full = [(i, record) for i, record in batch if text_of(record)]
            figures["blank"] += len(batch) - len(full)
            left: list[int] = []
            if full:
                found = columns_of([record for _, record in full], figures, left)
                for name, values in found.items():
                    columns[name] += values
            kept += [full[i][0] for i in left]
    figures["skipped_blank"] = figures.pop("blank", 0)
    if not kept:
        raise UserError(
            f"{where} has no sentences, only {figures['skipped_blank']} blank ones: give at least "
            f"one sentence"
        )
    split = TokenizedSplit(
        datasets.Dataset(pa.Table.from_pydict(columns, schema=features.arrow_schema))
    )
    return split, np.array(kept, dtype=np.int64), figures


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[tuple[list[int], bool]]:
    """For each text its ids, with EOS last and nowhere else, and whether they were
    truncated to `max_tokens`.

    If the tokenizer leaves nothing of a text, its ids are EOS alone.
    """
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
    """Token ids of a text with the unknown piece in place of EOS and padding."""
    # In T5's own vocabulary "</s>" is an ordinary piece, too. It would end a sentence in
    # its middle.
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [tokenizer.unk_token_id if i in special else i for i in ids]


def encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    figures: Counter[str],
    kept: list[int] | None = None,
    ids_of_texts: list[tuple[list[int], bool]] | None = None,
) -> dict[str, list]:
    """The columns of one batch.

    A text of which the tokenizer leaves nothing counts as blank.

    Args:
        figures: the counts of the batch are added to it.
        kept: the places of the texts that have a row are added to it.
        ids_of_texts: what `token_ids` gives, where it is already known.
    """
    columns: dict[str, list] = {name: [] for name in FEATURES}
    if ids_of_texts is None:
        ids_of_texts = token_ids(texts, tokenizer, max_tokens)
    for position, (text, (ids, truncated)) in enumerate(zip(texts, ids_of_texts, strict=True)):
        if len(ids) == 1:
            figures["blank"] += 1
            continue
        if kept is not None:
            kept.append(position)
        unknown = ids.count(tokenizer.unk_token_id)
        if truncated or unknown:
            # Numbers per word and per byte must count what the ids can spell.
            text = _spelled(ids[:-1], tokenizer)
        figures["unk"] += unknown
        columns["input_ids"].append(ids)
        columns["words"].append(len(text.split()))
        columns["bytes"].append(len(text.encode()))
        columns["truncated"].append(truncated)
        columns["hash"].append(hash_of(ids))
    figures["sentences"] += len(columns["hash"])
    figures["tokens"] += sum(map(len, columns["input_ids"]))
    for name in ("words", "bytes", "truncated"):
        figures[name] += sum(columns[name])
    return columns


def hash_of(ids: list[int]) -> int:
    """A hash of token ids, 64 bits."""
    digest = hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that `ids` spell, without the bytes of a character that was cut.

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
