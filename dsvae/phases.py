"""A phase of training: what it trains, for how long, and with which penalty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsvae.config import OptimizerConfig, PhaseConfig, RunConfig
from dsvae.objective.elbo import Penalty
from dsvae.objective.schedules import beta_at, free_bits_at


@dataclass(frozen=True)
class Phase:
    """Phase 1, a plain autoencoder; phase 2, with the KL term (Park & Lee 2021); or phase
    3, `prior`, which trains a denoiser alone."""

    number: int
    config: RunConfig
    offset: int
    """Optimizer steps of the phases before, on the axis of what is reported."""

    @property
    def settings(self) -> OptimizerConfig:
        """Steps, optimizer and learning rate."""
        return (self.config.phase1, self.config.phase2, self.config.prior)[self.number - 1]

    @property
    def inputs(self) -> PhaseConfig:
        """Input noise, and how z is drawn; that of the prior is none."""
        return self.settings if isinstance(self.settings, PhaseConfig) else PhaseConfig()

    @property
    def trains_prior(self) -> bool:
        """Whether it is the phase `prior`."""
        return self.number == 3

    @property
    def steps(self) -> int:
        """Optimizer steps of the phase."""
        return self.settings.steps

    @property
    def seed(self) -> int:
        """Seed of the order of the sentences, their noise and dropout; it differs
        between the phases."""
        return self.config.seed * 2 + self.number - 1

    @property
    def sample_latent(self) -> bool:
        """Whether the decoder gets a sample of the posterior, or its point."""
        return self.config.phase1.sample_latent if self.number == 1 else True

    @property
    def freeze_decoder(self) -> bool:
        """Whether only the encoder and the latent path train."""
        return self.config.phase1.freeze_decoder if self.number == 1 else False

    @property
    def length_weighted(self) -> bool:
        """Whether the loss divides each reconstruction by its number of tokens."""
        return self.config.phase2.length_weighted if self.number == 2 else False

    @property
    def align_weight(self) -> float:
        """Weight of the distance between z and the encoder that it is aligned with."""
        return self.config.heads.align_weight

    @property
    def controlled(self) -> bool:
        """Whether beta follows the KL instead of the step."""
        return self.number == 2 and self.config.phase2.beta.kind == "target"

    @property
    def released(self) -> bool:
        """Whether the KL threshold changes within the phase."""
        return self.number == 2 and self.config.phase2.release > 0

    def penalty(self, step: int, controlled_beta: float) -> Penalty:
        """Returns what optimizer step `step` of the phase (from 0) adds to the
        reconstruction.

        Args:
            controlled_beta: beta if it is `controlled`.
        """
        config, settings = self.config, self.inputs
        heads: dict[str, Any] = {}
        if config.model.clusters:
            heads["skewness"], heads["dispersion"] = settings.skewness, settings.dispersion
        if config.data.label_column is not None:
            heads["class_weight"] = config.heads.class_weight
        if config.data.tags_column is not None:
            heads["tag_weight"] = config.heads.tag_weight
        if self.trains_prior:
            return Penalty()
        if self.number == 1:
            return Penalty(prior_alone=config.learned_prior, **heads)
        vae = config.phase2
        beta = controlled_beta if self.controlled else beta_at(step, vae.steps, vae.beta)
        return Penalty(
            beta,
            # Without a latent, the threshold would be a constant in the logged loss.
            free_bits_at(step, vae) if config.model.has_latent else 0.0,
            vae.free_bits_mode,
            vae.total_correlation,
            # Before beta rises, the KL does not train the prior.
            prior_alone=config.learned_prior and beta == 0,
            **heads,
        )

    def validation_loss(self, metrics: Mapping[str, float]) -> float:
        """Returns the value on validation text by which the best checkpoint of the
        phase is known: rec in phase 1, rec + kl in phase 2, flow_loss in phase 3."""
        if self.trains_prior:
            return metrics["flow_loss"]
        return metrics["rec"] + (metrics["kl"] if self.number == 2 else 0.0)
