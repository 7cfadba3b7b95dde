"""A T5VAE and its tokenizer together: strings in, latents between, strings out."""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dsvae import pretrained
from dsvae.data.noise import LATENT, ORDER, PRIOR, generator
from dsvae.data.tokenization import token_ids
from dsvae.errors import UserError, first_line
from dsvae.generation import geometry
from dsvae.generation.options import refusal
from dsvae.generation.reading import Line, not_blank, windows
from dsvae.modeling.families import Distribution
from dsvae.modeling.t5_vae import T5VAE

MAX_NEW_TOKENS = 128
"""Longest generated sentence in tokens, EOS included, unless `max_new_tokens` says
otherwise."""

SCALES = ("prior", "posterior")


@dataclass
class Counts:
    """What has gone through a `SentenceVAE` so far."""

    sentences: int = 0
    """Sentences of streams that were encoded."""
    blank: int = 0
    """Blank sentences of streams, skipped."""
    truncated: int = 0
    """Sentences of streams that were longer than `max_tokens`."""
    unfinished: int = 0
    """Generated sentences that reached `max_new_tokens` before EOS."""


class SentenceVAE:
    """Encodes, decodes, and what lies between, in batches of sentences of similar
    length; results come in the order given.

    Lists of sentences are held to be meant: a blank one, or one longer than
    `max_tokens`, is a UserError. Streams (the methods that end in `_stream`) take what
    files hold: blank sentences are skipped and long ones truncated, counted in
    `counts`; they hold one window of sentences in memory, however long the stream.

    Where a method takes `options`, they are those of transformers' `generate`; nothing
    given is greedy decoding. Sampled tokens come from torch's global generator
    (`torch.manual_seed`), as in transformers.

    Args:
        model: with a latent, on the device where it is to run; put into evaluation
            mode.
        tokenizer: the one that it was trained with.
        batch_size: sentences at a time. It changes the speed, and which numbers sampled
            tokens draw.
        max_tokens: longest sentence to encode, EOS included. T5 itself has no limit;
            memory grows with the square.

    Raises:
        UserError: a model without a latent, or a batch_size or max_tokens that leaves
            no room.
    """

    def __init__(
        self,
        model: T5VAE,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 128,
        max_tokens: int = 512,
    ) -> None:
        if model.config.injection == "none":
            raise UserError(
                "the model is a language model without a latent (injection none): give one with "
                "a latent"
            )
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1")
        if max_tokens < 2:
            raise UserError(f"max_tokens is {max_tokens}: give at least 2, one token and EOS")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.counts = Counts()

    @classmethod
    def from_pretrained(
        cls, model_dir: str, *, device: str | None = None, **settings: Any
    ) -> SentenceVAE:
        """The model and the tokenizer of a directory (`model/` in the output of a run)
        or a hub id, in float32.

        Args:
            device: as torch calls it. None: the accelerator, where there is one.
            settings: `batch_size` and `max_tokens`.

        Raises:
            UserError: no model there, no weights, not a T5VAE, no tokenizer, no latent,
                or no such device.
        """
        where = find_device(device)
        model, tokenizer = pretrained.load(model_dir)
        if model.config.injection == "none":
            raise UserError(
                f"{model_dir} is a language model without a latent (injection none): give one "
                f"with a latent; "
                "of this one there is only dsvae evaluate"
            )
        nn.Module.to(model, where)
        return cls(model, tokenizer, **settings)

    @property
    def latent_dim(self) -> int:
        """Z, the numbers of one z."""
        return self.model.family.latent_width

    # Encoding and decoding

    def encode(self, texts: Sequence[str]) -> Distribution:
        """q(z|x) of N sentences, on CPU: mean and logvar, (N, Z) float32."""
        return self._encode(self._meant(texts))

    def decode(self, latent: Tensor, **options: Any) -> list[str]:
        """One sentence for each z of (N, Z)."""
        if latent.ndim != 2 or latent.shape[1] != self.latent_dim:
            raise ValueError(f"the latent is {tuple(latent.shape)}, not (N, {self.latent_dim})")
        return [
            text
            for part in latent.split(self.batch_size)
            for text in self._decode_batch(part, options)
        ]

    def reconstruct(self, texts: Sequence[str], **options: Any) -> list[str]:
        """The sentences as the decoder gives them back from their posterior means."""
        return self._reconstruct(self._meant(texts), options)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[tuple[list[Line], Distribution]]:
        """(sentences, q(z|x) of them on CPU), window by window."""
        for lines, rows in self._rows_of_stream(texts):
            yield lines, self._encode(rows)

    def reconstruct_stream(
        self, texts: Iterable[str], **options: Any
    ) -> Iterator[tuple[Line, str]]:
        """(sentence, reconstruction), one by one."""
        for lines, rows in self._rows_of_stream(texts):
            yield from zip(lines, self._reconstruct(rows, options), strict=True)

    # Samples

    def sample(
        self,
        count: int,
        *,
        texts: Sequence[str] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[str]:
        """`count` sentences of random z: from the prior, or from the aggregate
        posterior of `texts`.

        Args:
            texts: z comes from q(z|x) of one of these, drawn uniformly with
                replacement: the aggregate posterior (1/N) sum_i q(z|x_i) (Makhzani et
                al. 2016), where the decoder has been, which need not be where the prior
                is.
            seed: of z; the same seed gives the same z, whatever the batch size and for
                any greater `count`. None: from torch's global generator.
        """
        if count < 1:
            raise UserError(f"the number of samples is {count}: give at least 1")
        seed = int(torch.randint(2**53, ())) if seed is None else check_seed(seed)
        if texts is None:
            return list(self.prior_stream(count, seed=seed, **options))
        self._meant(texts)
        drawn = generator(seed, ORDER, 0, 0).integers(len(texts), size=count)
        return [
            text
            for _, text in self.posterior_stream(
                (Line(i + 1, texts[i]) for i in drawn), seed=seed, **options
            )
        ]

    def prior_stream(self, count: int, *, seed: int, **options: Any) -> Iterator[str]:
        """Sentences of `count` z from the prior, one by one."""
        for start in range(0, count, self.batch_size):
            noise = self._noise(seed, PRIOR, range(start, min(start + self.batch_size, count)))
            yield from self.decode(self.model.family.prior().sample(noise), **options)

    def posterior_stream(
        self, lines: Iterable[Line], *, seed: int, **options: Any
    ) -> Iterator[tuple[Line, str]]:
        """(sentence, sentence of one z drawn from its posterior), one by one."""
        done = 0
        for window in windows(lines, self.batch_size):
            tokenized = self._tokenize([line.text for line in window])
            self.counts.truncated += sum(truncated for _, truncated in tokenized)
            rows = [ids for ids, _ in tokenized]
            latent = self._encode(rows).sample(
                self._noise(seed, LATENT, range(done, done + len(window)))
            )
            done += len(window)
            yield from zip(window, self.decode(latent, **options), strict=True)

    # Paths and directions

    def interpolate(
        self, a: str, b: str, *, steps: int = 8, path: str = "linear", **options: Any
    ) -> list[str]:
        """`steps` sentences from `a` to `b`; the first and the last are their
        reconstructions.

        Args:
            path: linear or slerp (see `dsvae.generation.geometry`).
        """
        self._need_continuous("a path between two sentences")
        if steps < 2:
            raise UserError(f"steps is {steps}: a path needs at least 2, its two ends")
        point = self.encode([a, b]).point
        return self.decode(geometry.interpolate(point[0], point[1], steps, path), **options)

    def analogy(self, a: str, b: str, c: str, **options: Any) -> str:
        """The sentence that is to `c` as `b` is to `a`: of z_b - z_a + z_c."""
        self._need_continuous("an analogy")
        point = self.encode([a, b, c]).point
        return self.decode(geometry.analogy(*point)[None], **options)[0]

    def traversal(
        self, text: str, dim: int, *, steps: int = 7, width: float = 3.0, scale: str = "prior"
    ) -> tuple[list[float], Tensor]:
        """The posterior mean of a sentence with one dimension moved: (offsets, z
        (steps, Z)).

        Args:
            dim: 0 .. Z-1.
            steps: at least 2, equally spaced over -width .. width.
            width: in standard deviations of `scale`.
            scale: prior: the dimension takes the values that the prior has there,
                whatever the sentence; posterior: it moves about the sentence's own
                value.
        """
        self._need_continuous("a traversal")
        if not 0 <= dim < self.latent_dim:
            raise UserError(
                f"dim is {dim}: the model's latent has dimensions 0 to {self.latent_dim - 1}"
            )
        if steps < 2:
            raise UserError(f"steps is {steps}: a traversal needs at least 2, its two ends")
        if not (math.isfinite(width) and width > 0):
            raise UserError(f"width is {width}: give a positive number of standard deviations")
        if scale not in SCALES:
            raise UserError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
        offsets = torch.linspace(-width, width, steps)
        posterior = self._encode(self._meant([text]) * steps)
        latent = posterior.point.clone()
        about = posterior if scale == "posterior" else self.model.family.prior()
        latent[:, dim] = about.along(dim, offsets)[0]
        return offsets.tolist(), latent

    def traverse(
        self,
        text: str,
        dim: int,
        *,
        steps: int = 7,
        width: float = 3.0,
        scale: str = "prior",
        **options: Any,
    ) -> list[str]:
        """The sentences of a `traversal`, whose settings it takes."""
        return self.decode(
            self.traversal(text, dim, steps=steps, width=width, scale=scale)[1], **options
        )

    def attribute_vector(self, texts: Iterable[str], labels: Iterable[str], toward: str) -> Tensor:
        """Mean latent of the sentences labelled `toward` minus that of all others, (Z,)
        float32 (Larsen et al. 2016).

        A stream: `texts` and `labels` go side by side, the label of a blank sentence is
        skipped with it.

        Raises:
            UserError: more labels than sentences or fewer, or none on one of the two
                sides.
        """
        self._need_continuous("a direction")
        sums = torch.zeros(2, self.latent_dim, dtype=torch.float64)
        counts = [0, 0]
        # numbers and labels of the sentences that are read and not yet encoded
        waiting: deque[tuple[int, str]] = deque()

        def labelled() -> Iterator[str]:
            for number, (text, label) in enumerate(zip_longest(texts, labels), 1):
                if text is None or label is None:
                    more, fewer = (
                        ("labels", "sentences") if text is None else ("sentences", "labels")
                    )
                    raise UserError(
                        f"{number - 1} {fewer} and more {more}: give one label a sentence, in "
                        f"the same order"
                    )
                waiting.append((number, label))
                yield text

        def label_of(line: Line) -> str:
            while (pair := waiting.popleft())[0] != line.line:
                pass  # a blank sentence
            return pair[1]

        for lines, posterior in self.encode_stream(labelled()):
            side = torch.tensor([label_of(line) == toward for line in lines]).long()  # 1: toward
            sums.index_add_(0, side, posterior.point.double())
            for each in side.tolist():
                counts[each] += 1
        if not all(counts):
            raise UserError(
                f"{counts[1]} sentences are labelled {toward} and {counts[0]} are not: a "
                f"direction needs some of both"
            )
        return (sums[1] / counts[1] - sums[0] / counts[0]).float()

    def edit(self, text: str, direction: Tensor, *, strength: float = 1.0, **options: Any) -> str:
        """The sentence of z + strength * direction, for z the posterior mean of `text`
        and a direction (Z,)."""
        return self.decode(self.encode([text]).point + strength * direction, **options)[0]

    def _need_continuous(self, what: str) -> None:
        if not self.model.family.continuous:
            raise UserError(
                f"{what} needs a continuous latent, and this model's is {self.model.config.family}"
            )

    # Batches

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """(ids, whether they were truncated) of each text, as in training."""
        return token_ids(texts, self.tokenizer, self.max_tokens)

    def _meant(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of sentences that someone gave one by one. Raises UserError for one
        that cannot be taken whole."""
        if isinstance(texts, str):
            raise TypeError("give a list of sentences, not one string")
        if not texts:
            raise UserError("no sentences: give at least one")
        for text in texts:
            if not text.strip():
                raise UserError("a sentence is blank: give one with words")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"the sentence {text[:40]!r} is not UTF-8: convert it") from None
        tokenized = self._tokenize([text.strip() for text in texts])
        for text, (ids, truncated) in zip(texts, tokenized, strict=True):
            if len(ids) == 1:
                raise UserError(
                    f"the tokenizer leaves nothing of the sentence {text!r}: give one with words"
                )
            if truncated:
                raise UserError(
                    f"the sentence {text.strip()[:40]!r}... is longer than max_tokens "
                    f"({self.max_tokens}): "
                    "shorten it, or raise --max_tokens"
                )
        return [ids for ids, _ in tokenized]

    def _rows_of_stream(self, texts: Iterable[str]) -> Iterator[tuple[list[Line], list[list[int]]]]:
        """(sentences, their ids), window by window."""

        def skipped() -> None:
            self.counts.blank += 1

        for window in windows(not_blank(texts, skipped), self.batch_size):
            kept, rows = [], []
            for line, (ids, truncated) in zip(
                window, self._tokenize([line.text for line in window]), strict=True
            ):
                if len(ids) == 1:  # the tokenizer leaves nothing but EOS; training skips it too
                    skipped()
                    continue
                kept.append(line)
                rows.append(ids)
                self.counts.truncated += truncated
            if kept:
                self.counts.sentences += len(kept)
                yield kept, rows

    def _by_length(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Indices of rows, a batch at a time, the longest first: little padding, and
        sentences that end together."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _encode(self, rows: list[list[int]]) -> Distribution:
        parameters: list[Tensor] = [torch.empty(0)] * len(rows)
        for part in self._by_length(rows):
            for i, row in zip(
                part, self._encode_batch([rows[i] for i in part]).parameters.cpu(), strict=True
            ):
                parameters[i] = row
        return self.model.family.of(torch.stack(parameters))

    def _reconstruct(self, rows: list[list[int]], options: dict[str, Any]) -> list[str]:
        texts = [""] * len(rows)
        for part in self._by_length(rows):
            point = self._encode_batch([rows[i] for i in part]).point
            for i, text in zip(part, self._decode_batch(point, options), strict=True):
                texts[i] = text
        return texts

    @torch.no_grad()
    def _encode_batch(self, rows: list[list[int]]) -> Distribution:
        ids = pad_sequence(
            [torch.tensor(row) for row in rows],
            batch_first=True,
            padding_value=self.model.config.pad_token_id,
        )
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return self.model.encode(ids.to(self.model.device), mask.to(self.model.device))

    def _decode_batch(self, latent: Tensor, options: dict[str, Any]) -> list[str]:
        try:
            ids = self.model.generate(
                latent=latent.to(self.model.device),
                **{"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options},
            )
        except (ValueError, TypeError) as error:
            if not options:
                raise
            raise refusal(options, error) from error
        assert isinstance(ids, Tensor)
        # Beams pad with EOS: what counts is whether one comes behind the start token.
        self.counts.unfinished += int((ids[:, 1:] != self.tokenizer.eos_token_id).all(1).sum())
        return self.tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _noise(self, seed: int, purpose: int, numbers: Iterable[int]) -> Tensor:
        """Standard normal noise of samples by their numbers, (N, E): each has its own
        stream, whatever the batch."""
        width = self.model.family.noise_width
        rows = [
            generator(seed, purpose, 0, i).standard_normal(width, dtype=np.float32) for i in numbers
        ]
        return torch.from_numpy(np.stack(rows))


def check_seed(seed: int | None) -> int:
    """The seed itself, or a fresh one for None. Raises UserError outside 0 .. 2^53 -
    1."""
    if seed is None:
        return secrets.randbits(32)
    if not 0 <= seed < 2**53:
        raise UserError(f"--seed is {seed}: give a number from 0 to 2^53 - 1")
    return seed


def find_device(name: str | None) -> torch.device:
    """The device of a name; of None the accelerator, or else the CPU. Raises UserError
    for one that is not there."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"--device {name}: {reason}; give cpu, cuda or cuda:N") from error
    return device
