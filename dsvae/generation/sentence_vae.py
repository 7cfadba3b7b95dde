"""A T5VAE with its tokenizer: from strings to latents, and from latents to strings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae import pretrained
from dsvae.config import convert
from dsvae.data.batches import row_lengths
from dsvae.data.noise import FLOW, LATENT, ORDER, PRIOR, generator
from dsvae.data.readers import labelled
from dsvae.data.records import Record
from dsvae.errors import UserError, first_line
from dsvae.generation import geometry
from dsvae.generation.flow_prior import FlowPrior
from dsvae.generation.inputs import Counts, InputReader, Inputs, repeated
from dsvae.generation.options import PathKind, Scale, SolverKind, SourceKind, refusal
from dsvae.generation.reading import Line, windows
from dsvae.inference.passes import Encoded, Passes
from dsvae.modeling.denoiser import flow_noise_width
from dsvae.modeling.densities import Density
from dsvae.modeling.families import Distribution, masked, present
from dsvae.modeling.settings import Seed
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.device import local_device, prepare

Prior = Density | FlowPrior
"""What z is drawn from in place of the model's own p(z)."""

MAX_NEW_TOKENS = 128
"""Longest generated sentence in tokens, EOS included, unless the option
`max_new_tokens` is given."""


class SentenceVAE:
    """Encodes and decodes sentences, in batches of similar length. Results are in the
    order of the input.

    In a list of sentences, a blank one, or one longer than `max_tokens`, is a UserError.
    Streams (the methods that end in `_stream`) take sentences as they stand in files:
    blank ones are skipped and long ones truncated, and `counts` says how many. A stream
    holds one window of sentences in memory.

    A conditional model needs the condition of every sentence: in `conditions`, one per
    sentence, or in the records of a stream. No other model takes one.

    `options` are those of transformers' `generate`. Without any, decoding is greedy.
    Sampled tokens come from torch's global generator (`torch.manual_seed`), as in
    transformers.

    Args:
        model: on the device on which it is to run. It is put into evaluation mode. A
            conditional model without a latent can only sample.
        tokenizer: the one that the model was trained with.
        batch_size: sentences at a time. It changes the speed, and which random numbers
            a sampled token gets.
        max_tokens: longest sentence to encode, and longest condition, EOS included. T5
            itself has no limit; memory grows with the square of the length.

    Raises:
        UserError: a model without a latent and a condition, or a batch_size or max_tokens
            that is too small.
    """

    def __init__(
        self,
        model: T5VAE,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 128,
        max_tokens: int = 512,
    ) -> None:
        if not model.config.has_latent and not model.config.conditional:
            raise UserError(
                f"{model.name_or_path or 'the model'} is a language model without a latent "
                f"(injection none): give one with a latent; only dsvae evaluate works without one"
            )
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1")
        self.inputs = InputReader(model, tokenizer, max_tokens)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str,
        *,
        device: str | None = None,
        precision: pretrained.Precision = "fp32",
        **settings: Any,
    ) -> SentenceVAE:
        """Loads the model and the tokenizer of a directory (`model/` in the output of a
        run) or a hub id.

        Args:
            device: by its name in torch. None: the accelerator, if there is one.
            precision: fp32, tf32 or bf16, as of `dsvae.pretrained.load`.
            settings: `batch_size` and `max_tokens`.

        Raises:
            UserError: there is no such device or model, the device lacks the precision,
                weights or tokenizer are missing, or the model is not a T5VAE with a
                latent or a condition.
        """
        where = find_device(device)
        model, tokenizer = pretrained.load(model_dir, where, precision)
        return cls(model, tokenizer, **settings)

    @property
    def latent_dim(self) -> int:
        """Z, how many numbers z has."""
        return self.model.family.latent_width

    @property
    def counts(self) -> Counts:
        """What was skipped and cut so far."""
        return self.inputs.counts

    # Encoding and decoding

    def encode(self, texts: Sequence[str], conditions: Sequence[str] | None = None) -> Distribution:
        """Encodes N sentences: q(z|x), or q(z|x,c), on CPU, float32. The Gaussian has
        mean and logvar, (N, Z) each. Of K vectors per text, `vectors` is the point by
        vectors, (N, K, d), `valid` says which there are, (N, K), and `tensors()` has the
        parameters in these shapes."""
        return self.encode_inputs(self.inputs.sentences(texts, conditions)).posterior

    def encode_inputs(self, inputs: Inputs) -> Encoded:
        """Encodes sentences that are tokenized, for all heads of the encoder."""
        self._need_latent()
        return self.passes.encode(inputs)

    def decode(
        self,
        latent: Tensor,
        conditions: Sequence[str] | None = None,
        *,
        valid: Tensor | None = None,
        **options: Any,
    ) -> list[str]:
        """Decodes one sentence for each z of (N, Z), or of K vectors (N, K, d).

        Args:
            valid: (N, K), which vectors there are. None: those that are not 0.
        """
        vectors = self.model.config.latent_vectors
        if latent.ndim == 3 and latent.shape[1] == vectors:
            latent = latent.flatten(1)
        if valid is not None:
            if valid.shape != (len(latent), vectors):
                raise ValueError(f"valid is {tuple(valid.shape)}, not (N, {vectors})")
            latent = masked(latent, valid)
        if latent.ndim != 2 or latent.shape[1] != self.latent_dim:
            raise ValueError(f"the latent is {tuple(latent.shape)}, not (N, {self.latent_dim})")
        return self._decode(latent, self.inputs.conditions(conditions, len(latent)), options)

    def reconstruct(
        self, texts: Sequence[str], conditions: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """Decodes the posterior means of sentences."""
        return self._reconstruct(self.inputs.sentences(texts, conditions), options)

    def encode_stream(
        self, texts: Iterable[str | Record]
    ) -> Iterator[tuple[list[Line], Distribution]]:
        """Yields (sentences, their posteriors on CPU), window by window."""
        return ((lines, posterior) for lines, posterior, _ in self.latents_stream(texts))

    def latents_stream(
        self, texts: Iterable[str | Record]
    ) -> Iterator[tuple[list[Line], Distribution, Distribution | None]]:
        """Yields (sentences, their posteriors, their priors) window by window, on CPU.
        The priors p(z|c) are None unless they are learned."""
        learned = self.model.config.prior == "learned"
        for lines, inputs in self.inputs.stream(texts, self.batch_size):
            found = self.encode_inputs(inputs)
            yield lines, found.posterior, found.prior if learned else None

    def reconstruct_stream(
        self, texts: Iterable[str | Record], **options: Any
    ) -> Iterator[tuple[Line, str]]:
        """Yields (sentence, reconstruction), one by one."""
        for lines, inputs in self.inputs.stream(texts, self.batch_size):
            yield from zip(lines, self._reconstruct(inputs, options), strict=True)

    def prior(self, condition: str | None = None) -> Distribution:
        """Returns p(z), or the learned p(z|c) of a condition, one row on CPU."""
        read = self.inputs.conditions(None if condition is None else [condition], 1)
        return self.passes.prior(read)

    # Samples

    def sample(
        self,
        count: int,
        *,
        condition: str | None = None,
        texts: Sequence[str] | None = None,
        conditions: Sequence[str] | None = None,
        prior: Prior | None = None,
        source: SourceKind | None = None,
        steps: int | None = None,
        solver: SolverKind | None = None,
        guidance: float | None = None,
        label: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Generates `count` sentences of random z, from the prior or from the aggregate
        posterior of `texts`.

        Args:
            condition: of all sentences from the prior.
            prior: in place of the model's own, such as `fitted_prior.load_prior` gives.
            source: flow draws z from the prior that the phase `prior` has trained. None:
                as the other arguments say.
            steps, solver, guidance, label: for source flow, as of `FlowPrior`.
            texts: z comes from q(z|x) of one of these, drawn uniformly with replacement.
                This is the aggregate posterior (1/N) sum_i q(z|x_i) (Makhzani et al.
                2016): where the decoder was trained, which may differ from the prior.
            conditions: of `texts`; a z is decoded with the condition of its sentence.
            seed: of z. The same seed gives the same z for any batch size and any greater
                `count`. None: it comes from torch's global generator.
        """
        if count < 1:
            raise UserError(f"the number of samples is {count}: give at least 1")
        seed = int(torch.randint(2**53, ())) if seed is None else convert(seed, Seed, "seed")
        for name, given in (("aggregate", texts), ("fitted", prior)):
            if source == name and given is None:
                raise UserError(f"source {name} needs {'prior' if name == 'fitted' else 'texts'}")
        flow = FlowPrior.of(source or "", steps, solver, guidance, label)
        if flow is not None and (texts is not None or prior is not None):
            raise UserError("source flow draws z from the model's own flow: leave texts and prior")
        prior = flow or prior
        if texts is None:
            if conditions is not None:
                raise UserError("conditions are those of texts: give condition, or texts, too")
            return list(
                self.prior_stream(count, seed=seed, condition=condition, prior=prior, **options)
            )
        if condition is not None:
            raise UserError("condition is for samples from the prior: give conditions for texts")
        if prior is not None:
            raise UserError("z comes from texts or from a prior: give one of them")
        self._need_latent()
        self.inputs.sentences(texts, conditions)
        drawn = generator(seed, ORDER, 0, 0).integers(len(texts), size=count).tolist()
        lines = (
            Line(i + 1, texts[i], None if conditions is None else conditions[i]) for i in drawn
        )
        return [text for _, text in self.posterior_stream(lines, seed=seed, **options)]

    def prior_stream(
        self,
        count: int,
        *,
        seed: int,
        condition: str | None = None,
        prior: Prior | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yields sentences of `count` z from the prior, the model's own or another
        one."""
        read = self.inputs.conditions(None if condition is None else [condition], 1)
        pairs = ((i, None if read is None else read[0]) for i in range(count))
        return self._draw(pairs, seed, prior, options)

    def conditional_stream(
        self,
        conditions: Iterable[str],
        count: int,
        *,
        seed: int,
        prior: Prior | None = None,
        **options: Any,
    ) -> Iterator[tuple[Line, str]]:
        """Yields (condition, sentence of one z from its prior): `count` for each
        condition of a stream.

        Sample i has the same noise under every condition, whatever the other conditions
        are.
        """
        self.inputs.check(conditions=True)
        for lines, read in self.inputs.condition_stream(conditions, self.batch_size):
            pairs = ((i, each) for each in read for i in range(count))
            repeated = (line for line in lines for _ in range(count))
            yield from zip(repeated, self._draw(pairs, seed, prior, options), strict=True)

    def posterior_stream(
        self, lines: Iterable[Line], *, seed: int, **options: Any
    ) -> Iterator[tuple[Line, str]]:
        """Yields (sentence, generated sentence of one z from its posterior)."""
        done = 0
        for window in windows(lines, self.batch_size):
            inputs = self.inputs.of_lines(window)
            keys = ((0, done + i) for i in range(len(window)))
            noise = self.passes.noise(seed, LATENT, keys)
            latent = self.encode_inputs(inputs).posterior.sample(noise)
            done += len(window)
            texts = self._decode(latent, inputs.condition_ids, options)
            yield from zip(window, texts, strict=True)

    def _draw(
        self,
        pairs: Iterable[tuple[int, list[int] | None]],
        seed: int,
        prior: Prior | None,
        options: dict[str, Any],
    ) -> Iterator[str]:
        """Generates sentences of z from the prior, one for each pair of the number of
        its noise and the ids of its condition.

        Raises:
            UserError: another prior than the model's that has another number of
                dimensions, or that takes the place of a learned one.
        """
        how: dict[str, Any] = {}
        if isinstance(prior, FlowPrior):
            label = prior.label_of(self.model.config)
            how = {**vars(prior), "label": label}
        elif prior is not None:
            self._check_prior(prior)
        pairs = iter(pairs)
        while part := list(islice(pairs, self.batch_size)):
            numbers, conditions = zip(*part, strict=True)
            read = None if conditions[0] is None else list(conditions)
            keys = ((0, number) for number in numbers)
            if isinstance(prior, FlowPrior):
                noise = self.passes.noise(seed, FLOW, keys, flow_noise_width(self.model.config))
                latent = self.passes.draw_latents(self.model.denoiser, noise, read, **how)
            else:
                own = self.passes.prior(read) if prior is None else prior
                width = None if prior is None else prior.noise_width
                latent = own.sample(self.passes.noise(seed, PRIOR, keys, width))
            yield from self._decode(latent, read, options)

    # Paths and directions

    def interpolate(
        self,
        a: str,
        b: str,
        *,
        steps: int = 8,
        path: PathKind = "linear",
        condition: str | None = None,
        **options: Any,
    ) -> list[str]:
        """Generates `steps` sentences from `a` to `b`. The first and the last are their
        reconstructions. A vector that only one of the two has moves from 0, or to it; all
        sentences between them have it.

        Args:
            path: linear or slerp (see `dsvae.generation.geometry`).
            condition: of both, and of all sentences between them.
        """
        self._need_continuous("a path between two sentences")
        if steps < 2:
            raise UserError(f"steps is {steps}: a path needs at least 2, its two ends")
        point = self.encode([a, b], repeated(condition, 2)).point
        latent = geometry.interpolate(point[0], point[1], steps, path)
        return self.decode(latent, repeated(condition, steps), **options)

    def analogy(
        self, a: str, b: str, c: str, *, condition: str | None = None, **options: Any
    ) -> str:
        """Generates the sentence that is to `c` as `b` is to `a`, from z_b - z_a + z_c,
        all four under one condition."""
        self._need_continuous("an analogy")
        point = self.encode([a, b, c], repeated(condition, 3)).point
        return self.decode(geometry.analogy(*point)[None], repeated(condition), **options)[0]

    def traversal(
        self,
        text: str,
        unit: int,
        *,
        vector: int = 0,
        steps: int | None = None,
        width: float | None = None,
        scale: Scale | None = None,
        condition: str | None = None,
    ) -> tuple[list[dict[str, float]], Tensor]:
        """Moves one unit of the latent, from the posterior's point of a sentence.

        Args:
            unit: a dimension, or a categorical variable, which takes all its categories.
            vector: the vector that has it, from 0.
            steps: of a dimension: how many values, at least 2, equally spaced over
                -width .. width; 7 by default.
            width: of a dimension: in standard deviations of `scale`; 3 by default.
            scale: of a dimension. prior (the default): it takes the values that the
                prior has there, whatever the sentence. posterior: it moves about the
                sentence's own value.
            condition: of the sentence, and of the prior if it is learned.

        Returns: of each of the J places `offset` (in standard deviations) and `value`, or
            `category`; and z (J, Z).

        Raises:
            UserError: no such unit, a vector that the text does not have, or settings that
                the latent does not have.
        """
        vectors = self.model.config.latent_vectors
        if not 0 <= vector < vectors:
            raise UserError(f"vector {vector}: the model's latent has vectors 0 to {vectors - 1}")
        self._check_unit(unit, vectors)
        unit += vector * self.model.family.units // vectors
        if not self.model.family.continuous:
            for name, value in (("steps", steps), ("width", width), ("scale", scale)):
                if value is not None:
                    raise UserError(
                        f"{name} is for dimensions: this traversal goes over the categories of a "
                        f"variable, leave it out"
                    )
            point = self.encode([text], repeated(condition)).point
            self._check_vector(point, vector)
            codes = self.model.family.codes(point[0], unit)
            return [{"category": i} for i in range(len(codes))], codes
        steps = 7 if steps is None else steps
        width = 3.0 if width is None else width
        scale = convert("prior" if scale is None else scale, Scale, "scale")
        if steps < 2:
            raise UserError(f"steps is {steps}: a traversal needs at least 2, its two ends")
        if not (math.isfinite(width) and width > 0):
            raise UserError(f"width is {width}: give a positive number of standard deviations")
        offsets = torch.linspace(-width, width, steps)
        posterior = self.encode([text] * steps, repeated(condition, steps))
        latent = posterior.point.clone()
        self._check_vector(latent, vector)
        about = posterior if scale == "posterior" else self.prior(condition)
        latent[:, unit] = about.along(unit, offsets)[0]
        places = zip(offsets.tolist(), latent[:, unit].tolist(), strict=True)
        return [{"offset": offset, "value": value} for offset, value in places], latent

    def traverse(
        self,
        text: str,
        unit: int,
        *,
        vector: int = 0,
        steps: int | None = None,
        width: float | None = None,
        scale: Scale | None = None,
        condition: str | None = None,
        **options: Any,
    ) -> list[str]:
        """Decodes a `traversal`, whose settings it takes."""
        _, latent = self.traversal(
            text, unit, vector=vector, steps=steps, width=width, scale=scale, condition=condition
        )
        return self.decode(latent, repeated(condition, len(latent)), **options)

    def with_categories(self, latent: Tensor, categories: Mapping[int, int]) -> Tensor:
        """Sets some variables of z (1, Z).

        Args:
            categories: variable -> category.

        Raises:
            UserError: the latent has no categories, or not these.
        """
        if self.model.family.continuous:
            raise UserError(
                f"categories cannot be set: this model's latent is {self.model.config.family}; "
                f"edit it toward a label"
            )
        for unit, category in categories.items():
            self._check_unit(unit)
            codes = self.model.family.codes(latent[0], unit)
            if not 0 <= category < len(codes):
                raise UserError(
                    f"category {category} of variable {unit}: the model's variables have "
                    f"categories 0 to {len(codes) - 1}"
                )
            latent = codes[category : category + 1]
        return latent

    def attribute_vector(
        self, texts: Iterable[str | Record], labels: Iterable[str], toward: str
    ) -> Tensor:
        """Computes the mean latent of the sentences labelled `toward` minus that of all
        others, (Z,) float32 (Larsen et al. 2016). The mean of a vector is that of the
        sentences that have it; it is 0 if none of a side has.

        `texts` and `labels` are streams side by side. The label of a blank sentence is
        skipped with it.

        Raises:
            UserError: there are not as many labels as sentences, a sentence has none, or one
                of the two sides is empty.
        """
        self._need_continuous("a direction")
        sums, numbers = torch.zeros(2, 2, self.latent_dim, dtype=torch.float64)
        counts = [0, 0]

        records = (each if isinstance(each, Record) else Record(each) for each in texts)
        every = labelled(records, labels, "texts", "labels")
        for lines, posterior in self.encode_stream(every):
            side = torch.tensor([line.label == toward for line in lines]).long()  # 1: toward
            sums.index_add_(0, side, posterior.point.double())
            numbers.index_add_(0, side, self._has(posterior.point).double())
            for each in side.tolist():
                counts[each] += 1
        if not all(counts):
            raise UserError(
                f"{counts[1]} sentences are labelled {toward} and {counts[0]} are not: a "
                f"direction needs some of both"
            )
        means = sums / numbers.clamp(min=1)
        return (means[1] - means[0]).float()

    def edit(
        self,
        text: str,
        direction: Tensor,
        *,
        strength: float = 1.0,
        condition: str | None = None,
        **options: Any,
    ) -> str:
        """Decodes z + strength * direction (Z,) of the posterior mean z of `text`."""
        point = self.encode([text], repeated(condition)).point
        moved = self.move(point, strength * direction)
        return self.decode(moved, repeated(condition), **options)[0]

    def move(self, latent: Tensor, change: Tensor) -> Tensor:
        """Returns z (N, Z) + change (Z,), in the vectors that each z has."""
        return latent + change * self._has(latent)

    def _has(self, latent: Tensor) -> Tensor:
        """Returns which numbers of z (N, Z) belong to a vector that it has, boolean."""
        vectors = self.model.config.latent_vectors
        if vectors == 1:
            return torch.ones_like(latent, dtype=torch.bool)
        return present(latent, vectors).repeat_interleave(latent.shape[1] // vectors, 1)

    def _check_vector(self, latent: Tensor, vector: int) -> None:
        """Raises UserError unless z (N, Z) of one sentence has a vector."""
        vectors = self.model.config.latent_vectors
        if vectors > 1 and not present(latent, vectors)[0, vector]:
            raise UserError(f"vector {vector}: the sentence is too short to have it")

    def _need_latent(self) -> None:
        if not self.model.config.has_latent:
            raise UserError(
                "the model has no latent (injection none): it can only sample, with a condition"
            )

    def _need_continuous(self, what: str) -> None:
        if not self.model.family.continuous:
            raise UserError(
                f"{what} needs a continuous latent, and this model's is "
                f"{self.model.config.family}: use traverse, or edit with --set"
            )

    def _check_prior(self, prior: Density) -> None:
        if self.model.config.prior == "learned":
            raise UserError("the model's prior p(z|c) is learned: another one knows no condition")
        if prior.latent_width != self.latent_dim:
            raise UserError(
                f"the prior was fitted to a z of {prior.latent_width} numbers, and the model's "
                f"has {self.latent_dim}: repeat dsvae fit_prior"
            )

    def _check_unit(self, unit: int, vectors: int = 1) -> None:
        """Raises UserError unless the latent, or each of its vectors, has a unit."""
        self._need_latent()
        family = self.model.family
        units = family.units // vectors
        if not 0 <= unit < units:
            kind = "dimension" if family.continuous else "variable"
            raise UserError(f"{kind} {unit}: the model's latent has {kind}s 0 to {units - 1}")

    # Passes

    @property
    def passes(self) -> Passes:
        """The passes of the model."""
        return Passes(self.model, batch_size=self.batch_size)

    def _reconstruct(self, inputs: Inputs, options: dict[str, Any]) -> list[str]:
        point = self.encode_inputs(inputs).posterior.point
        return self._decode(point, inputs.condition_ids, options, row_lengths(inputs))

    def _decode(
        self,
        latent: Tensor,
        conditions: list[list[int]] | None,
        options: dict[str, Any],
        lengths: NDArray[np.int32] | None = None,
    ) -> list[str]:
        """Decodes z (N, Z) under the ids of their conditions; `lengths` as of
        `Passes.generate`."""
        longest = max(MAX_NEW_TOKENS, self.model.config.room or 0)
        settings = {"max_new_tokens": longest, "do_sample": False, **options}
        try:
            rows = self.passes.generate(latent, conditions, lengths, **settings)
        except (ValueError, TypeError) as error:
            if not options:
                raise
            raise refusal(options, error) from error
        self.counts.unfinished += sum(row[-1] != self.model.config.eos_token_id for row in rows)
        return self.tokenizer.batch_decode(
            [row.tolist() for row in rows],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )


def find_device(name: str | None) -> torch.device:
    """Finds the device of a name. None: the accelerator, or the CPU if there is none.
    Raises UserError for a device that does not exist or cannot be used."""
    if name is None:
        return local_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"--device {name}: {reason}; give cpu, cuda or cuda:N") from error
    return prepare(device)
