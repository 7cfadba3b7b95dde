"""Tokenizers, and tokenized splits that are cached by content and read
memory-mapped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
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
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dsvae.config import DataConfig
from dsvae.data.corpora import SPLITS, Corpus, fingerprint, load_corpus
from dsvae.errors import UserError, first_line

# Raise it whenever the same sentences and options would give other files.
_FORMAT = 4
_BATCH_ROWS = 10_000
_TOKENIZER_SENTENCES = 1_000_000
_STALE_SECONDS = 24 * 3600

_SPECIAL = ("<pad>", "</s>", "<unk>")
# How `tokenizers` spells a byte that no piece covers.
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Stands for a space while pieces are chosen. In the finished tokenizer a space is a
# space, so that this character is one like any other.
_SPACE = "▁"
# A word with the space before it and an apostrophe ("▁the", "'s"), a run of other
# characters ("▁."), or a space alone: like T5's own pieces, none mixes letters and
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

_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "words": datasets.Value("int32"),
        "bytes": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "hash": datasets.Value("uint64"),
    }
)


class TokenizedSplit:
    """Sentences as token ids, memory-mapped; N sentences in the order of the source.

    Columns of `dataset`: `input_ids` (EOS last and nowhere else, at most max_tokens),
    `words` (whitespace words) and `bytes` (UTF-8) of the text that the ids stand for,
    `truncated`, `hash` (of the ids).
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        # Arrow keeps the rows in chunks. Their buffers are read as they lie in the
        # file: nothing is copied at the start, and a row costs two offsets and one
        # slice.
        chunks = [chunk for chunk in dataset.data.column("input_ids").chunks if len(chunk)]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])

    def __len__(self) -> int:
        return len(self.dataset)

    def ids(self, index: int) -> np.ndarray:
        """(T,) int64: the token ids of one sentence, EOS last."""
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The token ids of the sentences `indices`, (T_i,) int64 each; IndexError
        outside 0..N-1."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of a split of {len(self)}")
        chunks = np.searchsorted(self._starts, wanted, side="right") - 1
        rows = []
        for chunk, row in zip(
            chunks.tolist(), (wanted - self._starts[chunks]).tolist(), strict=True
        ):
            offsets = self._offsets[chunk]
            rows.append(self._values[chunk][offsets[row] : offsets[row + 1]].astype(np.int64))
        return rows

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedSplit:
        """The sentences `indices` as a split of their own, held in memory."""
        with _no_progress_bars():
            return TokenizedSplit(self.dataset.select(indices).flatten_indices(keep_in_memory=True))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32: tokens of each sentence, EOS included."""
        return np.concatenate(
            [np.zeros(0, np.int32), *(np.diff(offsets) for offsets in self._offsets)]
        )

    @cached_property
    def words(self) -> np.ndarray:
        """(N,) int32: whitespace words of each sentence, as truncated."""
        return self._column("words")

    @cached_property
    def bytes(self) -> np.ndarray:
        """(N,) int32: UTF-8 bytes of each sentence, as truncated."""
        return self._column("bytes")

    @cached_property
    def truncated(self) -> np.ndarray:
        """(N,) bool: whether the sentence was longer than max_tokens."""
        return self._column("truncated")

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N,) uint64: a hash of each sentence's token ids, the same for equal
        sentences."""
        return self._column("hash")

    @cached_property
    def text_keys(self) -> np.ndarray:
        """(N,) uint64: a key of each sentence made of its token ids alone: the content
        key of the first sentence equal to it."""
        return _mix(self.hashes)

    @cached_property
    def content_keys(self) -> np.ndarray:
        """(N,) uint64: a key of each sentence made of its token ids, and of how many
        equal ones stand before it.

        Repeated sentences have different keys; as a set, the keys do not depend on the
        order of the sentences.
        """
        hashes = self.hashes
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        first = np.flatnonzero(
            np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
        )
        runs = np.diff(np.append(first, len(ordered)))
        occurrence = np.empty(len(hashes), np.uint64)
        occurrence[order] = np.arange(len(ordered)) - np.repeat(first, runs)
        return _mix(hashes + occurrence * np.uint64(0x9E3779B97F4A7C15))

    def _column(self, name: str) -> np.ndarray:
        return self.dataset.data.column(name).to_numpy()


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left: the tokenizer, the tokenized "train", "valid" and "test",
    and the report on them."""

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, TokenizedSplit]
    report: dict[str, Any]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a T5, mT5, umT5 or ByT5: a directory or a hub id. Raises
    UserError where none can be used."""
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
    # Where a directory has no vocabulary, transformers makes an empty one from the kind
    # of the model in config.json.
    if len(tokenizer) - len(tokenizer.all_special_ids) < 2:
        raise UserError(f"{name_or_path}: no tokenizer there; save the tokenizer next to the model")
    for kind in ("eos", "pad", "unk"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise UserError(
                f"{name_or_path}: its tokenizer has no {kind} token; use one of a T5, mT5 or ByT5"
            )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in T5's manner of at most `vocab_size` pieces: <pad> 0, </s>
    1 (appended), <unk> 2 (never used), those of the text, and 256 bytes.

    It spells every text and reads it back exactly: a character that has no piece is
    spelled in its UTF-8 bytes. Deterministic: the same sentences give the same
    tokenizer, byte for byte. Holds the sentences in memory. Raises UserError where
    `vocab_size` leaves no room for pieces of the text.
    """
    size = vocab_size - len(_BYTES)
    room = size - len(_SPECIAL)
    if room < 1:
        least = len(_BYTES) + len(_SPECIAL) + 1
        raise UserError(
            f"a vocabulary of {vocab_size} pieces is too small: the {len(_BYTES)} bytes and the "
            f"{len(_SPECIAL)} special pieces are part of it; give --model.vocab_size {least} or "
            f"more"
        )
    # `tokenizers`' own Unigram trainer walks hash maps of random order: its scores
    # differ from run to run, and so would the cached corpus and the losses. Its
    # byte-pair trainer breaks ties by rule. So byte-pair merges propose pieces, the
    # pieces that its segmentation uses most are kept, and their frequencies are the
    # Unigram's probabilities.
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
    # Count anew with the kept pieces alone: what the dropped ones stood for is now
    # spelled with others.
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


def prepare(
    data: DataConfig,
    *,
    tokenizer: str | None,
    vocab_size: int | None,
    seed: int,
    corpus: dict[str, Any] | None = None,
) -> Path:
    """The directory with the tokenizer, the tokenized splits and the report, made
    unless it is there; for one process.

    `tokenizer` names one to load; where it is None, one of `vocab_size` pieces is
    trained on the training sentences. The directory's name is a hash of all that
    decides its content; `corpus` is the `fingerprint` of the sentences, where it is
    known already. It appears complete, by a rename, or not at all. Raises
    UserError for a fault of the source, the tokenizer or the cache directory.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either a tokenizer or the vocab_size of one to train")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    identity = {
        "format": _FORMAT,
        "corpus": fingerprint(data, seed) if corpus is None else corpus,
        "tokenizer": {"trained": vocab_size} if loaded is None else _tokenizer_identity(loaded),
        "max_tokens": data.max_tokens,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    root = Path(
        data.cache_dir or os.path.join(datasets.config.HF_DATASETS_CACHE, "dsvae")
    ).expanduser()
    final = root / key
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root, key)
        temporary = root / f".{key}.{uuid.uuid4().hex}.tmp"
        temporary.mkdir()
        try:
            with _parallel_tokenizers():
                _fill(temporary, data, loaded, vocab_size, seed)
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenized corpus to {root}: {error.strerror or error}; "
            "make room or choose another --data.cache_dir"
        ) from error
    return final


def load_prepared(path: str | os.PathLike[str]) -> Prepared:
    """Open what `prepare` returned, memory-mapped: every rank may."""
    path = Path(path)
    try:
        splits = {
            name: TokenizedSplit(datasets.load_from_disk(str(path / name))) for name in SPLITS
        }
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: the cached corpus is damaged ({type(error).__name__}); delete this directory"
        ) from error
    return Prepared(load_tokenizer(str(path / "tokenizer")), splits, report)


def _fill(
    directory: Path,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None,
    seed: int,
) -> None:
    """Write everything of one cache entry into `directory`."""
    work_dir = directory / "work"
    work_dir.mkdir()
    corpus = load_corpus(data, seed, work_dir)
    if tokenizer is None:
        assert vocab_size is not None  # `prepare` checked that one of the two is given
        tokenizer = train_tokenizer(_sample(corpus.splits["train"]), vocab_size)
    tokenizer.save_pretrained(directory / "tokenizer")
    report: dict[str, Any] = {
        "source": corpus.source,
        "vocab_size": len(tokenizer),
        "max_tokens": data.max_tokens,
    }
    report["splits"] = {
        name: _tokenize(corpus, name, tokenizer, data.max_tokens, work_dir, directory / name)
        for name in SPLITS
    }
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work_dir)


def _tokenize(
    corpus: Corpus,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    work_dir: Path,
    target: Path,
) -> dict[str, Any]:
    """Write one tokenized split to `target` (as `datasets` saves to disk); what the
    report says about it."""
    figures: Counter[str] = Counter()
    draft = work_dir / f"{name}.tokenized.arrow"
    with ArrowWriter(path=str(draft), features=_FEATURES) as writer:
        for batch in corpus.splits[name].iter(_BATCH_ROWS):
            columns = _encode(batch["text"], tokenizer, max_tokens, figures)
            if columns["hash"]:
                writer.write_table(pa.Table.from_pydict(columns, schema=_FEATURES.arrow_schema))
        if not figures["sentences"]:
            raise UserError(
                f"{corpus.source}: the tokenizer leaves nothing of the {name} sentences; use "
                f"another"
            )
        writer.finalize()
    with _no_progress_bars():
        datasets.Dataset.from_file(str(draft)).save_to_disk(str(target), num_shards=1)
    draft.unlink()
    return {
        "sentences": figures["sentences"],
        "tokens": figures["tokens"],
        "words": figures["words"],
        "bytes": figures["bytes"],
        "unk": figures["unk"],
        "truncated": figures["truncated"],
        "skipped_blank": corpus.skipped_blank[name] + figures["blank"],
        "repeated": corpus.repeated[name],
        **({"in_train": corpus.in_train[name]} if name in corpus.in_train else {}),
        "held_out": name in corpus.held_out,
    }


def tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, where: str
) -> tuple[TokenizedSplit, np.ndarray, dict[str, int]]:
    """Sentences as a split held in memory, outside the cache: text to evaluate a
    finished model on.

    Args:
        texts: as they stand in the source; blank ones, and those of which the tokenizer
            leaves nothing, are skipped.
        where: what to call the source in an error.

    Returns: the split; (N,) int64, which of the texts each of its sentences is; and the
        counts `unk`, `truncated` and `skipped_blank`. Raises UserError where no
        sentence is left.
    """
    figures: Counter[str] = Counter()
    columns: dict[str, list] = {name: [] for name in _FEATURES}
    kept: list[int] = []
    stripped = enumerate(text.strip() for text in texts)
    with _parallel_tokenizers():
        while batch := list(islice(stripped, _BATCH_ROWS)):
            figures["blank"] += sum(not text for _, text in batch)
            positions, sentences = (
                [i for i, text in batch if text],
                [text for _, text in batch if text],
            )
            left: list[int] = []
            if sentences:
                for name, values in _encode(
                    sentences, tokenizer, max_tokens, figures, left
                ).items():
                    columns[name] += values
            kept += [positions[i] for i in left]
    if not kept:
        raise UserError(
            f"{where} has no sentences, only {figures['blank']} blank ones: give at least one "
            f"sentence"
        )
    split = TokenizedSplit(
        datasets.Dataset(pa.Table.from_pydict(columns, schema=_FEATURES.arrow_schema))
    )
    counts = {
        "unk": figures["unk"],
        "truncated": figures["truncated"],
        "skipped_blank": figures["blank"],
    }
    return split, np.array(kept, dtype=np.int64), counts


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[tuple[list[int], bool]]:
    """(ids with EOS last and nowhere else, whether they were truncated to `max_tokens`)
    of each text.

    The ids of a text of which the tokenizer leaves nothing are EOS alone.
    """
    # EOS is added here, after the cut, and `split_special_tokens` reads a "</s>" in the
    # text as text.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    # T5's own vocabulary holds "</s>" as an ordinary piece too: the end of a sentence
    # in its middle.
    inner = {
        tokenizer.eos_token_id: tokenizer.unk_token_id,
        tokenizer.pad_token_id: tokenizer.unk_token_id,
    }
    most = max_tokens - 1
    return [
        ([*(inner.get(i, i) for i in ids[:most]), tokenizer.eos_token_id], len(ids) > most)
        for ids in encoded
    ]


def _encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    figures: Counter[str],
    kept: list[int] | None = None,
) -> dict[str, list]:
    """The columns of one batch; adds to `figures`, and to `kept` which texts have a
    row.

    A text of which the tokenizer leaves nothing counts as blank.
    """
    columns: dict[str, list] = {name: [] for name in _FEATURES}
    for position, (text, (ids, truncated)) in enumerate(
        zip(texts, token_ids(texts, tokenizer, max_tokens), strict=True)
    ):
        if len(ids) == 1:
            figures["blank"] += 1
            continue
        if kept is not None:
            kept.append(position)
        unknown = ids.count(tokenizer.unk_token_id)
        if truncated or unknown:
            # Figures per word and per byte must count what the ids can spell.
            text = _spelled(ids[:-1], tokenizer)
        figures["unk"] += unknown
        columns["input_ids"].append(ids)
        columns["words"].append(len(text.split()))
        columns["bytes"].append(len(text.encode()))
        columns["truncated"].append(truncated)
        digest = hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest()
        columns["hash"].append(int.from_bytes(digest, "little"))
    figures["sentences"] += len(columns["hash"])
    figures["tokens"] += sum(map(len, columns["input_ids"]))
    for name in ("words", "bytes", "truncated"):
        figures[name] += sum(columns[name])
    return columns


def _spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that `ids` spell, without the bytes of a character that a cut goes
    through: one such byte makes the decoder give up those before it."""
    for end in range(len(ids), max(len(ids) - 4, -1), -1):
        text = str(
            tokenizer.decode(
                ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        if not text.endswith("\ufffd"):
            break
    return text


def _alphabet(sentences: list[str], size: int) -> list[str]:
    """The characters that get a piece each, most frequent first: all, or as many as
    half of `size` pieces holds, or nearly all the text consists of if those are more."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence.replace(" ", _SPACE))
    # a word at the start of a sentence has it too, even where no sentence has a second
    # word
    counts[_SPACE] += 1
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in ranked])
    needed = int(np.searchsorted(covered, _COVERAGE * covered[-1])) + 1
    return ranked[: max(needed, size // 2)]


def _piece_counts(tokenizer: Tokenizer, sentences: list[str]) -> Counter[str]:
    counts: Counter[int] = Counter()
    for start in range(0, len(sentences), _BATCH_ROWS):
        for encoding in tokenizer.encode_batch_fast(sentences[start : start + _BATCH_ROWS]):
            counts.update(encoding.ids)
    return Counter({str(tokenizer.id_to_token(token)): count for token, count in counts.items()})


def _unigram(pieces: list[str], counts: Counter[str], space: str) -> Tokenizer:
    """A Unigram tokenizer of the special pieces, `pieces` and the bytes; a piece that
    never occurs counts as half an occurrence."""
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
    """A tokenizer of `model`, whose pieces write a space as `space`."""
    tokenizer = Tokenizer(model)
    # The first word gets a space like the others, which decoding takes away again: a
    # word has the same piece everywhere.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(" "), normalizers.Replace(" ", space)]
    )
    word = Regex(_WORD.replace(_SPACE, space))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(word, "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _sample(split: datasets.Dataset) -> Iterator[str]:
    """The sentences to train a tokenizer on: all, or evenly spaced ones where there are
    more than it takes."""
    step = -(-len(split) // _TOKENIZER_SENTENCES)
    for batch in split.select(range(0, len(split), step)).iter(_BATCH_ROWS):
        yield from batch["text"]


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the ids that a tokenizer gives, wherever it was loaded from."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    return {"class": type(tokenizer).__name__, "content": digest.hexdigest(), "special": special}


def _publish(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():  # another run may have been first: its entry is equal
            raise


def _sweep(root: Path, key: str) -> None:
    """Remove what killed runs left of this entry; a day old, so that no run still
    writes it."""
    for leftover in root.glob(f".{key}.*.tmp"):
        with suppress(FileNotFoundError):  # its run may be ending at this moment
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Let `tokenizers` use its threads inside, and none afterwards: it warns about
    every later fork otherwise."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _mix(keys: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a bijection of uint64: keys that differ stay different
    and look random."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
