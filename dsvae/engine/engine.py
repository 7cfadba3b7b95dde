"""One phase of training: a DeepSpeed engine around the model, and the optimizer step.

An engine is made for each phase and never changed: DeepSpeed fixes at its start which
weights train, and flipping `requires_grad` later leaves thawed weights still and frozen
ones moving.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dsvae.config import PhaseConfig
from dsvae.data.batches import MicroBatch, Step
from dsvae.engine import ds_config as ds_configs
from dsvae.engine import nvme
from dsvae.engine.distributed import World
from dsvae.engine.weights import freeze_decoder, frozen_digest, parameter_groups
from dsvae.modeling.origin import Origin
from dsvae.modeling.posterior import Gaussian
from dsvae.modeling.t5_vae import T5VAE
from dsvae.objective.elbo import (
    FreeBitsMode,
    kl_gates,
    loss_share,
    reconstruction_nats,
    thresholded_kl,
)
from dsvae.objective.schedules import lr_factor


@dataclass
class StepSums:
    """Sums over the sentences of an optimizer step, of this rank."""

    rec: Tensor
    """Scalar, nats."""
    kl: Tensor
    """(Z,), nats."""
    sentences: int
    """N of the global batch."""
    skipped: bool
    """Whether no weight moved, on any rank, because the loss or a gradient was not
    finite."""

    def means(self, world: World) -> tuple[float, Tensor]:
        """(rec, kl (Z,)): means per sentence of the global batch, in nats.
        Collective."""
        sums = (
            world.sum(torch.cat([self.rec[None].double(), self.kl.double()])).cpu() / self.sentences
        )
        return float(sums[0]), sums[1:]


class PhaseEngine:
    """Trains a T5VAE with DeepSpeed under the objective of one phase.

    Args:
        model: from `build_model`; the engine casts and shards it in place.
        phase: optimizer, schedule and clipping.
        ds_config: resolved.
        origin: what the model started from, for the export of frozen weights; None on
            the other ranks.
        sample_latent: decode a sample of the posterior, or its mean.
        freeze: train the encoder and the latent path only.
        free_bits, free_bits_mode: the KL threshold.
        gradient_checkpointing: recompute the blocks' activations in backward.
        seed: of dropout; every (step, micro-batch, rank) starts from its own state, so
            a resumed run repeats it.
    """

    def __init__(
        self,
        model: T5VAE,
        world: World,
        phase: PhaseConfig,
        ds_config: dict[str, Any],
        *,
        origin: Origin | None,
        sample_latent: bool,
        freeze: bool,
        free_bits: float,
        free_bits_mode: FreeBitsMode,
        gradient_checkpointing: bool,
        seed: int,
    ) -> None:
        self.zero_stage, self.precision = (
            ds_configs.zero_stage(ds_config),
            ds_configs.precision_of(ds_config),
        )
        self.world, self.seed, self._norm = world, seed, math.nan
        self.sample_latent, self.free_bits, self.free_bits_mode = (
            sample_latent,
            free_bits,
            free_bits_mode,
        )
        self.origin = origin
        model.requires_grad_(True)
        if freeze:
            freeze_decoder(model)
        self.frozen = frozen_digest(model, origin, world)
        if gradient_checkpointing:
            # reentrant: no gradient through keyword arguments
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer_params = ds_config["optimizer"]["params"]
        # torch's fused AdamW: the same update everywhere, and no compiler needed, on
        # CPU, GPU and for offloaded states.
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optimizer_params["weight_decay"]),
            lr=optimizer_params["lr"],
            betas=tuple(optimizer_params["betas"]),
            eps=optimizer_params["eps"],
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, phase)
        )
        # DeepSpeed builds an optimizer of its own from this section; ours is given.
        without_optimizer = {key: value for key, value in ds_config.items() if key != "optimizer"}
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=without_optimizer,
            dist_init_required=False,
        )
        nvme.mend(self.deepspeed)

    @property
    def module(self) -> T5VAE:
        """The model as the engine holds it: cast, and sharded at ZeRO 3."""
        return self.deepspeed.module

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.deepspeed.get_lr()[0]

    @property
    def skipped_steps(self) -> int:
        """Steps of this phase so far in which no weight moved; a checkpoint keeps the
        count."""
        return self.deepspeed.skipped_steps

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; not finite where that
        step was skipped."""
        return self._norm if self.zero_stage == 0 else float(self.deepspeed.get_global_grad_norm())

    def train_step(self, index: int, step: Step, beta: float) -> StepSums:
        """One optimizer step on the global batch that `step` is this rank's part of.

        Args:
            index: the optimizer step of the phase, from 0.
            beta: weight of the KL term.

        The gradient is that of (1/N) sum_i [rec_i + beta * kl_i] over all ranks and
        micro-batches: DeepSpeed averages over the W ranks, so each share is multiplied
        by W, and its own scaling by accumulation steps is off.
        """
        self.deepspeed.train()
        batches = [batch.to(self.world.device) for batch in step.micro_batches]
        thresholded = beta > 0 and self.free_bits > 0
        gates = None
        if thresholded and len(batches) > 1:
            gates = self._gates(self._kl_ahead(index, batches), step.sentences)
        self.world.beat(f"step {index + 1}")
        rec_sum = torch.zeros((), device=self.world.device)
        kl_sum = torch.zeros(self.module.config.latent_dim, device=self.world.device)
        for i, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
            self._seed(index, i)
            noise = batch.noise if self.sample_latent else torch.zeros_like(batch.noise)
            out = self.deepspeed(
                batch.input_ids, batch.attention_mask, labels=batch.labels, noise=noise
            )
            rec = reconstruction_nats(out.logits, batch.labels)
            kl = out.posterior.kl()
            kl_now = (batch.weight @ kl).detach()
            if gates is None:
                gates = (
                    self._gates(kl_now.clone(), step.sentences)
                    if thresholded
                    else torch.ones_like(kl_now)
                )
            share = loss_share(rec, kl, batch.weight, beta, gates, step.sentences)
            self.deepspeed.backward(share * self.world.size, scale_wrt_gas=False)
            rec_sum += torch.dot(batch.weight, rec.detach())
            kl_sum += kl_now
            self.world.beat(f"step {index + 1}, micro-batch {i + 1} of {len(batches)}")
        return StepSums(rec_sum, kl_sum, step.sentences, skipped=not self._update())

    @torch.no_grad()
    def inspect(self, index: int, step: Step) -> list[dict[str, Any]]:
        """What a step computes for each of this rank's sentences, as rows that JSON
        takes. Collective at ZeRO 3.

        `input_ids` are those of the encoder (deletion noise included), `labels` those
        of the decoder, `noise` is that of z = mean + std * noise; rec and kl in nats.
        """
        rows = []
        for i, given in enumerate(step.micro_batches):
            batch = given.to(self.world.device)
            self._seed(index, i)
            noise = batch.noise if self.sample_latent else torch.zeros_like(batch.noise)
            with self._autocast():
                out = self.module(
                    batch.input_ids, batch.attention_mask, labels=batch.labels, noise=noise
                )
            rec, kl = reconstruction_nats(out.logits, batch.labels), out.posterior.kl()
            for row in range(len(rec)):
                if batch.weight[row]:
                    rows.append(
                        {
                            "rank": self.world.rank,
                            "micro_batch": i,
                            "rec": float(rec[row]),
                            "kl": float(kl[row].sum()),
                            "input_ids": batch.input_ids[row][
                                batch.attention_mask[row].bool()
                            ].tolist(),
                            "labels": batch.labels[row][batch.labels[row] >= 0].tolist(),
                            "noise": noise[row].tolist(),
                        }
                    )
        return rows

    def _update(self) -> bool:
        """The optimizer's step on the gradients that are there; False if they are not
        finite and it was skipped, on all ranks.

        DeepSpeed skips by itself, except at stage 0. The schedule goes on, so that a
        step's learning rate depends on its number alone.
        """
        if self.zero_stage == 0:
            # Already summed over the ranks, so all of them find the same.
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.module.parameters() if p.grad is not None]
            )
            self._norm = float(norm)
            if not math.isfinite(self._norm):
                self.deepspeed.zero_grad()
                self.deepspeed.skipped_steps += 1  # as DeepSpeed counts at the other stages
                self.deepspeed.lr_scheduler.step()
                return False
        self.deepspeed.step()
        if self.deepspeed.was_step_applied():
            return True
        self.deepspeed.lr_scheduler.step()
        return False

    def loss(self, rec: float, kl: Tensor, beta: float) -> float:
        """The loss of a global batch from its means: rec in nats, kl (Z,) in nats."""
        return (
            rec + beta * float(thresholded_kl(kl, self.free_bits, self.free_bits_mode))
            if beta
            else rec
        )

    def close(self) -> None:
        """Frees the engine's buffers and hooks."""
        self.deepspeed.destroy()

    def _gates(self, kl_sum: Tensor, sentences: int) -> Tensor:
        """The gates of the global batch from this rank's sum of KL, (Z,).
        Collective."""
        return kl_gates(self.world.sum(kl_sum) / sentences, self.free_bits, self.free_bits_mode)

    @torch.no_grad()
    def _kl_ahead(self, index: int, batches: list[MicroBatch]) -> Tensor:
        """This rank's sum of KL over all micro-batches, (Z,), with the dropout that the
        training passes will draw.

        The threshold needs the batch mean before the first backward; with one
        micro-batch its forward pass gives it.
        """
        total = torch.zeros(self.module.config.latent_dim, device=self.world.device)
        for i, batch in enumerate(batches):
            self._seed(index, i)
            with self._autocast():
                out = self.module(batch.input_ids, batch.attention_mask, encode_only=True)
            total += batch.weight @ Gaussian.from_parameters(out.posterior_parameters).kl()
        return total

    def _autocast(self) -> torch.autocast:
        """What the engine's own forward pass runs under: the module's, called without
        the engine, would run in float32."""
        enabled = self.deepspeed.torch_autocast_enabled()
        dtype = self.deepspeed.torch_autocast_dtype() if enabled else None
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=enabled)

    def _seed(self, index: int, micro_batch: int) -> None:
        """Random state of the model's own draws (dropout), from where it is and nothing
        else."""
        mixed = self.seed
        for part in (index, micro_batch, self.world.rank):
            mixed = (mixed * 1_000_003 + part + 1) % (1 << 63)
        torch.manual_seed(mixed)
