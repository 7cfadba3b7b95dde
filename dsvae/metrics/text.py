"""Text samples: sentences beside their reconstructions, and sentences from the
prior."""

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
    """(sentence, reconstruction) of the first `count` sentences, decoded greedily from
    the posterior mean, and as many greedy sentences of z drawn from the prior. Every
    rank decodes the same sentences. Collective.

    A language model has no z to tell its sentences apart: no pairs, and the one
    sentence that it decodes greedily.
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
    found = texts(list(decoded[:, 1:].cpu().numpy()), tokenizer)  # the start token first
    return list(zip(originals, found[: len(means)], strict=True)), found[len(means) :]


def _partitioned(model: T5VAE) -> bool:
    """Whether the ranks hold a part of each weight (ZeRO 3).

    Every forward pass then gathers the weights from all ranks. A rank whose rounding
    ends a sentence sooner must go on with empty passes, or the others wait for it
    forever. `generate` detects this only where transformers itself set up DeepSpeed.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
