"""Latent families: what z is, how it is drawn, and what its KL costs.

A family is a small value made from the configuration. It knows the widths of
everything. A distribution is a batch of parameters of one family: the posterior q(z|x)
of a batch of sentences, or a prior. A prior is a distribution of the same class: the
fixed p(z), with one row for all sentences, or a learned p(z|c), with one row per
sentence. Outside `dsvae.modeling`, only the checks of the configuration ask which family
it is.

All noise is standard normal, and a family transforms it into what it needs. So the
random numbers of a sentence are the same for every family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dsvae.modeling.settings import read_by

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from typing_extensions import Self


ACTIVE = 0.01
"""A unit is active if its `activity` is larger (Burda et al. 2016)."""


class Distribution(ABC):
    """A batch of distributions over z, in float32; a dataclass of tensors (B, ...).

    Widths: U units, Z numbers of z, E noise numbers (see `Family`).
    """

    kl_of_z: ClassVar[bool] = True
    """Whether `kl` is the KL of z alone, so that kl - mi is KL(q(z) || p(z))."""

    @property
    def probabilities(self) -> Tensor | None:
        """(B, U, K), the probability of each of the K values of each unit; None if z is
        continuous."""
        return None

    @property
    def spike(self) -> Tensor | None:
        """(B, U), the probability that a unit is off; None if no unit is ever off."""
        return None

    @property
    @abstractmethod
    def parameters(self) -> Tensor:
        """(B, P), the inverse of `Family.of`."""

    @property
    @abstractmethod
    def point(self) -> Tensor:
        """The z that is decoded if nothing is drawn, (B, Z)."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """Returns z (B, Z), reparametrized, from standard normal `noise` (B, E)."""

    @abstractmethod
    def kl(self, prior: Self) -> Tensor:
        """Returns KL(self || prior) of each unit in nats, (B, U); never negative."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_i|x_i) in nats, (B,), for z (B, Z)."""

    def along(self, unit: int, offsets: Tensor) -> Tensor:
        """Returns the values of one dimension at `offsets` (J,) standard deviations
        from its mean, (B, J). Only continuous families have them."""
        raise TypeError("categories have no standard deviation")

    @abstractmethod
    def pairwise_log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_j|x_i) in nats of each pair, (J, B) float64, for z (J, Z)."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns mean and variance of each number of z, (B, Z) both."""

    @abstractmethod
    def activity(self) -> Tensor:
        """Returns how much each unit varies over the batch, (U,) float64; compare with
        `ACTIVE`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by their names, (B, ...) each, for files."""

    def to(self, device: torch.device | str) -> Self:
        """Copies it to a device."""
        return self.each_tensor(lambda tensor: tensor.to(device))

    def repeat(self, times: int) -> Self:
        """Returns each row so many times, one after the other."""
        return self.each_tensor(lambda tensor: tensor.repeat_interleave(times, 0))

    def detach(self) -> Self:
        """Returns the same without a gradient."""
        return self.each_tensor(lambda tensor: tensor.detach())

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same with each of its tensors (B, ...) changed, as by a choice of
        rows."""
        return type(self)(*(change(tensor) for tensor in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Family(ABC):
    """Makes the distributions of a family, and says how wide they are.

    A dataclass of `units` and of the fields of `LatentConfig` that only this family
    reads.
    """

    units: int
    """U, the number of parts of z whose KL is counted separately."""
    continuous: ClassVar[bool] = True
    """Whether sums and multiples of z are z, so that paths and directions make sense."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The size and the kind of z, for the model card."""

    @property
    def latent_width(self) -> int:
        """Z, how many numbers of z the decoder reads."""
        return self.units

    @property
    @abstractmethod
    def parameter_width(self) -> int:
        """P, how many numbers the posterior's head returns per sentence."""

    @property
    def head_width(self) -> int:
        """How many numbers the posterior's head returns per vector."""
        return self.parameter_width

    @property
    def noise_width(self) -> int:
        """E, how many standard normal numbers one draw takes."""
        return self.latent_width

    def codes(self, z: Tensor, unit: int) -> Tensor:
        """Returns z (Z,) with one unit at each of its K values, (K, Z). Only discrete
        families have them."""
        raise TypeError("a dimension has no list of values")

    @abstractmethod
    def of(self, parameters: Tensor) -> Distribution:
        """Returns the distributions of a head's output (B, P)."""

    def bounded(self, parameters: Tensor) -> Tensor:
        """Returns a head's output (B, P) with its log-variances, which come second,
        bounded smoothly by `LOGVAR_BOUNDS`: they hardly change in the middle.

        For a learned prior: nothing else keeps prior and posterior from becoming
        arbitrarily narrow together, until their KL overflows.
        """
        low, high = LOGVAR_BOUNDS
        mean, logvar, rest = parameters.float().tensor_split([self.units, 2 * self.units], dim=-1)
        logvar = low + torch.nn.functional.softplus(logvar - low)
        logvar = high - torch.nn.functional.softplus(high - logvar)
        return torch.cat([mean, logvar, rest], dim=-1)

    def normalized(self, z: Tensor) -> Tensor:
        """Returns z (B, Z) scaled to the length sqrt(Z), or each of its vectors. 0 stays
        0."""
        return torch.nn.functional.normalize(z, dim=-1) * math.sqrt(self.latent_width)

    @abstractmethod
    def prior(self, device: torch.device | str = "cpu") -> Distribution:
        """Returns the fixed prior, one row that broadcasts against any batch."""


@dataclass(frozen=True)
class Gaussian(Distribution):
    """A batch of diagonal Gaussians N(mean, diag(exp(logvar))), in float32."""

    mean: Tensor
    """(B, Z)"""
    logvar: Tensor
    """(B, Z), natural logarithm of the variance."""

    @property
    def parameters(self) -> Tensor:
        """(B, 2Z): means, then log-variances."""
        return torch.cat([self.mean, self.logvar], dim=-1)

    @property
    def point(self) -> Tensor:
        """The mean, (B, Z)."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Returns z = mean + std * noise (Kingma & Welling 2014), (B, Z)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self, prior: Gaussian) -> Tensor:
        """Returns KL(self || prior) of each dimension in nats, (B, Z), in closed
        form."""
        squared = (self.mean - prior.mean).square() * torch.exp(-prior.logvar)
        ratio = self.logvar - prior.logvar
        # Near the prior, exp(ratio) - 1 would cancel and round the KL to below 0.
        return 0.5 * (squared + torch.expm1(ratio) - ratio)

    def along(self, unit: int, offsets: Tensor) -> Tensor:
        """Returns mean + std * offset, (B, J)."""
        return self.mean[:, unit, None] + torch.exp(0.5 * self.logvar[:, unit, None]) * offsets

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log N(z_i; mean_i, var_i) in nats, (B,), for z (B, Z)."""
        squared = (z - self.mean).square() * torch.exp(-self.logvar)
        return -0.5 * (squared + self.logvar + math.log(2 * math.pi)).sum(-1)

    def pairwise_log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_j|x_i) in nats of every pair, (J, B) float64, for z (J, Z).

        The square is expanded into matrix products, in float64 because its terms
        cancel.
        """
        mean, logvar, z = self.mean.double(), self.logvar.double(), z.double()
        precision = torch.exp(-logvar)  # (B, Z)
        constant = (mean.square() * precision + logvar).sum(-1)  # (B,)
        constant = constant + mean.shape[-1] * math.log(2 * math.pi)
        squared = z.square() @ precision.T - 2 * (z @ (mean * precision).T)  # (J, B)
        return -0.5 * (squared + constant)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.logvar.exp()

    def activity(self) -> Tensor:
        """Returns Var_x[E q(z|x)] of each dimension (sample variance), (Z,) float64. It
        is zero for a single sentence."""
        mean = self.mean.double()
        if len(mean) < 2 or mean.shape[1] == 0:
            return torch.zeros(mean.shape[1], dtype=torch.float64)
        return mean.var(dim=0)

    def tensors(self) -> dict[str, Tensor]:
        """Returns `mean` and `logvar`, (B, Z) each."""
        return {"mean": self.mean, "logvar": self.logvar}


LOGVAR_BOUNDS = (-12.0, 6.0)
"""The log-variances that a model with a learned prior can have."""


@dataclass(frozen=True)
class GaussianFamily(Family):
    """Diagonal Gaussians with the prior N(0, I). Each dimension is a unit."""

    @property
    def description(self) -> str:
        return f"{self.units} dimensions, Gaussian"

    @property
    def parameter_width(self) -> int:
        return 2 * self.units

    def of(self, parameters: Tensor) -> Gaussian:
        return Gaussian(*parameters.float().chunk(2, dim=-1))

    def prior(self, device: torch.device | str = "cpu") -> Gaussian:
        zeros = torch.zeros(1, self.units, device=device)
        return Gaussian(zeros, zeros)


SPIKE = 0.05
"""Standard deviation of the spike of `SpikeSlab` (Prokhorov et al. 2021)."""


@dataclass(frozen=True)
class SpikeSlab(Distribution):
    """A batch of hierarchical spike-and-slab distributions, in float32.

    For each dimension: a weight g ~ Beta(a, b), a selector s ~ Bernoulli(g), and
    z ~ N(0, SPIKE^2) if s = 1 (the spike), or N(mean, exp(logvar)) if s = 0 (the slab).
    This follows Prokhorov et al. 2021, with the selector kept as a latent. The KL of
    (g, s, z) then has a closed form, is never negative, and is an upper bound on
    theirs. G = a/(a+b) is the probability of the spike.
    """

    raw: Tensor
    """(B, 4Z): mean and logvar of the slab, then raw a and raw b. a = 0.5 + softplus(raw
    a), at most 100; b likewise."""

    kl_of_z = False

    @property
    def parameters(self) -> Tensor:
        return self.raw

    @property
    def slab(self) -> Gaussian:
        """N(mean, exp(logvar)) of each dimension."""
        return Gaussian(*self.raw.chunk(4, dim=-1)[:2])

    @property
    def beta(self) -> tuple[Tensor, Tensor]:
        """a and b of the Beta distribution of g, (B, Z) each."""
        a, b = (_beta_parameter(raw) for raw in self.raw.chunk(4, dim=-1)[2:])
        return a, b

    @property
    def spike(self) -> Tensor:
        """G, the probability of the spike, (B, Z)."""
        a, b = self.beta
        return a / (a + b)

    @property
    def point(self) -> Tensor:
        """The slab's mean if the slab is likelier than the spike, otherwise 0,
        (B, Z)."""
        return torch.where(self.spike < 0.5, self.slab.mean, 0.0)

    def sample(self, noise: Tensor) -> Tensor:
        """Returns z (B, Z) from noise (B, 2Z): a number for the selector and one for
        the value.

        The selector is a hard binary concrete variable (Maddison et al. 2017) with a
        straight-through gradient.
        """
        selector, value = noise.to(self.raw).chunk(2, dim=-1)
        a, b = self.beta
        logistic = torch.special.log_ndtr(selector) - torch.special.log_ndtr(-selector)
        soft = torch.sigmoid((a.log() - b.log() + logistic) / SELECTOR_TEMPERATURE)
        spiked = (soft > 0.5).to(soft) + (soft - soft.detach())
        return spiked * SPIKE * value + (1 - spiked) * self.slab.sample(value)

    def kl(self, prior: SpikeSlab) -> Tensor:
        """Returns the KL of the joint latents (g, s, z) of each dimension in nats,
        (B, Z)."""
        slab = (1 - self.spike) * self.slab.kl(prior.slab)
        # In float64, because the terms of the Beta's KL are large near the prior and
        # cancel.
        (a, b), (a0, b0) = ((x.double(), y.double()) for x, y in (self.beta, prior.beta))
        weight = (
            _log_beta(a0, b0)
            - _log_beta(a, b)
            + (a - a0) * torch.digamma(a)
            + (b - b0) * torch.digamma(b)
            + (a0 - a + b0 - b) * torch.digamma(a + b)
        )
        return slab + weight.clamp(min=0).to(slab)

    def along(self, unit: int, offsets: Tensor) -> Tensor:
        """Returns the slab's mean + std * offset, (B, J)."""
        return self.slab.along(unit, offsets)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_i|x_i) in nats, (B,), for z (B, Z), with the selector summed
        out and g integrated out."""
        return self._log_density(z).sum(-1)

    def pairwise_log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_j|x_i) in nats of every pair, (J, B) float64, for z
        (J, Z)."""
        mean, logvar = (x.double().T for x in self.raw.chunk(4, dim=-1)[:2])  # (Z, B)
        a, b = (x.double().T for x in self.beta)
        precision = torch.exp(-logvar)
        spike_weight, slab_weight = a / (a + b), b / (a + b) * precision.sqrt()
        rows = z.double().T[..., None]  # (Z, J, 1)
        spike = torch.exp(-0.5 * (rows / SPIKE).square()) / SPIKE
        total = torch.zeros(len(z), len(self.raw), dtype=torch.float64, device=z.device)
        # A block of posteriors and one dimension at a time: (J, B, Z) would not fit, and
        # small blocks stay in the processor's cache.
        for start in range(0, total.shape[1], PAIRWISE_BLOCK):
            block = slice(start, start + PAIRWISE_BLOCK)
            for dim in range(len(rows)):
                squared = (rows[dim] - mean[dim, block]).square_().mul_(precision[dim, block])
                density = squared.mul_(-0.5).exp_().mul_(slab_weight[dim, block])
                density.addcmul_(spike[dim], spike_weight[dim, block])
                total[:, block] += density.log_()  # -inf below e^-745: no share in any sum
        return total - 0.5 * math.log(2 * math.pi) * len(rows)

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.slab.moments()
        inside = self.spike * SPIKE**2 + (1 - self.spike) * variance
        return (1 - self.spike) * mean, inside + self.spike * (1 - self.spike) * mean.square()

    def activity(self) -> Tensor:
        """Returns Var_x[E q(z|x)] of each dimension (sample variance), (Z,) float64."""
        mean, _ = self.moments()
        return Gaussian(mean, torch.zeros_like(mean)).activity()

    def tensors(self) -> dict[str, Tensor]:
        """Returns `mean` and `logvar` of the slab and `spike`, (B, Z) each."""
        return {**self.slab.tensors(), "spike": self.spike}

    def _log_density(self, z: Tensor) -> Tensor:
        a, b = self.beta
        slab = self.slab
        log_total = (a + b).log()
        spike = -0.5 * (z / SPIKE).square() - math.log(SPIKE)
        width = -0.5 * ((z - slab.mean).square() * torch.exp(-slab.logvar) + slab.logvar)
        either = torch.logaddexp(a.log() - log_total + spike, b.log() - log_total + width)
        return either - 0.5 * math.log(2 * math.pi)


PAIRWISE_BLOCK = 2048
"""Posteriors whose densities `SpikeSlab.pairwise_log_prob` computes at a time."""

SELECTOR_TEMPERATURE = 0.5
"""Affects only the gradient of the selector, not its value."""


def _beta_parameter(raw: Tensor) -> Tensor:
    return (0.5 + torch.nn.functional.softplus(raw)).clamp(max=100)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


@dataclass(frozen=True)
class SpikeSlabFamily(Family):
    """Spike-and-slab distributions. The prior's slab is N(0, 1), and its weight g has
    the distribution Beta(*spike_prior)."""

    spike_prior: Sequence[float]

    @property
    def description(self) -> str:
        a, b = self.spike_prior
        return f"{self.units} dimensions, spike and slab, prior Beta({a:g}, {b:g})"

    @property
    def parameter_width(self) -> int:
        return 4 * self.units

    @property
    def noise_width(self) -> int:
        return 2 * self.units

    def of(self, parameters: Tensor) -> SpikeSlab:
        return SpikeSlab(parameters.float())

    def prior(self, device: torch.device | str = "cpu") -> SpikeSlab:
        raw = [math.log(math.expm1(each - 0.5)) for each in self.spike_prior]
        row = torch.tensor([0.0, 0.0, *raw], device=device)
        return SpikeSlab(row.repeat_interleave(self.units)[None])


@dataclass(frozen=True)
class Categorical(Distribution):
    """A batch of D independent categorical variables of K values each.

    z is their one-hot vectors side by side, Z = D * K.
    """

    logits: Tensor
    """(B, D, K) float32."""

    @property
    def parameters(self) -> Tensor:
        """(B, D * K)."""
        return self.logits.flatten(1)

    @property
    def probabilities(self) -> Tensor:
        """q(z_d = k|x), (B, D, K)."""
        return self.logits.softmax(-1)

    @property
    def point(self) -> Tensor:
        """The likeliest value of each variable, (B, D * K)."""
        return _one_hot(self.logits).flatten(1)

    def sample(self, noise: Tensor) -> Tensor:
        """Returns one-hot vectors (B, D * K) from noise (B, D * K), with the gradient
        of the softmax: straight-through Gumbel-softmax (Jang et al. 2017)."""
        normal = noise.to(self.logits).view(len(noise), *self.logits.shape[1:])
        gumbel = -torch.log(-torch.special.log_ndtr(normal))
        soft = ((self.logits + gumbel) / SOFTMAX_TEMPERATURE).softmax(-1)
        return (_one_hot(soft) + (soft - soft.detach())).flatten(1)

    def kl(self, prior: Categorical) -> Tensor:
        """Returns KL(self || prior) of each variable in nats, (B, D), in closed
        form."""
        q, p = self.logits.double().log_softmax(-1), prior.logits.double().log_softmax(-1)
        # In float64, because the terms of the sum cancel near the prior.
        return (q.exp() * (q - p)).sum(-1).clamp(min=0).to(self.logits)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_i|x_i) in nats, (B,), for one-hot z (B, D * K)."""
        return (z * self.logits.log_softmax(-1).flatten(1)).sum(-1)

    def pairwise_log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_j|x_i) in nats of every pair, (J, B) float64, for z
        (J, D * K)."""
        return z.double() @ self.logits.double().log_softmax(-1).flatten(1).T

    def moments(self) -> tuple[Tensor, Tensor]:
        chances = self.probabilities.flatten(1)
        return chances, chances * (1 - chances)

    def activity(self) -> Tensor:
        """Returns the information of each variable about the sentence, H(mean q) - mean
        H(q), in nats, (D,) float64."""
        probabilities = self.logits.double().softmax(-1)
        return _entropy(probabilities.mean(0)) - _entropy(probabilities).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """Returns `probabilities`, (B, D, K)."""
        return {"probabilities": self.probabilities}


SOFTMAX_TEMPERATURE = 1.0
"""Affects only the gradient of the categories, not their values."""


def _one_hot(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


@dataclass(frozen=True)
class CategoricalFamily(Family):
    """`units` variables of `categories` values each. The prior is uniform."""

    categories: int
    continuous: ClassVar[bool] = False

    @property
    def description(self) -> str:
        return f"{self.units} categorical variables of {self.categories} values"

    @property
    def latent_width(self) -> int:
        return self.units * self.categories

    @property
    def parameter_width(self) -> int:
        return self.latent_width

    def codes(self, z: Tensor, unit: int) -> Tensor:
        codes = z.view(self.units, self.categories).repeat(self.categories, 1, 1)
        codes[:, unit] = torch.eye(self.categories, dtype=z.dtype, device=z.device)
        return codes.flatten(1)

    def of(self, parameters: Tensor) -> Categorical:
        return Categorical(parameters.float().view(-1, self.units, self.categories))

    def bounded(self, parameters: Tensor) -> Tensor:
        return parameters.float()  # no variances

    def prior(self, device: torch.device | str = "cpu") -> Categorical:
        return Categorical(torch.zeros(1, self.units, self.categories, device=device))


def present(z: Tensor, vectors: int) -> Tensor:
    """Returns which of its K vectors each z (B, Z) has, (B, K) boolean: those that are
    not 0 in all numbers. It is how z itself says how many vectors a text has."""
    return (z.unflatten(-1, (vectors, -1)) != 0).any(-1)


def masked(z: Tensor, valid: Tensor) -> Tensor:
    """Returns z (B, Z) with 0 in place of the vectors that are not `valid`, (B, K)."""
    vectors = z.unflatten(-1, (valid.shape[-1], -1))
    return torch.where(valid.bool().unsqueeze(-1), vectors, 0.0).flatten(-2)


@dataclass(frozen=True)
class Vectors(Distribution):
    """A batch of distributions over K vectors each, of which a text may lack some.

    z is the vectors side by side. A vector that a text lacks is 0 in z, has no KL and no
    density, and counts nowhere.
    """

    each: Distribution
    """B * K rows: the vectors of the first text, then those of the next."""
    chance: Tensor
    """(B, K), the probability of at least k vectors. In a posterior it is 0 or 1."""

    @property
    def valid(self) -> Tensor:
        """(B, K) boolean: the vectors that there are, or may be in a prior."""
        return self.chance > 0

    @property
    def kl_of_z(self) -> bool:  # type: ignore[override]
        return self.each.kl_of_z

    @property
    def probabilities(self) -> Tensor | None:
        found = self.each.probabilities
        return None if found is None else self._per_text(found)

    @property
    def spike(self) -> Tensor | None:
        return None if self.each.spike is None else self._per_text(self.each.spike)

    @property
    def parameters(self) -> Tensor:
        """(B, P): those of each vector, and `chance`."""
        return torch.cat([self._per_text(self.each.parameters), self.chance], dim=-1)

    @property
    def point(self) -> Tensor:
        return self._masked(self.each.point)

    @property
    def vectors(self) -> Tensor:
        """`point` by vectors, (B, K, Z / K)."""
        return self.point.unflatten(1, (self.chance.shape[1], -1))

    def sample(self, noise: Tensor) -> Tensor:
        """Returns z (B, Z). The last number of the noise decides how many vectors there
        are, if that is not known."""
        of_each, count = noise[:, :-1], noise[:, -1:]
        own = self._rows_of(len(noise))
        z = own._per_text(own.each.sample(of_each.reshape(own.chance.numel(), -1)))
        return masked(z, own.chance > torch.special.ndtr(count.double()))

    def kl(self, prior: Vectors) -> Tensor:
        return self._masked(self.each.kl(prior._rows_of(len(self.chance)).each))

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_i|x_i) in nats, (B,), of the vectors that z (B, Z) has."""
        own = self._rows_of(len(z))
        found = own.each.log_prob(z.reshape(own.chance.numel(), -1)).view_as(own.chance)
        return torch.where(present(z, own.chance.shape[1]), found, 0.0).sum(-1)

    def along(self, unit: int, offsets: Tensor) -> Tensor:
        vector, unit = divmod(unit, self.each.point.shape[1])
        return self._vector(vector).along(unit, offsets)

    def pairwise_log_prob(self, z: Tensor) -> Tensor:
        """Returns log q(z_j|x_i) in nats of each pair, (J, B) float64; minus infinity for
        another number of vectors."""
        count, valid = self.valid.shape[1], self.valid
        total = torch.zeros(len(z), len(valid), dtype=torch.float64, device=z.device)
        for vector, has in enumerate(present(z, count).unbind(1)):
            own = z.unflatten(-1, (count, -1))[:, vector]
            found = self._vector(vector).pairwise_log_prob(own)
            total += torch.where(has[:, None], found, 0.0)
            total.masked_fill_(has[:, None] != valid[None, :, vector], -math.inf)
        return total

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.each.moments()
        return self._masked(mean), self._masked(variance)

    def activity(self) -> Tensor:
        """Returns that of each vector over the texts that have it."""
        vectors = enumerate(self.valid.unbind(1))
        return torch.cat([self._vector(number, has).activity() for number, has in vectors])

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by their names, (B, K, ...) each, and `valid`, (B, K)."""
        named = self.each.tensors()
        rows = {name: tensor.unflatten(0, self.valid.shape) for name, tensor in named.items()}
        return {**rows, "valid": self.valid}

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> Vectors:
        def of_each(tensor: Tensor) -> Tensor:
            return change(tensor.unflatten(0, self.chance.shape)).flatten(0, 1)

        return Vectors(self.each.each_tensor(of_each), change(self.chance))

    def _rows_of(self, texts: int) -> Vectors:
        """Returns the same for so many texts, if it is one row for all."""
        return self if len(self.chance) == texts else self.repeat(texts)

    def _vector(self, number: int, texts: Tensor | slice = slice(None)) -> Distribution:
        """Returns one vector of all texts, or of some."""
        return self.each.each_tensor(lambda rows: rows[number :: self.valid.shape[1]][texts])

    def _per_text(self, rows: Tensor) -> Tensor:
        """Returns rows (B * K, U, ...) side by side, (B, K * U, ...)."""
        return rows.unflatten(0, self.valid.shape).flatten(1, 2)

    def _masked(self, rows: Tensor) -> Tensor:
        """The same of rows (B * K, U), with 0 for the vectors that there are not."""
        return masked(self._per_text(rows), self.valid)


@dataclass(frozen=True)
class VectorFamily(Family):
    """`vectors` vectors of a family `each`, of which a text may lack some."""

    each: Family
    vectors: int
    chance: tuple[float, ...]
    """(K,), the probability of at least k vectors in the fixed prior."""

    @property
    def continuous(self) -> bool:  # type: ignore[override]
        return self.each.continuous

    @property
    def description(self) -> str:
        return f"up to {self.vectors} vectors of {self.each.description}"

    @property
    def latent_width(self) -> int:
        return self.vectors * self.each.latent_width

    @property
    def parameter_width(self) -> int:
        """P: the head's output for each vector, and `chance`."""
        return self.vectors * (self.each.parameter_width + 1)

    @property
    def head_width(self) -> int:
        return self.each.parameter_width

    @property
    def noise_width(self) -> int:
        """E: those of each vector, and one for the number of vectors."""
        return self.vectors * self.each.noise_width + 1

    def normalized(self, z: Tensor) -> Tensor:
        return self.each.normalized(z.unflatten(-1, (self.vectors, -1))).flatten(-2)

    def codes(self, z: Tensor, unit: int) -> Tensor:
        vector, unit = divmod(unit, self.each.units)
        own = z.unflatten(0, (self.vectors, -1))
        of_each = self.each.codes(own[vector], unit)
        codes = own.repeat(len(of_each), 1, 1)
        codes[:, vector] = of_each
        return codes.flatten(1)

    def of(self, parameters: Tensor) -> Vectors:
        rows, chance = self._rows(parameters)
        return Vectors(self.each.of(rows), chance)

    def bounded(self, parameters: Tensor) -> Tensor:
        rows, chance = self._rows(parameters)
        return torch.cat([self.each.bounded(rows).view(len(chance), -1), chance], -1)

    def prior(self, device: torch.device | str = "cpu") -> Vectors:
        """Returns the fixed prior, whose number of vectors is that of the training
        texts."""
        chance = torch.tensor([self.chance], device=device)
        return Vectors(self.each.prior(device).repeat(self.vectors), chance)

    def _rows(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the head says of each vector, (B * K, P), and `chance`, (B, K)."""
        width = self.parameter_width - self.vectors
        of_each, chance = parameters.float().split([width, self.vectors], dim=-1)
        return of_each.reshape(len(parameters) * self.vectors, -1), chance


FAMILIES: dict[str, type[Family]] = {
    "gaussian": GaussianFamily,
    "spike_slab": SpikeSlabFamily,
    "categorical": CategoricalFamily,
}
"""The families by their names in `LatentConfig.family`."""


def make_family(config: PreTrainedConfig) -> Family:
    """Returns the family that a model's configuration names."""
    each = FAMILIES[config.family](config.latent_dim, **read_by(config, "family"))
    vectors, counts = config.latent_vectors, config.vector_counts
    if vectors == 1:
        return each
    chance = [sum(counts[k:]) / sum(counts) if counts else 1.0 for k in range(vectors)]
    return VectorFamily(vectors * each.units, each, vectors, tuple(chance))
