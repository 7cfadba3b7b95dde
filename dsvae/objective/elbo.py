"""The loss: negative ELBO with a weighted, thresholded KL.

    loss = (1/N) sum_i rec_i + beta * T((1/N) sum_i kl_i)

over the N sentences of the global batch (all ranks, all micro-batches of an optimizer
step). rec_i is -log p(x_i|z_i) in nats, summed over the tokens of sentence i, EOS
included; kl_i is KL(q(z|x_i) || p(z)) in nats, one number a dimension; T is the
threshold of free bits (Kingma et al. 2016), which acts on the batch mean and sums over
the dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Label of the positions that are no token of the sentence."""

FreeBitsMode = Literal["dimension", "total"]


def reconstruction_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(x|z) of every sentence in nats, (B,) float32: the sum over its tokens,
    padding left out.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` where there is no token.
    """
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return nats.view(labels.shape).sum(1)


def thresholded_kl(mean_kl: Tensor, free_bits: float, mode: FreeBitsMode) -> Tensor:
    """T: the KL of a batch in nats with free bits, a scalar.

    Args:
        mean_kl: (Z,), the batch mean of every dimension's KL.
        free_bits: lambda in nats. `dimension`: sum_d max(lambda, kl_d). `total`:
            max(lambda, sum_d kl_d).
    """
    if mode == "dimension":
        return mean_kl.clamp(min=free_bits).sum()
    return mean_kl.sum().clamp(min=free_bits)


def kl_gates(mean_kl: Tensor, free_bits: float, mode: FreeBitsMode) -> Tensor:
    """dT / d mean_kl: 1 for the dimensions whose KL has a gradient, 0 for those under
    the threshold, (Z,).

    The threshold acts on the mean over the whole global batch, which no rank and no
    micro-batch has alone. With the mean known (it takes one all-reduce), the loss is
    linear in each sentence's KL, so every micro-batch can go backward on its own and
    the sum of the gradients is exact, however the batch is split.
    """
    if mode == "dimension":
        return (mean_kl > free_bits).to(mean_kl.dtype)
    return (mean_kl.sum() > free_bits).to(mean_kl.dtype).expand_as(mean_kl)


def loss_share(
    rec: Tensor, kl: Tensor, weight: Tensor, beta: float, gates: Tensor, sentences: int
) -> Tensor:
    """What a micro-batch adds to the loss, as a scalar to go backward from; the shares
    of a global batch sum to it.

    Args:
        rec: (B,) nats. kl: (B, Z) nats.
        weight: (B,), 1 for a sentence, 0 for a filler that only keeps the ranks in
            step.
        gates: (Z,) from `kl_gates`.
        sentences: N, the sentences of the global batch.

    (Constant terms of the threshold are left out: they have no gradient.)
    """
    per_sentence = rec if beta == 0 else rec + beta * (kl * gates).sum(-1)
    return torch.dot(weight, per_sentence) / sentences
