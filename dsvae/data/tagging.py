"""Tags of words as tags of pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dsvae.data.tokenization import ordinary_ids
from dsvae.errors import UserError
from dsvae.modeling.crf import IGNORE


class TaggedIds(NamedTuple):
    """A sentence as T token ids, with what its words say about its tokens."""

    ids: list[int]
    """EOS last and nowhere else."""
    truncated: bool
    """Whether the sentence was longer than max_tokens."""
    words: list[int]
    """(T,), the number of the word whose first piece a token is; -100 for the other
    pieces of a word, white space and EOS."""


def tagged_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[TaggedIds]:
    """Returns token ids in which every whitespace word has a piece.

    They are those of `token_ids`, except that a word of which the tokenizer leaves
    nothing becomes the unknown piece: otherwise its tag would have no place.

    Raises:
        UserError: the tokenizer does not say which characters a piece stands for.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "--tags_column needs a fast tokenizer, which says where its pieces stand in the "
            f"text; {type(tokenizer).__name__} does not: use another model"
        )
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    most = max_tokens - 1
    found = []
    for text, pieces, spans in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        ids, words = _with_words(text, ordinary_ids(pieces, tokenizer), spans, tokenizer)
        found.append(
            TaggedIds(
                [*ids[:most], tokenizer.eos_token_id], len(ids) > most, [*words[:most], IGNORE]
            )
        )
    return found


def _with_words(
    text: str, pieces: list[int], spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Returns the pieces, and unknown ones for the words without any, and which word
    each of them begins."""
    word_at = [-1] * len(text)
    count = 0
    for match in re.finditer(r"\S+", text):
        word_at[match.start() : match.end()] = [count] * (match.end() - match.start())
        count += 1
    ids: list[int] = []
    words: list[int] = []
    following = 0  # the first word that has no piece yet
    for piece, (start, end) in zip(pieces, spans, strict=True):
        # -1: a piece of white space
        word = next((word_at[i] for i in range(start, end) if word_at[i] >= 0), -1)
        while following < word:
            ids.append(tokenizer.unk_token_id)
            words.append(following)
            following += 1
        ids.append(piece)
        words.append(word if word == following else IGNORE)
        following = max(following, word + 1)
    rest = range(following, count)
    return ids + [tokenizer.unk_token_id] * len(rest), words + list(rest)
