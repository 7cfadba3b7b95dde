"""Passes of a model over texts, in batches of similar length.

Under several ranks every method is collective: the ranks share the batches, each has
equally many (at ZeRO 3 every pass gathers the weights from all of them), and each gets
every result. The ranks and the batches change no result but by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from dsvae.console import progress
from dsvae.data.batches import (
    MicroBatch,
    Texts,
    collate_split,
    evaluation_batches,
    padded,
    row_lengths,
)
from dsvae.data.noise import normal
from dsvae.inference.kept import Kept
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.denoiser import Denoiser, FlowDraws, draw_latents
from dsvae.modeling.families import Distribution, Family
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World

Rows = NDArray[np.int64]
"""(B,), the places of texts or latents among N."""
Batch = tuple[Rows, NDArray[np.float32]]
"""The rows of a batch, and their weights (B,): 0 for a filler."""


@dataclass(frozen=True)
class Encoded:
    """What the encoder's heads make of N texts, in their order, on CPU."""

    posterior: Distribution
    """q(z|x) of each text."""
    prior: Distribution
    """p(z|c) of each text, or p(z) in one row."""
    clusters: Tensor | None
    """(N, R), the probabilities of the clusters; None without clusters."""
    class_logits: Tensor | None
    """(N, C); None without a class head."""
    tags: Tensor | None
    """(N, S) int64, the most probable tags if the texts have tags, -100 elsewhere; None
    without a tag head, or if no text has tags."""


class Scored(NamedTuple):
    """What teacher forcing makes of N texts under z, in float64 on CPU."""

    log_px_z: Tensor
    """(N,), log p(x|z) in nats."""
    more: Tensor
    """(N, columns), the other numbers that were drawn with z."""
    right: Tensor
    """(N,), how many tokens, EOS included, are the likeliest ones given z and the tokens
    before; (0,) if they are not counted."""


class Passes:
    """A model and how its passes are cut and shared.

    Args:
        world: the ranks. None: this process alone, on the model's device, without
            progress bars.
        token_budget: the limit of padded tokens of a forward pass on one rank; or
        batch_size: texts or latents of a forward pass.
        kept: keeps the results of encoding and decoding, so that an interrupted
            evaluation continues.
    """

    def __init__(
        self,
        model: T5VAE,
        world: World | None = None,
        *,
        token_budget: int = 0,
        batch_size: int = 0,
        kept: Kept | None = None,
    ) -> None:
        self.model, self.family = model, model.family
        self.world = World(0, 0, 1, model.device) if world is None else world
        if batch_size and self.world.size > 1:
            raise ValueError("batches of a number of texts are not shared among ranks")
        self._shows_progress = world is not None and world.is_main
        self._token_budget, self._batch_size, self._kept = token_budget, batch_size, kept

    def noise(
        self, seed: int, purpose: int, keys: Iterable[tuple[int, int]], width: int | None = None
    ) -> Tensor:
        """Draws standard normal noise of N texts, (N, width), each from its own stream.

        Args:
            seed, purpose, keys: as of `dsvae.data.noise.normal`.
            width: of one text. None: what the model's family takes for one z.
        """
        width = self.family.noise_width if width is None else width
        return torch.from_numpy(normal(seed, purpose, keys, width))

    def encode(self, texts: Texts) -> Encoded:
        """Encodes N texts; returns posteriors, priors, and what the other heads say of
        them."""
        config, family = self.model.config, self.family
        learned = config.prior == "learned"
        tagged = bool(config.tags) and texts.tags([]) is not None
        widths = {
            "posterior": family.parameter_width,
            "prior": family.parameter_width if learned else 0,
            "clusters": config.clusters,
            "class_logits": len(config.classes),
            "tags": int(self._lengths(texts).max()) if tagged else 0,
        }
        widths = {name: width for name, width in widths.items() if width}

        def heads(batch: MicroBatch, _: Rows) -> dict[str, Tensor]:
            out = self.model(
                batch.input_ids,
                batch.attention_mask,
                condition_ids=batch.condition_ids,
                condition_mask=batch.condition_mask,
                tag_labels=batch.tag_labels if tagged else None,
                encode_only=True,
            )
            found = {
                name: out[name].parameters if name in ("posterior", "prior") else out[name]
                for name in widths
            }
            if tagged:
                room = widths["tags"] - out.tags.shape[1]
                found["tags"] = F.pad(out.tags, (0, room), value=IGNORE)
            return found

        part = self._over(texts, "encoding", widths, heads)
        nothing = torch.zeros(len(texts), 0)
        return Encoded(
            family.of(part.get("posterior", nothing)),
            family.of(part["prior"]) if learned else family.prior(),
            part.get("clusters"),
            part.get("class_logits"),
            part["tags"].long() if tagged else None,
        )

    def decode(
        self,
        texts: Texts,
        draw: Callable[[Rows], tuple[Tensor, Tensor]],
        name: str,
        columns: int = 0,
        count_right: bool = False,
    ) -> Scored:
        """Computes the likelihood of N texts under z, each decoded with teacher
        forcing.

        Args:
            draw: makes of the places of a batch its z (B, Z), and any other numbers of
                these texts (B, columns), on CPU. A rank calls it for its own texts alone.
            name: what these z are; equal only for the same z of the same texts.
            count_right: count the tokens that are the likeliest ones.
        """

        def nats(batch: MicroBatch, rows: Rows) -> dict[str, Tensor]:
            latent, more = draw(rows)
            out = self.model(
                labels=batch.labels,
                sentence_weights=batch.weight,
                latent=latent.to(self.world.device),
                condition_ids=batch.condition_ids,
                condition_mask=batch.condition_mask,
                count_right=count_right,
            )
            right = out.right[:, None] if count_right else out.nats.new_zeros(len(rows), 0)
            return {"nats": out.nats[:, None], "more": more.to(self.world.device), "right": right}

        widths = {"nats": 1, "more": columns, "right": int(count_right)}
        found = self._over(texts, f"decoding {name}", widths, nats, torch.float64)
        return Scored(-found["nats"][:, 0], found["more"], found["right"].flatten())

    def flow_errors(
        self, texts: Texts, denoiser: Denoiser, noise: Callable[[Rows], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Measures a denoiser on one draw of z of each of N texts.

        Args:
            noise: makes of the places of a batch the noise of z and of `FlowDraws`, (B, E
                + Z + 3), on CPU.

        Returns: (N,) each, float64: the sum of the squared errors, how many numbers these
            are, and the time.
        """
        width = self.family.noise_width

        def errors(batch: MicroBatch, rows: Rows) -> dict[str, Tensor]:
            drawn = noise(rows).to(self.world.device)
            draws = FlowDraws.of(drawn[:, width:])
            out = self.model(
                batch.input_ids,
                batch.attention_mask,
                condition_ids=batch.condition_ids,
                condition_mask=batch.condition_mask,
                class_labels=batch.class_labels,
                noise=drawn[:, :width],
                flow=draws,
                denoiser=denoiser,
            )
            found = {"errors": out.flow_errors, "numbers": out.flow_numbers, "times": draws.times}
            return {name: values[:, None] for name, values in found.items()}

        widths = {"errors": 1, "numbers": 1, "times": 1}
        found = self._over(texts, "measuring the prior", widths, errors, torch.float64)
        errors_, numbers, times = (each[:, 0] for each in found.values())
        return errors_, numbers, times

    def draw_latents(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        conditions: Sequence[Sequence[int] | Rows] | None = None,
        **how: Any,
    ) -> Tensor:
        """Draws z (N, Z), on CPU, from a prior by flow matching.

        Args:
            noise: (N, Z + 1).
            conditions: (C_i,) each, for a conditional model.
            how: steps, solver, guidance and label, as of `modeling.denoiser.draw_latents`.
        """
        with self._evaluating():
            given = self._conditions(conditions)
            if given:
                out = self.model(**given, encode_only=True)
                how |= {"states": out.condition_states, "states_mask": given["condition_mask"]}
            found = draw_latents(denoiser, self.model.config, noise.to(self.world.device), **how)
            return found.cpu()

    def read(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """Reads N texts with a model without a latent.

        Returns: log p(x) in nats, (N,) float64; and the decoder's last state, after all
            tokens but EOS, (N, d) float64.
        """

        def last(batch: MicroBatch, rows: Rows) -> dict[str, Tensor]:
            out = self.model(
                labels=batch.labels,
                sentence_weights=batch.weight,
                latent=torch.zeros(len(rows), 0, device=self.world.device),
                output_hidden_states=True,
            )
            ends = (batch.labels != IGNORE).sum(1) - 1
            states = out.hidden_states[-1]
            each = torch.arange(len(rows), device=states.device)
            return {"nats": out.nats[:, None], "state": states[each, ends]}

        widths = {"nats": 1, "state": self.model.lm_head.weight.shape[1]}
        found = self._over(texts, "reading", widths, last, torch.float64)
        return -found["nats"][:, 0], found["state"]

    def generate(
        self,
        latent: Tensor,
        conditions: Sequence[Sequence[int] | Rows] | None = None,
        lengths: NDArray[np.int32] | None = None,
        **options: Any,
    ) -> list[Rows]:
        """Generates from N latents with `T5VAE.generate`.

        Args:
            latent: (N, Z).
            conditions: (C_i,) each, EOS last, for a conditional model.
            lengths: (N,), the tokens that are expected of each: latents of similar
                length share a batch. None: batches follow the order of the latents.
            options: of `generate`.

        Returns: token ids (T_i,), which end with EOS if it came in time.
        """
        model, world = self.model, self.world
        eos, device = model.config.eos_token_id, world.device
        # At ZeRO 3, a rank that ends a text sooner must continue with empty passes, or
        # the others wait for it forever. `generate` detects this only if transformers
        # itself set up DeepSpeed.
        partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        options["synced_gpus"] = world.size > 1 and partitioned
        if lengths is None:
            lengths = np.ones(len(latent), dtype=np.int32)
        found: dict[int, list[Rows]] = {}
        with self._evaluating():
            for rows, weight in self._progress("generating", self._batches(lengths)):
                given = self._conditions(conditions and [conditions[i] for i in rows])
                decoded = model.generate(latent=latent[rows].to(device), **given, **options)
                world.heartbeat("generation")
                # `num_return_sequences` texts per latent, without the start token
                groups = np.split(decoded[:, 1:].cpu().numpy(), len(rows))
                for row, texts, real in zip(rows.tolist(), groups, weight, strict=True):
                    if real:
                        found[row] = [until(ids, eos) for ids in texts]
        joined = {row: ids for part in world.gather(found) for row, ids in part.items()}
        return [ids for row in range(len(latent)) for ids in joined[row]]

    def prior(self, conditions: Sequence[Sequence[int] | Rows] | None) -> Distribution:
        """Returns p(z) in one row, or the learned p(z|c) of conditions (C_i,), on
        CPU."""
        with self._evaluating():
            return self.model.prior(**self._conditions(conditions)).to("cpu")

    def _conditions(self, rows: Sequence[Sequence[int] | Rows] | None) -> dict[str, Tensor]:
        """Returns what the model takes for the conditions of a batch."""
        if rows is None:
            return {}
        ids, mask = padded(rows, self.model.config.pad_token_id)
        device = self.world.device
        return {"condition_ids": ids.to(device), "condition_mask": mask.to(device)}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Sets how every pass runs: in evaluation mode, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _over(
        self,
        texts: Texts,
        name: str,
        widths: Mapping[str, int],
        compute: Callable[[MicroBatch, Rows], Mapping[str, Tensor]],
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Computes the results of `compute` for every text, by name (N, width) on CPU.

        Args:
            name: of the pass, to find what was kept of it.
            compute: maps a batch of B texts and their places (B,) to results by name,
                (B, width) each. Without a width, it is not called.

        Raises:
            RunStopped: on every rank, if the run was asked to stop; what was done is kept.
        """
        world, kept, total = self.world, self._kept, sum(widths.values())
        # One rank computes each row and the others leave it 0, so the sum is exact.
        result = torch.zeros(len(texts), total, dtype=dtype, device=world.device)
        batches = self._batches(self._lengths(texts)) if total else []
        key, done = "", 0
        if kept is not None:
            key = kept.key(texts, f"{name}, {total} numbers", self._token_budget)
            done = kept.load(key, result)
        with self._evaluating():
            for number, (rows, weight) in enumerate(
                self._progress(name.split()[0], batches[done:]), start=done + 1
            ):
                batch = self._batch(texts, rows, weight)
                found = compute(batch, rows)
                values = torch.cat([found[each].to(dtype) for each in widths], dim=1)
                world.heartbeat("evaluation")
                real = batch.weight.bool()
                result[torch.from_numpy(rows).to(world.device)[real]] = values[real]
                if kept is not None and (stop := kept.stop()):
                    kept.save(key, number, world.sum(result))
                    raise stop
        result = world.sum(result).cpu()
        if kept is not None and done < len(batches):
            kept.save(key, len(batches), result)
        return dict(zip(widths, result.split(list(widths.values()), dim=1), strict=True))

    def _lengths(self, texts: Texts) -> NDArray[np.int32]:
        return row_lengths(texts, self.model.config.posterior_reads)

    def _batches(self, lengths: NDArray[np.int32]) -> list[Batch]:
        """Returns this rank's batches of texts of these lengths, longest first."""
        if not self._batch_size:
            shares = {"rank": self.world.rank, "world_size": self.world.size}
            return list(evaluation_batches(lengths, token_budget=self._token_budget, **shares))
        order = np.argsort(-lengths, kind="stable")
        parts = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
        return [(part, np.ones(len(part), dtype=np.float32)) for part in parts]

    def _batch(self, texts: Texts, rows: Rows, weight: NDArray[np.float32]) -> MicroBatch:
        """Collates the texts of a batch as the model reads them, without noise."""
        return collate_split(
            texts,
            rows,
            pad_id=self.model.config.pad_token_id,
            noise=np.zeros((len(rows), 0), dtype=np.float32),
            weight=weight,
            posterior_reads=self.model.config.posterior_reads,
        ).to(self.world.device)

    def _progress(self, name: str, batches: list[Batch]) -> Iterator[Batch]:
        return iter(
            progress(batches, name=name, unit="batch", delay=10, shown=self._shows_progress)
        )


def by_rows(family: Family, each: Distribution) -> Callable[[Rows], Distribution]:
    """Makes a function that returns the distributions of some rows (B,) of N; a fixed
    prior has one row for all."""
    parameters = each.parameters

    def rows_of(rows: Rows) -> Distribution:
        one = len(parameters) == 1
        return family.of(parameters.expand(len(rows), -1) if one else parameters[rows])

    return rows_of


def until(ids: Rows, eos: int) -> Rows:
    """Cuts ids after the first EOS."""
    ends = np.flatnonzero(ids == eos)
    return ids[: ends[0] + 1] if len(ends) else ids


def texts_of(rows: Sequence[Rows], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Spells token ids, without EOS and padding; an unknown piece stays visible."""
    hidden = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    shown = [row[~np.isin(row, hidden)].tolist() for row in rows]
    # Cleaning up would change the text ("do n't" to "don't"), but not the reference.
    return [
        str(tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for row in shown
    ]
