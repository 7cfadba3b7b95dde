"""beta, free bits and the learning rate by the optimizer step of a phase, counted from
0."""

from __future__ import annotations

import math

from dsvae.config import BetaConfig, OptimizerConfig, Phase2Config

_MOST_ERROR = 8.0
"""Nats by which the KL can exceed its target and still count in full."""


def beta_at(step: int, steps: int, beta: BetaConfig) -> float:
    """Returns the weight of the KL term at optimizer step `step` of a phase of `steps`
    steps.

    constant: `max`. linear: 0 for a share `zero` of the phase, then a linear rise over
    a share `rise`, then `max`. cyclic: the same in each of `cycles` equal parts
    (cyclical annealing, Fu et al. 2019).
    """
    if beta.kind == "constant":
        return beta.max
    cycles = beta.cycles if beta.kind == "cyclic" else 1
    # In whole numbers, because a rounded quotient would start some cycles a step late.
    position = (step * cycles % steps) / steps
    if position < beta.zero:
        return 0.0
    if position >= beta.zero + beta.rise:
        return beta.max
    return beta.max * (position - beta.zero) / beta.rise


def next_beta(beta: float, kl: float, settings: BetaConfig) -> float:
    """Returns beta of the next optimizer step for kind target.

    It is beta + gain * (kl - target), between 0 and `max`. This is an integral
    controller in velocity form (after ControlVAE, Shao et al. 2020). Its state is beta
    itself, so that no error accumulates while beta is at a bound. The error counts with
    at most 8 nats: after phase 1 the KL is many times the target. Beta would otherwise
    be at its maximum within a few steps, and stay there until z is forgotten.

    Args:
        kl: the mean KL of the last step's global batch in nats per sentence, before any
            threshold.
    """
    assert settings.target is not None  # checked with the configuration
    moved = beta + settings.gain * min(kl - settings.target, _MOST_ERROR)
    return min(max(moved, 0.0), settings.max)


def free_bits_at(step: int, phase: Phase2Config) -> float:
    """Returns the KL threshold in nats at optimizer step `step`: `free_bits`, then 0 in
    the last share `release` of the steps."""
    return phase.free_bits if step < phase.steps - round(phase.release * phase.steps) else 0.0


def lr_factor(step: int, phase: OptimizerConfig) -> float:
    """Returns the learning rate at optimizer step `step` as a share of `phase.lr`.

    First comes a linear warm-up, whose first step is not zero. Then the rate is
    constant. In the last share `lr_decay` of the steps after the warm-up, it falls
    along a line or a cosine if the schedule says so. It would reach zero one step after
    the last.
    """
    if step < phase.warmup_steps:
        return (step + 1) / (phase.warmup_steps + 1)
    if phase.lr_schedule == "constant":
        return 1.0
    decay = max(1, round(phase.lr_decay * (phase.steps - phase.warmup_steps)))
    progress = max(0.0, (step - phase.steps + decay) / decay)
    if phase.lr_schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
