"""How well a prior by flow matching predicts, and what it generates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae.data.noise import FLOW
from dsvae.data.tokenization import TokenizedSplit
from dsvae.inference.passes import Passes, Rows, texts_of
from dsvae.metrics.evaluate import EVALUATION_SEED
from dsvae.metrics.reconstruction import generate
from dsvae.modeling.denoiser import CHOICES, Denoiser, flow_noise_width

QUARTERS = 4
"""Parts of the time from 0 to 1 that have a loss of their own."""


def by_time(errors: Tensor, numbers: Tensor, times: Tensor) -> Tensor:
    """Returns the sums of the errors and of their numbers in each quarter of the time,
    (2, `QUARTERS`), of texts (N,)."""
    quarter = (times * QUARTERS).long().clamp(0, QUARTERS - 1)
    sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=errors.device)
    return sums.index_add_(1, quarter, torch.stack([errors.double(), numbers.double()]))


def flow_losses(sums: Tensor) -> dict[str, float]:
    """Returns `flow_loss`, the mean squared error per number, and that of each quarter of
    the time, from sums (2, `QUARTERS`) of `by_time`. A quarter without a text has none."""
    errors, numbers = sums.tolist()
    losses = {"flow_loss": sum(errors) / sum(numbers)}
    parts = enumerate(zip(errors, numbers, strict=True), start=1)
    return losses | {f"flow_loss_t{i}": error / count for i, (error, count) in parts if count}


def measure(passes: Passes, split: TokenizedSplit, denoiser: Denoiser) -> dict[str, float]:
    """Returns the losses of a denoiser on a split. Collective.

    The noise of a text depends on its content alone, and times are uniform, so that models
    are measured alike.
    """
    width = passes.family.noise_width + passes.family.latent_width + CHOICES

    def noise(rows: Rows) -> Tensor:
        keys = [(0, key) for key in split.content_keys[rows].tolist()]
        return passes.noise(EVALUATION_SEED, FLOW, keys, width)

    return flow_losses(by_time(*passes.flow_errors(split, denoiser, noise)))


def flow_samples(
    passes: Passes,
    split: TokenizedSplit,
    denoiser: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_tokens: int,
) -> list[str]:
    """Generates sentences of the first texts' noise, under their conditions if the model
    reads conditions. Collective."""
    rows = np.arange(min(count, len(split)))
    if not len(rows):
        return []
    keys = [(0, key) for key in split.content_keys[rows].tolist()]
    noise = passes.noise(EVALUATION_SEED, FLOW, keys, flow_noise_width(passes.model.config))
    given = split.select(rows) if passes.model.config.conditional else None
    conditions = split.conditions(rows) if given is not None else None
    latent = passes.draw_latents(denoiser, noise, conditions)
    texts = texts_of(generate(passes, latent, max_tokens, given), tokenizer)
    if conditions is None:
        return texts
    names = texts_of(conditions, tokenizer)
    return [f"{name} -> {text}" for name, text in zip(names, texts, strict=True)]
