"""Text samples: sentences with their reconstructions, and sentences from the prior."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from dsvae.data.noise import PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.metrics.passes import noise_of
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
    gets that sentence and no pairs.
    """
    count = min(count, len(split))
    latent_dim = model.config.latent_dim
    if latent_dim == 0:
        count = min(count, 1)
    if count == 0:
        return [], []
    training = model.training
    model.eval()
    means = []
    noise = noise_of(split.content_keys[:count], PRIOR, 0, model.family.noise_width)
    prior = model.family.prior().sample(noise)
    for i in range(count if latent_dim else 0):
        ids = torch.from_numpy(split.ids(i))[None].to(world.device)
        means.append(model.family.of(model(ids, encode_only=True).posterior_parameters).point)
    both = torch.cat([*means, prior.to(world.device)])
    decoded = model.generate(
        latent=both,
        max_new_tokens=max_tokens,
        do_sample=False,
        synced_gpus=world.size > 1 and _partitioned(model),
    )
    model.train(training)
    originals = texts(split.rows(range(len(means))), tokenizer)
    decoded_texts = texts(list(decoded[:, 1:].cpu().numpy()), tokenizer)  # no start token
    reconstructions, from_prior = decoded_texts[: len(means)], decoded_texts[len(means) :]
    return list(zip(originals, reconstructions, strict=True)), from_prior


def _partitioned(model: T5VAE) -> bool:
    """Whether the ranks hold a part of each weight (ZeRO 3).

    Every forward pass then gathers the weights from all ranks. A rank that, by its
    rounding, ends a sentence earlier must go on with empty passes, or the others wait for
    it forever. `generate` detects this only if transformers itself set up DeepSpeed.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
