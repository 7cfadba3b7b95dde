"""Passes of a model over a whole split, shared out over the ranks: every sentence once,
every result on every rank.

The numbers that a sentence draws are keyed by its content, not by its place, so results
depend neither on the batch size, nor on the number of ranks, nor on the order of the
file.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvae.data.batches import collate, evaluation_batches
from dsvae.data.noise import generator
from dsvae.data.tokenization import TokenizedSplit
from dsvae.engine.distributed import World
from dsvae.modeling.posterior import Gaussian
from dsvae.modeling.t5_vae import T5VAE
from dsvae.objective.elbo import reconstruction_nats

EVALUATION_SEED = 0
"""Evaluation draws the same numbers whatever the run's seed: two models are compared on
the same noise."""


def noise_of(
    keys: NDArray[np.uint64], purpose: int, sample: int, dim: int, seed: int = EVALUATION_SEED
) -> Tensor:
    """Standard normal numbers, (N, dim) float32, of sentences by their content keys."""
    if dim == 0:
        return torch.zeros(len(keys), 0)
    rows = [
        generator(seed, purpose, sample, int(key)).standard_normal(dim, dtype=np.float32)
        for key in keys
    ]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def encode(model: T5VAE, split: TokenizedSplit, world: World, token_budget: int) -> Gaussian:
    """q(z|x) of all N sentences, in the split's order, on CPU. Collective."""
    parameters = torch.zeros(len(split), 2 * model.config.latent_dim, device=world.device)
    for indices, weight in evaluation_batches(
        split.lengths, token_budget=token_budget, rank=world.rank, world_size=world.size
    ):
        batch = _batch(model, split, indices, weight).to(world.device)
        out = model(batch.input_ids, batch.attention_mask, encode_only=True)
        world.beat("evaluation")
        real = batch.weight.bool()
        parameters[torch.from_numpy(indices).to(world.device)[real]] = out.posterior_parameters[
            real
        ]
    return Gaussian.from_parameters(world.sum(parameters).cpu())


@torch.no_grad()
def decode(
    model: T5VAE, split: TokenizedSplit, latent: Tensor, world: World, token_budget: int
) -> Tensor:
    """-log p(x|z) in nats of all N sentences under the given z (N, Z), (N,) float32 on
    CPU. Collective."""
    nats = torch.zeros(len(split), device=world.device)
    for indices, weight in evaluation_batches(
        split.lengths, token_budget=token_budget, rank=world.rank, world_size=world.size
    ):
        batch = _batch(model, split, indices, weight).to(world.device)
        out = model(labels=batch.labels, latent=latent[indices].to(world.device))
        world.beat("evaluation")
        real = batch.weight.bool()
        rows = torch.from_numpy(indices).to(world.device)[real]
        nats[rows] = reconstruction_nats(out.logits, batch.labels)[real]
    return world.sum(nats).cpu()


def _batch(
    model: T5VAE, split: TokenizedSplit, indices: NDArray[np.int64], weight: NDArray[np.float32]
):
    no_noise = np.zeros((len(indices), 0), dtype=np.float32)
    return collate(
        split.rows(indices),
        pad_id=model.config.pad_token_id,
        noise=no_noise,
        weight=weight,
        indices=indices,
    )
