"""The loss: reconstruction, and a penalty on the batch means of latent statistics.

    loss = (1/N) sum_i w_i rec_i + T(m),    m = (1/N) sum_i s_i

over the N sentences of the global batch (all ranks, all micro-batches of an optimizer
step). rec_i is -log p(x_i|z_i) in nats, summed over the tokens of sentence i, EOS
included. w_i is 1, or 1 / its tokens (`reconstruction_weights`). s_i are statistics of
sentence i, numbers by name (`Statistics`), of which `kl` is the KL of each unit in
nats. T, the penalty, may be any differentiable function of their means. Here it is beta
times the KL with free bits (Kingma et al. 2016), total correlation, and how decided and
how even the clusters of a cluster head are. If the KL has no weight, a learned prior
has a term of its own.

The gradient is exact however the batch is split, because

    d loss = (1/N) sum_i [w_i d rec_i + <t, d s_i>],    t = dT/dm at m.

Once m is known (one all-reduce), t is constant, and each micro-batch can go backward
separately. If T is linear, t does not depend on m, and nothing is reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dsvae.config import FreeBitsMode
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.families import Distribution
from dsvae.modeling.t5_vae import T5VAEOutput

Statistics = dict[str, Tensor]
"""Numbers by name: (B, n) of each sentence, or (n,), their means over a batch."""


def pack(statistics: Statistics) -> Tensor:
    """Returns all numbers side by side, (B, S) or (S,), for one product or
    all-reduce."""
    return torch.cat(list(statistics.values()), dim=-1)


def unpack(packed: Tensor, like: Statistics) -> Statistics:
    """Returns packed numbers by the names and widths of `like`."""
    widths = [each.shape[-1] for each in like.values()]
    return dict(zip(like, packed.split(widths, dim=-1), strict=True))


def reconstruction_weights(weight: Tensor, labels: Tensor, length_weighted: bool) -> Tensor:
    """Returns the weight w_i of each sentence's reconstruction in the loss, (B,).

    Args:
        weight: (B,), 1 for a sentence, 0 for a filler.
        labels: (B, T), `IGNORE` where there is no token.
        length_weighted: divide by the predicted tokens of the sentence, EOS included,
            as in the published command of Optimus (Li et al. 2020).
    """
    return weight / (labels != IGNORE).sum(1) if length_weighted else weight


@dataclass(frozen=True)
class Penalty:
    """T, the part of the loss that depends on the means of the batch.

    Args:
        beta: weight of the KL.
        free_bits: lambda, the KL threshold in nats. 0: no threshold.
        mode: what the threshold applies to. `dimension`: sum_u max(lambda, mean_i
            kl_iu). `total`: max(lambda, sum_u mean_i kl_iu). `sentence`: mean_i sum_u
            max(lambda, kl_iu), as in Optimus (Li et al. 2020) and in the code of Park &
            Lee 2021.
        total_correlation: weight of the pairwise total correlation of the categories,
            the sum over pairs of variables of their mutual information under the mean
            of q(z|x) (beta-TCVAE, Chen et al. 2018). For two variables it is the total
            correlation itself. Only discrete families have one.
        prior_alone: add KL(sg(q) || p), the KL to a learned prior with the posterior
            held constant, for steps with beta 0. With `detach_prior` of
            `T5VAE.forward`, its gradient trains the prior's head and nothing else. So a
            later KL starts from a prior that fits. (The norm by which gradients are
            clipped includes it.)
        skewness: weight of mean_i H(r_i) in nats, r_i the probabilities of the clusters
            of sentence i: it makes the cluster of each sentence certain.
        dispersion: weight of sum_k m_k ln m_k in nats, m = mean_i r_i: it makes
            the clusters equally common; it is then -ln R. (Both are after Simon et al. 2019.)
        class_weight, tag_weight: weights of -log p of the labels and of the tags, of
            the sentences that have them. The sum is divided by the number of all
            sentences.
    """

    beta: float = 0.0
    free_bits: float = 0.0
    mode: FreeBitsMode = "dimension"
    total_correlation: float = 0.0
    prior_alone: bool = False
    skewness: float = 0.0
    dispersion: float = 0.0
    class_weight: float = 0.0
    tag_weight: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it adds anything to the loss."""
        weights = (
            self.beta,
            self.total_correlation,
            self.skewness,
            self.dispersion,
            self.class_weight,
            self.tag_weight,
        )
        return self.prior_alone or any(weight != 0 for weight in weights)

    @property
    def linear(self) -> bool:
        """Whether the slopes are the same for every mean."""
        thresholded = self.beta != 0 and self.free_bits != 0 and self.mode != "sentence"
        return not thresholded and self.total_correlation == 0 and self.dispersion == 0

    def statistics(self, out: T5VAEOutput) -> Statistics:
        """Returns s of each sentence of a forward pass, (B, n) by name: `kl`, in nats
        of each unit, and what else the penalty reads.

        Raises:
            ValueError: the model has no clusters, classes or tags to penalize.
        """
        posterior = cast(Distribution, out.posterior)
        kl = posterior.kl(cast(Distribution, out.prior))
        found = {"kl": kl}
        if self.mode == "sentence":
            found["above"] = kl.clamp(min=self.free_bits).sum(-1, keepdim=True)
        if self.prior_alone:
            of_prior = posterior.detach().kl(cast(Distribution, out.prior))
            found["prior"] = of_prior.sum(-1, keepdim=True)
        if self.skewness:
            found["entropy"] = -negative_entropy(_part(out, "clusters"))[:, None]
        if self.dispersion:
            found["clusters"] = _part(out, "clusters")
        if self.class_weight:
            found["class_nats"] = _part(out, "class_nats")[:, None]
        if self.tag_weight:
            found["tag_nats"] = _part(out, "tag_nats")[:, None]
        if self.total_correlation:
            if (probabilities := posterior.probabilities) is None:
                raise ValueError("total correlation needs a family of categories")
            pairs = products_of_pairs(probabilities)
            found |= {"categories": probabilities.flatten(1), "pairs": pairs.flatten(1)}
        return found

    def __call__(self, mean: Statistics) -> Tensor:
        """Returns T in nats, a scalar, for the means of the statistics."""
        if self.mode == "sentence":
            penalized = mean["above"].sum()
        elif self.mode == "total":
            penalized = mean["kl"].sum().clamp(min=self.free_bits)
        else:
            penalized = mean["kl"].clamp(min=self.free_bits).sum()
        penalty = self.beta * penalized
        if self.prior_alone:
            penalty = penalty + mean["prior"].sum()
        if self.skewness:
            penalty = penalty + self.skewness * mean["entropy"].sum()
        if self.dispersion:
            penalty = penalty + self.dispersion * negative_entropy(mean["clusters"])
        if self.class_weight:
            penalty = penalty + self.class_weight * mean["class_nats"].sum()
        if self.tag_weight:
            penalty = penalty + self.tag_weight * mean["tag_nats"].sum()
        if self.total_correlation:
            alone = mean["categories"].view(len(mean["kl"]), -1)
            joint = mean["pairs"].view(-1, alone.shape[1], alone.shape[1])
            penalty = penalty + self.total_correlation * information_of_pairs(alone, joint)
        return penalty

    def slopes(self, mean: Statistics) -> Statistics:
        """Returns t = dT/dm at the means of the statistics, (n,) by name."""
        with torch.enable_grad():
            point = {name: each.detach().requires_grad_() for name, each in mean.items()}
            slopes = torch.autograd.grad(self(point), list(point.values()), materialize_grads=True)
        return dict(zip(point, slopes, strict=True))


def _part(out: T5VAEOutput, name: str) -> Tensor:
    if (part := getattr(out, name)) is None:
        raise ValueError(f"the penalty needs {name}, which the model lacks")
    return part


def negative_entropy(probabilities: Tensor) -> Tensor:
    """Returns sum_k p_k ln p_k over the last dimension, in nats. Its gradient is finite
    at 0 too."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return (probabilities * probabilities.clamp(min=tiny).log()).sum(-1)


def _pairs(variables: int, device: torch.device) -> Tensor:
    """Returns the two variables of each pair, (2, pairs). They are made on the device:
    indices on the host would be copied there at every use."""
    return torch.triu_indices(variables, variables, offset=1, device=device)


def products_of_pairs(probabilities: Tensor) -> Tensor:
    """Returns q(z_d = j|x) q(z_e = k|x) for each pair of variables d < e,
    (B, pairs, K, K).

    Args:
        probabilities: (B, D, K), q(z_d = k|x).
    """
    variables = probabilities.shape[1]
    first, second = _pairs(variables, probabilities.device)
    return probabilities[:, first, :, None] * probabilities[:, second, None, :]


def information_of_pairs(alone: Tensor, joint: Tensor) -> Tensor:
    """Returns the sum of the mutual information of all pairs of variables in nats, a
    scalar.

    Args:
        alone: (D, K), the batch mean of the probabilities.
        joint: (pairs, K, K), that of `products_of_pairs`.
    """
    first, second = _pairs(len(alone), alone.device)
    independent = alone[first, :, None] * alone[second, None, :]
    tiny = torch.finfo(alone.dtype).tiny
    return (joint * (joint.clamp(min=tiny).log() - independent.clamp(min=tiny).log())).sum()


def loss_share(
    rec: Tensor,
    statistics: Statistics,
    weight: Tensor,
    slopes: Statistics | None,
    sentences: int,
) -> Tensor:
    """Returns the share of a micro-batch in the loss, a scalar to go backward from.

    The gradients of all shares of a global batch sum to the gradient of the loss.
    Constant terms of the penalty have no gradient and are left out.

    Args:
        rec: the sum of w_i rec_i over the sentences, `weighted_nats` of `T5VAEOutput`.
        statistics: of each sentence, (B, n) by name, from `Penalty.statistics`.
        weight: (B,), 1 for a sentence, 0 for a filler that only keeps the ranks in
            step.
        slopes: from `Penalty.slopes`; None if nothing is penalized.
        sentences: N, the sentences of the global batch.
    """
    if slopes is not None:
        rec = rec + torch.dot(weight, (pack(statistics) * pack(slopes)).sum(-1))
    return rec / sentences
