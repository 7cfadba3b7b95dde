"""Text samples: sentences with their reconstructions, and sentences from the prior."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dsvae.data.noise import PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.metrics.passes import batch_of, noise_of
from dsvae.metrics.reconstruction import texts
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World


@torch.no_grad()
def samples(
    model: T5VAE,
    split: TokenizedSplit,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    count: int,
    max_tokens: int,
) -> tuple[list[tuple[str, str]], list[str]]:
    """(sentence, reconstruction) of the first `count` sentences, and as many sentences
    with z from the prior. Collective.

    All decoding is greedy, reconstructions from the posterior mean. Every rank decodes
    the same sentences. A language model has no z and so a single greedy sentence: it
    gets that sentence and no pairs. With conditions, each sentence is decoded for its
    own, which stands before those of the prior.
    """
    config = model.config
    count = min(count, len(split))
    if config.injection == "none" and not config.conditional:
        count = min(count, 1)
    if count == 0:
        return [], []
    training = model.training
    model.eval()
    noise = noise_of(split.content_keys[:count], PRIOR, 0, model.family.noise_width)
    points, drawn = [], []
    for i in range(count):  # one by one, so that `count` does not change the rounding
        batch = batch_of(model, split, np.array([i])).to(world.device)
        out = model(
            batch.input_ids,
            batch.attention_mask,
            condition_ids=batch.condition_ids,
            condition_mask=batch.condition_mask,
            encode_only=True,
        )
        posterior, prior = model.distributions(out)
        points.append(posterior.point)
        drawn.append(prior.sample(noise[i : i + 1].to(world.device)))
    latents = [*(points if config.latent_dim else []), *drawn]
    rows = np.resize(np.arange(count), len(latents))
    batch = batch_of(model, split, rows).to(world.device)
    decoded = model.generate(
        latent=torch.cat(latents),
        condition_ids=batch.condition_ids,
        condition_mask=batch.condition_mask,
        max_new_tokens=max_tokens,
        do_sample=False,
        synced_gpus=world.size > 1 and _partitioned(model),
    )
    model.train(training)
    decoded_texts = texts(list(decoded[:, 1:].cpu().numpy()), tokenizer)  # no start token
    from_prior = decoded_texts[len(latents) - count :]
    if conditions := split.conditions(range(count)):
        pairs = zip(texts(conditions, tokenizer), from_prior, strict=True)
        from_prior = [f"{condition} -> {text}" for condition, text in pairs]
    if not config.latent_dim:
        return [], from_prior
    originals = texts(split.rows(range(count)), tokenizer)
    return list(zip(originals, decoded_texts[:count], strict=True)), from_prior


def _partitioned(model: T5VAE) -> bool:
    """Whether the ranks hold a part of each weight (ZeRO 3).

    Every forward pass then gathers the weights from all ranks. A rank that, by its
    rounding, ends a sentence earlier must go on with empty passes, or the others wait for
    it forever. `generate` detects this only if transformers itself set up DeepSpeed.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
