"""The loss: reconstruction, and a penalty on the batch means of latent statistics.

    loss = (1/N) sum_i w_i rec_i + T(m),    m = (1/N) sum_i s_i

over the N sentences of the global batch (all ranks, all micro-batches of an optimizer
step). rec_i is -log p(x_i|z_i) in nats, summed over the tokens of sentence i, EOS
included. w_i is 1, or 1 / its tokens (`reconstruction_weights`). s_i are statistics of
sentence i (S numbers), of which the KL of each unit in nats comes first. T, the penalty,
may be any differentiable function of their means. Here it is beta times the KL with free
bits (Kingma et al. 2016), total correlation, and how decided and how even the clusters of
a cluster head are. Where the KL has no weight, a learned prior has a term of its own.

The gradient is exact however the batch is split, because

    d loss = (1/N) sum_i [w_i d rec_i + <t, d s_i>],    t = dT/dm at m.

Once m is known (one all-reduce of S numbers), t is constant, and each micro-batch can go
backward separately. If T is linear, t does not depend on m, and nothing is reduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsvae.modeling.crf import IGNORE
from dsvae.modeling.families import Distribution

FreeBitsMode = Literal["dimension", "total", "sentence"]


def reconstruction_weights(weight: Tensor, labels: Tensor, length_weighted: bool) -> Tensor:
    """The weight w_i of each sentence's reconstruction in the loss, (B,).

    Args:
        weight: (B,), 1 for a sentence, 0 for a filler.
        labels: (B, T), `IGNORE` where there is no token.
        length_weighted: divide by the predicted tokens of the sentence, EOS included, as
            in the published command of Optimus (Li et al. 2020).
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
            the sum over pairs of variables of their mutual information under the mean of
            q(z|x) (beta-TCVAE, Chen et al. 2018). For two variables it is the total
            correlation itself. Only the categorical family has one.
        prior_alone: add KL(sg(q) || p), the KL to a learned prior with the posterior
            held constant, for steps with beta 0. With `detach_prior` of
            `T5VAE.forward`, its gradient trains the prior's head and nothing else. So a
            later KL starts from a prior that fits. (The norm by which gradients are
            clipped includes it.)
        skewness: weight of mean_i H(r_i) in nats, r_i the probabilities of the clusters
            of sentence i: it wants each sentence decided.
        dispersion: weight of sum_k m_k ln m_k in nats, m = mean_i r_i: it wants all
            clusters used alike, where it is -ln R. (Both are after Simon et al. 2019.)
        cluster_count: R, which `dispersion` needs.
        class_weight, tag_weight: weights of -log p of the labels and of the tags, of the
            sentences that have them. The sum is divided by the number of all sentences.
    """

    beta: float = 0.0
    free_bits: float = 0.0
    mode: FreeBitsMode = "dimension"
    total_correlation: float = 0.0
    prior_alone: bool = False
    skewness: float = 0.0
    dispersion: float = 0.0
    cluster_count: int = 0
    class_weight: float = 0.0
    tag_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.dispersion and not self.cluster_count:
            raise ValueError("dispersion needs the number of clusters")

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

    def statistics(
        self,
        posterior: Distribution,
        prior: Distribution,
        *,
        clusters: Tensor | None = None,
        class_nats: Tensor | None = None,
        tag_nats: Tensor | None = None,
    ) -> Tensor:
        """s of each sentence, (B, S): the KL of each of the U units in nats, then what
        else the penalty needs, in the order of `_widths`.

        Args:
            clusters: (B, R), the probabilities of each sentence's clusters; needed by
                `skewness` and `dispersion`.
            class_nats, tag_nats: (B,), -log p of each sentence's label and tags in nats,
                0 where it has none; needed by `class_weight` and `tag_weight`.
        """
        kl = posterior.kl(prior)
        parts: dict[str, Tensor | None] = {"kl": kl, "class_nats": class_nats, "tag_nats": tag_nats}
        if self.mode == "sentence":
            parts["above"] = kl.clamp(min=self.free_bits).sum(-1)
        if self.prior_alone:
            parts["prior"] = posterior.detach().kl(prior).sum(-1)
        if clusters is not None:
            parts |= {"entropy": -negative_entropy(clusters), "clusters": clusters}
        if self.total_correlation:
            parts["pairs"] = pair_statistics(posterior.tensors()["probabilities"])
        needed = {name: parts.get(name) for name in self._widths(kl.shape[-1])}
        if missing := [name for name, each in needed.items() if each is None]:
            raise ValueError(f"the penalty needs {', '.join(missing)}, which the model lacks")
        columns = [
            each if each.ndim == 2 else each[:, None]
            for each in needed.values()
            if each is not None
        ]
        return torch.cat(columns, dim=-1)

    def __call__(self, mean: Tensor, units: int) -> Tensor:
        """T in nats, a scalar, for the mean statistics (S,) of U units."""
        part = self._split(mean, units)
        if self.mode == "sentence":
            penalized = part["above"].sum()
        elif self.mode == "total":
            penalized = part["kl"].sum().clamp(min=self.free_bits)
        else:
            penalized = part["kl"].clamp(min=self.free_bits).sum()
        penalty = self.beta * penalized
        if self.prior_alone:
            penalty = penalty + part["prior"].sum()
        if self.skewness:
            penalty = penalty + self.skewness * part["entropy"].sum()
        if self.dispersion:
            penalty = penalty + self.dispersion * negative_entropy(part["clusters"])
        if self.class_weight:
            penalty = penalty + self.class_weight * part["class_nats"].sum()
        if self.tag_weight:
            penalty = penalty + self.tag_weight * part["tag_nats"].sum()
        if self.total_correlation:
            total_correlation = pairwise_total_correlation(part["pairs"], units)
            penalty = penalty + self.total_correlation * total_correlation
        return penalty

    def head_losses(self, mean: Tensor, units: int) -> dict[str, float]:
        """`class_nats` and `tag_nats` of the mean statistics (S,), where there are such
        heads: means over all sentences, of which those without labels have 0."""
        part = self._split(mean, units)
        return {name: float(part[name]) for name in ("class_nats", "tag_nats") if name in part}

    def _widths(self, units: int) -> dict[str, int]:
        """How many numbers each part of the statistics has; -1: all that are left."""
        widths = {
            "kl": units,
            "above": int(self.mode == "sentence"),
            "prior": int(self.prior_alone),
            "entropy": int(self.skewness != 0),
            "clusters": self.cluster_count if self.dispersion else 0,
            "class_nats": int(self.class_weight != 0),
            "tag_nats": int(self.tag_weight != 0),
            "pairs": -1 if self.total_correlation else 0,
        }
        return {name: width for name, width in widths.items() if width or name == "kl"}

    def _split(self, mean: Tensor, units: int) -> dict[str, Tensor]:
        widths = self._widths(units)
        sizes = [width for width in widths.values() if width >= 0]
        if len(sizes) < len(widths):
            sizes.append(len(mean) - sum(sizes))
        return dict(zip(widths, mean.split(sizes), strict=True))


def slopes(penalty: Penalty, mean: Tensor, units: int) -> Tensor:
    """dT/dm at the mean statistics m (S,) of U units, (S,)."""
    with torch.enable_grad():
        point = mean.detach().requires_grad_()
        return torch.autograd.grad(penalty(point, units), point)[0]


def negative_entropy(probabilities: Tensor) -> Tensor:
    """sum_k p_k ln p_k over the last dimension, in nats. Its gradient is finite at 0 too."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return (probabilities * probabilities.clamp(min=tiny).log()).sum(-1)


def _pairs(variables: int, device: torch.device) -> Tensor:
    """The two variables of each pair, (2, pairs). They are made on the device: indices on
    the host would be copied there at every use."""
    return torch.triu_indices(variables, variables, offset=1, device=device)


def pair_statistics(probabilities: Tensor) -> Tensor:
    """The statistics of each sentence for the pairwise total correlation.

    Args:
        probabilities: (B, D, K), q(z_d = k|x).

    Returns: (B, D * K + D * (D - 1) / 2 * K^2), the probabilities, then their products
        for each pair of variables.
    """
    variables = probabilities.shape[1]
    first, second = _pairs(variables, probabilities.device)
    products = probabilities[:, first, :, None] * probabilities[:, second, None, :]
    return torch.cat([probabilities.flatten(1), products.flatten(1)], dim=-1)


def pairwise_total_correlation(mean: Tensor, variables: int) -> Tensor:
    """The sum of the mutual information of all pairs of variables in nats, a scalar.

    Args:
        mean: the batch mean of `pair_statistics`, of `variables` D.
    """
    pairs = variables * (variables - 1) // 2
    # `mean` has D K + pairs K^2 numbers, which gives K.
    root = math.isqrt(variables**2 + 4 * pairs * len(mean))
    categories = (root - variables) // (2 * pairs) if pairs else len(mean) // variables
    alone = mean[: variables * categories].view(variables, categories)
    joint = mean[variables * categories :].view(pairs, categories, categories)
    first, second = _pairs(variables, mean.device)
    independent = alone[first, :, None] * alone[second, None, :]
    tiny = torch.finfo(mean.dtype).tiny
    return (joint * (joint.clamp(min=tiny).log() - independent.clamp(min=tiny).log())).sum()


def loss_share(
    rec: Tensor, statistics: Tensor, weight: Tensor, slopes: Tensor | None, sentences: int
) -> Tensor:
    """The share of a micro-batch in the loss, a scalar to go backward from.

    The gradients of all shares of a global batch sum to the gradient of the loss.
    Constant terms of the penalty have no gradient and are left out.

    Args:
        rec: the sum of w_i rec_i over the sentences, `loss` of `T5VAE.forward`.
        statistics: (B, S) from `Penalty.statistics`.
        weight: (B,), 1 for a sentence, 0 for a filler that only keeps the ranks in step.
        slopes: (S,) from `slopes`; None if nothing is penalized.
        sentences: N, the sentences of the global batch.
    """
    if slopes is not None:
        rec = rec + torch.dot(weight, (statistics * slopes).sum(-1))
    return rec / sentences
