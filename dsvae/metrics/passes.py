"""Passes of a model over a whole split. The ranks share the sentences, and every rank
gets every result.

The random numbers of a sentence are keyed by its content, not by its place. Results
depend neither on the batch size, nor on the number of ranks, nor on the order of the
file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsvae.data.batches import (
    MicroBatch,
    collate_split,
    evaluation_batches,
    row_lengths,
)
from dsvae.data.noise import generator
from dsvae.data.tokenization import TokenizedSplit
from dsvae.metrics.kept import Kept
from dsvae.metrics.progress import progress
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.families import Distribution
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World

EVALUATION_SEED = 0
"""Evaluation does not use the run's seed, so that two models are compared on the same
noise."""


def noise_of(
    keys: NDArray[np.uint64], purpose: int, sample: int, dim: int, seed: int = EVALUATION_SEED
) -> Tensor:
    """Standard normal numbers of N sentences by their content keys, (N, dim) float32."""
    if dim == 0:
        return torch.zeros(len(keys), 0)
    rows = [
        generator(seed, purpose, sample, int(key)).standard_normal(dim, dtype=np.float32)
        for key in keys
    ]
    return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Encoded:
    """What the encoder's heads make of N sentences, in the split's order, on CPU."""

    posterior: Distribution
    """q(z|x) of each sentence."""
    prior: Distribution
    """p(z|c) of each sentence, or p(z) in one row."""
    clusters: Tensor | None
    """(N, R), the probabilities of the clusters; None without clusters."""
    class_logits: Tensor | None
    """(N, C); None without a class head."""
    tags: Tensor | None
    """(N, S) int64, the most probable tags where the split has tags, -100 elsewhere; None
    without a tag head, or if no sentence has tags."""


def encode(
    model: T5VAE, split: TokenizedSplit, world: World, token_budget: int, kept: Kept | None = None
) -> Encoded:
    """One pass of the encoder over N sentences. Collective."""
    config, family = model.config, model.family
    learned = config.prior == "learned"
    tagged = bool(config.tags) and split.tags([]) is not None
    widths = {
        "posterior_parameters": family.parameter_width,
        "prior_parameters": family.parameter_width if learned else 0,
        "clusters": config.clusters,
        "class_logits": len(config.classes),
        "tags": int(row_lengths(split, config.posterior_reads).max()) if tagged else 0,
    }

    def columns(batch: MicroBatch, _: Tensor) -> Tensor:
        out = model(
            batch.input_ids,
            batch.attention_mask,
            condition_ids=batch.condition_ids,
            condition_mask=batch.condition_mask,
            tag_labels=batch.tag_labels if tagged else None,
            encode_only=True,
        )
        parts = [out[name].float() for name, width in widths.items() if width and name != "tags"]
        if tagged:
            room = widths["tags"] - out.tags.shape[1]
            parts.append(F.pad(out.tags, (0, room), value=IGNORE).float())
        return (
            torch.cat(parts, dim=1)
            if parts
            else torch.zeros(len(batch.weight), 0, device=world.device)
        )

    result = _over(model, split, world, token_budget, kept, columns, (sum(widths.values()),))
    part = dict(zip(widths, result.split(list(widths.values()), dim=1), strict=True))
    return Encoded(
        family.of(part["posterior_parameters"]),
        family.of(part["prior_parameters"]) if learned else family.prior(),
        part["clusters"] if widths["clusters"] else None,
        part["class_logits"] if widths["class_logits"] else None,
        part["tags"].long() if tagged else None,
    )


def decode(
    model: T5VAE,
    split: TokenizedSplit,
    latent: Tensor,
    world: World,
    token_budget: int,
    kept: Kept | None = None,
) -> Tensor:
    """-log p(x|z) in nats of all N sentences under the given z (N, Z), (N,) float32 on
    CPU. Collective."""

    def nats(batch: MicroBatch, rows: Tensor) -> Tensor:
        out = model(
            labels=batch.labels,
            sentence_weights=batch.weight,
            latent=latent[rows].to(world.device),
            condition_ids=batch.condition_ids,
            condition_mask=batch.condition_mask,
        )
        return out.nats

    return _over(model, split, world, token_budget, kept, nats, (), latent)


@torch.no_grad()
def _over(
    model: T5VAE,
    split: TokenizedSplit,
    world: World,
    token_budget: int,
    kept: Kept | None,
    compute: Callable[[MicroBatch, Tensor], Tensor],
    size: tuple[int, ...],
    latent: Tensor | None = None,
) -> Tensor:
    """The results of `compute` for every sentence, (N, *size), on CPU.

    Args:
        kept: receives the result of the pass, or of the part that is done when the run
            is asked to stop.
        compute: maps a batch of B sentences and their indices in the split (B,) to
            results (B, *size).
        latent: what the pass decodes, if anything.

    Raises:
        RunStopped: on every rank, if the run was asked to stop; what was done is kept.
    """
    # One rank computes each row and the others leave it 0, so the sum is exact.
    result = torch.zeros(len(split), *size, device=world.device)
    batches = list(
        evaluation_batches(
            row_lengths(split, model.config.posterior_reads),
            token_budget=token_budget,
            rank=world.rank,
            world_size=world.size,
        )
    )
    key, done = "", 0
    if kept is not None:
        key = kept.key(split, latent, token_budget)
        done = kept.load(key, result)
    name = "encoding" if latent is None else "decoding"
    for number, (indices, weight) in enumerate(
        progress(batches[done:], world, name), start=done + 1
    ):
        batch = batch_of(model, split, indices, weight).to(world.device)
        rows, real = torch.from_numpy(indices), batch.weight.bool()
        values = compute(batch, rows)
        world.heartbeat("evaluation")
        result[rows.to(world.device)[real]] = values[real]
        if kept is not None and (stop := kept.stop()):
            kept.save(key, number, world.sum(result))
            raise stop
    result = world.sum(result).cpu()
    if kept is not None and done < len(batches):
        kept.save(key, len(batches), result)
    return result


def batch_of(
    model: T5VAE,
    split: TokenizedSplit,
    indices: NDArray[np.int64],
    weight: NDArray[np.float32] | None = None,
) -> MicroBatch:
    """The sentences `indices` (B,) of a split as the model reads them, without noise.

    Args:
        weight: (B,), 0 for a filler. None: there is none.
    """
    return collate_split(
        split,
        indices,
        pad_id=model.config.pad_token_id,
        noise=np.zeros((len(indices), 0), dtype=np.float32),
        weight=np.ones(len(indices), dtype=np.float32) if weight is None else weight,
        posterior_reads=model.config.posterior_reads,
    )
