"""Passes of a model over a whole split. The ranks share the sentences, and every rank
gets every result.

The random numbers of a sentence are keyed by its content, not by its place. Results
depend neither on the batch size, nor on the number of ranks, nor on the order of the
file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from dsvae.modeling.families import Distribution
from dsvae.modeling.t5_vae import T5VAE
from dsvae.objective.elbo import reconstruction_nats
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


def encode(
    model: T5VAE, split: TokenizedSplit, world: World, token_budget: int, kept: Kept | None = None
) -> Distribution:
    """q(z|x) of all N sentences, in the split's order, on CPU. Collective."""

    def parameters(batch: MicroBatch, _: Tensor) -> Tensor:
        out = model(batch.input_ids, batch.attention_mask, encode_only=True)
        return cast(Tensor, out.posterior_parameters)

    size = (model.family.parameter_width,)
    return model.family.of(_over(model, split, world, token_budget, kept, parameters, size))


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
        out = model(labels=batch.labels, latent=latent[rows].to(world.device))
        return reconstruction_nats(out.logits, batch.labels)

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
        batch = _batch(model, split, indices, weight).to(world.device)
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


def _batch(
    model: T5VAE, split: TokenizedSplit, indices: NDArray[np.int64], weight: NDArray[np.float32]
) -> MicroBatch:
    no_noise = np.zeros((len(indices), 0), dtype=np.float32)
    return collate_split(
        split,
        indices,
        pad_id=model.config.pad_token_id,
        noise=no_noise,
        weight=weight,
        posterior_reads=model.config.posterior_reads,
    )
