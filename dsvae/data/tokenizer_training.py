"""The tokenizer of a new T5: a Unigram model with bytes for whatever has no piece."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dsvae.data.records import BATCH_ROWS
from dsvae.errors import UserError

_SPECIAL = ("<pad>", "</s>", "<unk>")
# How `tokenizers` spells a byte that no piece covers.
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Stands for a space while pieces are chosen. In the finished tokenizer a space is a
# space, and this character is one like any other.
_SPACE = "▁"
# A word with the space before it and an apostrophe ("▁the", "'s"), a run of other
# characters ("▁."), or a single space. Like T5's own pieces, none mixes letters and
# punctuation.
_APOSTROPHE = "['\u2019]"
_WORD = (
    rf"{_SPACE}?{_APOSTROPHE}?[\p{{L}}\p{{M}}\p{{N}}]+"
    rf"|{_SPACE}?[^\p{{L}}\p{{M}}\p{{N}}{_SPACE}]+|{_SPACE}"
)
_COVERAGE = 0.9995
_PROPOSALS = 2
_LONGEST_PIECE = 16
# Score of the special pieces and the bytes. `_WORD` cuts the text "</s>" or "<0x41>"
# apart, so that it never matches one of them.
_NEVER = -100.0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a Unigram tokenizer in the manner of T5.

    Its pieces are <pad> 0, </s> 1 (appended), <unk> 2 (never used), those of the text, and
    256 bytes. It spells every text and reads it back exactly: a character without a piece
    is spelled in its UTF-8 bytes. The same sentences give the same tokenizer, byte for
    byte. The sentences are held in memory.

    Args:
        vocab_size: the largest number of pieces, all kinds together.

    Raises:
        UserError: `vocab_size` leaves no room for pieces of the text.
    """
    size = vocab_size - len(_BYTES)
    room = size - len(_SPECIAL)
    if room < 1:
        smallest = len(_BYTES) + len(_SPECIAL) + 1
        raise UserError(
            f"a vocabulary of {vocab_size} pieces is too small: the {len(_BYTES)} bytes and the "
            f"{len(_SPECIAL)} special pieces are part of it; give --model.vocab_size {smallest} or "
            f"more"
        )
    # The Unigram trainer of `tokenizers` iterates over hash maps of random order. Its
    # scores differ from run to run, and so would the cached corpus and the losses. Its
    # byte-pair trainer breaks ties by rule. So byte-pair merges propose pieces, the
    # pieces that are the most frequent in the segmented text are kept, and their
    # frequencies are the probabilities of the Unigram model.
    sentences = list(texts)
    alphabet = _alphabet(sentences, size)[:room]
    proposal = _pipeline(models.BPE(unk_token=_SPECIAL[2]), _SPACE)
    proposal.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=size * _PROPOSALS,
            special_tokens=list(_SPECIAL),
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            max_token_length=_LONGEST_PIECE,
            show_progress=False,
        ),
    )
    counts = _piece_counts(proposal, sentences)
    merged = sorted(
        counts.keys() - {*alphabet, *_SPECIAL}, key=lambda piece: (-counts[piece], piece)
    )
    pieces = [*alphabet, *merged[: room - len(alphabet)]]
    # Count again with the kept pieces: the text of the dropped ones is now spelled with
    # others.
    counts = _piece_counts(_unigram(pieces, counts, _SPACE), sentences)
    tokenizer = _unigram(sorted(pieces, key=lambda piece: (-counts[piece], piece)), counts, " ")
    eos = _SPECIAL[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=eos,
        unk_token=_SPECIAL[2],
        clean_up_tokenization_spaces=False,
    )


def _alphabet(sentences: list[str], size: int) -> list[str]:
    """Returns the characters that get a piece each, most frequent first.

    These are as many as fit into half of `size` pieces, or as many as cover nearly all of
    the text (`_COVERAGE`) if those are more.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence.replace(" ", _SPACE))
    # The first word of a sentence has a space, too, even if no sentence has a second word.
    counts[_SPACE] += 1
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in ranked])
    needed = int(np.searchsorted(covered, _COVERAGE * covered[-1])) + 1
    return ranked[: max(needed, size // 2)]


def _piece_counts(tokenizer: Tokenizer, sentences: list[str]) -> Counter[str]:
    counts: Counter[int] = Counter()
    for start in range(0, len(sentences), BATCH_ROWS):
        for encoding in tokenizer.encode_batch_fast(sentences[start : start + BATCH_ROWS]):
            counts.update(encoding.ids)
    return Counter({str(tokenizer.id_to_token(token)): count for token, count in counts.items()})


def _unigram(pieces: list[str], counts: Counter[str], space: str) -> Tokenizer:
    """Makes a Unigram tokenizer of the special pieces, `pieces` and the bytes. A piece
    that never occurs counts as half an occurrence."""
    total = math.log(sum(max(counts[piece], 0.5) for piece in pieces))
    vocabulary = [
        *((piece, _NEVER) for piece in _SPECIAL),
        *(
            (piece.replace(_SPACE, space), math.log(max(counts[piece], 0.5)) - total)
            for piece in pieces
        ),
        *((piece, _NEVER) for piece in _BYTES),
    ]
    return _pipeline(models.Unigram(vocabulary, unk_id=2, byte_fallback=True), space)


def _pipeline(model: models.Model, space: str) -> Tokenizer:
    """Makes a tokenizer of `model`, in whose pieces a space is written as `space`."""
    tokenizer = Tokenizer(model)
    # The first word gets a space like the others, so that a word has the same piece
    # everywhere. Decoding removes it again.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(" "), normalizers.Replace(" ", space)]
    )
    word = Regex(_WORD.replace(_SPACE, space))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(word, "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
