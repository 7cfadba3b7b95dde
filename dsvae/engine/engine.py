"""One phase of training: a DeepSpeed engine around the model, and the optimizer step.

Each phase gets its own engine, which never changes: DeepSpeed decides at its start
which weights train. Changing `requires_grad` later would neither start nor stop their
training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dsvae.data.batches import MicroBatch, Step
from dsvae.engine import ds_config as ds_configs
from dsvae.engine import nvme
from dsvae.engine.compilation import compile_training
from dsvae.engine.latent_noise import FrozenEncoder, Spread
from dsvae.engine.weights import (
    freeze_autoencoder,
    freeze_decoder,
    freeze_pretrained,
    frozen_digest,
    measure_lr_scales,
    parameter_groups,
)
from dsvae.modeling.t5_vae import T5VAE
from dsvae.modeling.weight_source import Origin
from dsvae.objective.elbo import (
    Penalty,
    Statistics,
    loss_share,
    pack,
    reconstruction_weights,
    unpack,
)
from dsvae.objective.schedules import lr_factor
from dsvae.parallel.world import World
from dsvae.phases import Phase


@dataclass
class StepSums:
    """Sums over this rank's sentences of an optimizer step."""

    rec: Tensor
    """Scalar, nats."""
    rec_term: Tensor
    """Scalar, what the loss has of rec: rec itself, or with `reconstruction_weights`; and
    of the distance of z from what it is aligned with."""
    statistics: Statistics
    """(n,) by name: what the penalty reads, and `distance`."""
    penalty: Penalty
    sentences: int
    """N of the global batch."""
    skipped: bool
    """Whether the step was skipped on all ranks, because the loss or a gradient was not
    finite."""

    def means(self, world: World) -> StepMeans:
        """Returns the means over the global batch. Collective."""
        named = {"rec": self.rec[None], "rec_term": self.rec_term[None], **self.statistics}
        means = unpack(world.sum(pack(named).double()).cpu() / self.sentences, named)
        rec, rec_term = (float(means.pop(name)) for name in ("rec", "rec_term"))
        return StepMeans(rec_term + float(self.penalty(means)), rec, means)


@dataclass
class StepMeans:
    """Means over the global batch of an optimizer step, in nats per sentence."""

    loss: float
    """What the step minimized."""
    rec: float
    statistics: Statistics
    """(n,) by name, float64 on CPU: `kl` of each unit, and what else the penalty reads."""

    def values(self, step: Step) -> dict[str, float]:
        """Returns what is logged, by name."""
        return {
            "loss": self.loss,
            "rec": self.rec,
            # does not depend on the length of this step's sentences
            "rec_per_token": self.rec * step.sentences / step.tokens,
            "kl": float(self.kl.sum()),
            **self.head_losses,
        }

    @property
    def main(self) -> str:
        """The loss in words."""
        return f"rec {self.rec:.4g}"

    @property
    def kl(self) -> Tensor:
        """The KL of each unit, (U,)."""
        return self.statistics["kl"]

    @property
    def head_losses(self) -> dict[str, float]:
        """`class_nats` and `tag_nats` if they are penalized: means over all sentences,
        of which those without labels have 0. `distance`, if z is aligned."""
        names = ("class_nats", "tag_nats", "distance")
        return {name: float(self.statistics[name]) for name in names if name in self.statistics}

    @property
    def finite(self) -> bool:
        return math.isfinite(self.rec) and bool(pack(self.statistics).isfinite().all())


class PhaseEngine:
    """Trains a T5VAE with DeepSpeed under the objective of one phase.

    Args:
        model: from `build_model`; the engine casts and shards it in place.
        phase: the settings, frozen parts and random seed of the phase.
        ds_config: resolved.
        origin: the source of the model's weights on rank 0, for the export of frozen
            ones; None on the other ranks.
        lr_scales: the factors of the learning rate from the checkpoint that the phase
            resumes from; None: they are measured here if the phase has `lr_scale` rms.
        spread: the state of the `Spread` of that checkpoint.
        align_to: the encoder that z is aligned with, if the model has a head for that.

    Dropout is seeded by step, micro-batch and rank, so that a resumed run repeats it.
    """

    def __init__(
        self,
        model: T5VAE,
        world: World,
        phase: Phase,
        ds_config: dict[str, Any],
        *,
        origin: Origin | None,
        lr_scales: dict[str, float] | None = None,
        spread: list[list[float]] | None = None,
        align_to: FrozenEncoder | None = None,
    ) -> None:
        self.zero_stage, self.precision = (
            ds_configs.zero_stage(ds_config),
            ds_configs.precision_of(ds_config),
        )
        self.world, self.phase, self.origin, self._norm = world, phase, origin, math.nan
        self.ds_config = ds_config
        model.requires_grad_(True)
        freeze_pretrained(model)
        if phase.freeze_decoder:
            freeze_decoder(model)
        if phase.trains_prior:
            freeze_autoencoder(model)
        self.frozen = frozen_digest(model, origin, world)
        if lr_scales is None and phase.settings.lr_scale == "rms":
            lr_scales = measure_lr_scales(model, origin, world)
        self.lr_scales, self.align_to = lr_scales, align_to
        self.spread: Spread | None = None
        if phase.inputs.latent_noise:
            width, vectors = model.family.latent_width, model.config.latent_vectors
            self.spread = Spread(width, vectors, world, spread)
        if phase.config.model.gradient_checkpointing:
            # Reentrant checkpointing passes no gradient through keyword arguments.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if phase.config.compile:
            compile_training(model)
        optimizer_params = ds_config["optimizer"]["params"]
        self.groups = parameter_groups(model, optimizer_params["weight_decay"], lr_scales)
        # torch's fused AdamW gives the same update on CPU, on GPU and for offloaded states,
        # and needs no compiler.
        optimizer = torch.optim.AdamW(
            [group.settings(model, optimizer_params["lr"]) for group in self.groups],
            betas=tuple(optimizer_params["betas"]),
            eps=optimizer_params["eps"],
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, phase.settings)
        )
        trained = sum(
            getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad
        )
        ds_configs.fit_bucket(ds_config, trained)
        # From this section DeepSpeed would build another optimizer.
        without_optimizer = {key: value for key, value in ds_config.items() if key != "optimizer"}
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=without_optimizer,
            dist_init_required=False,
        )
        nvme.patch_engine(self.deepspeed)
        if self.zero_stage in (1, 2):
            _skip_by_the_norm_alone(self.deepspeed.optimizer)

    @property
    def module(self) -> T5VAE:
        """The model as the engine holds it: cast, and sharded at ZeRO 3."""
        return self.deepspeed.module

    @property
    def lr(self) -> float:
        """The learning rate of the next step, before the factors of `lr_scales`."""
        return self.deepspeed.get_lr()[0] / self.groups[0].lr_scale

    @property
    def skipped_steps(self) -> int:
        """How many steps of this phase were skipped so far; checkpoints keep the
        count."""
        return self.deepspeed.skipped_steps

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; not finite if that
        step was skipped."""
        return self._norm if self.zero_stage == 0 else float(self.deepspeed.get_global_grad_norm())

    def train_step(self, index: int, step: Step, penalty: Penalty) -> StepSums:
        """Runs one optimizer step on the global batch. `step` is this rank's part of
        it.

        Args:
            index: the optimizer step of the phase, from 0.
            penalty: T of the loss (1/N) sum_i w_i rec_i + T(mean statistics).

        The gradient is that of the loss over all ranks and micro-batches. DeepSpeed
        averages over the W ranks, so each share is multiplied by W. DeepSpeed's scaling
        by accumulation steps is off.
        """
        self.deepspeed.train()
        device, sentences = self.world.device, step.sentences
        batches = [batch.to(device) for batch in step.micro_batches]
        slopes = None
        if not penalty.linear and len(batches) > 1:
            slopes = penalty.slopes(self._means_ahead(index, batches, penalty, sentences))
        self.world.heartbeat(f"step {index + 1}")
        rec = rec_term = sums = distance = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
            noise = self._choose_noise(batch)
            self._seed(index, i)
            weights = reconstruction_weights(batch.weight, batch.labels, self.phase.length_weighted)
            out = self._forward(
                self.deepspeed, batch, noise, weights, detach_prior=penalty.prior_alone
            )
            statistics = penalty.statistics(out)  # (B, n) by name
            own = batch.weight @ pack(statistics).detach()
            if slopes is None and penalty.active:
                # The slopes of a linear penalty are the same at any means.
                # `own` is summed over the ranks again with the other sums of the step.
                means = own if penalty.linear else self.world.sum(own.clone()) / sentences
                slopes = penalty.slopes(unpack(means, statistics))
            rec_share, own_rec_term = out.weighted_nats, torch.dot(weights, out.nats)
            if out.distance is not None:
                own_distance = torch.dot(batch.weight, out.distance)
                aligned = self.phase.align_weight * own_distance
                rec_share, own_rec_term = rec_share + aligned, own_rec_term + aligned.detach()
                distance = distance + own_distance.detach()
            if self.spread is not None:
                self.spread.count(out.latent, batch.weight)
            share = loss_share(rec_share, statistics, batch.weight, slopes, sentences)
            self.deepspeed.backward(share * self.world.size, scale_wrt_gas=False)
            rec = rec + torch.dot(batch.weight, out.nats)
            rec_term = rec_term + own_rec_term
            sums = sums + own
            self.world.heartbeat(f"step {index + 1}, micro-batch {i + 1} of {len(batches)}")
        skipped = not self._update()
        if self.spread is not None:
            self.spread.end_step()
        named = unpack(sums, statistics)
        if self.align_to is not None:
            named["distance"] = distance[None]
        return StepSums(rec, rec_term, named, penalty, sentences, skipped)

    @torch.no_grad()
    def inspect(self, index: int, step: Step) -> list[dict[str, Any]]:
        """Returns what a step computes for each of this rank's sentences, as rows for
        JSON. Collective at ZeRO 3.

        `input_ids` are the encoder's (deletion noise included), `labels` the decoder's,
        `noise` is what z was drawn with; rec and kl are in nats. `condition_ids` is
        there if sentences have conditions.
        """
        rows = []
        for i, given in enumerate(step.micro_batches):
            batch = given.to(self.world.device)
            noise = self._choose_noise(batch)
            self._seed(index, i)
            with self._autocast():
                out = self._forward(self.module, batch, noise, batch.weight)
            rec, kl = out.nats, out.posterior.kl(out.prior)
            for row in range(len(rec)):
                if batch.weight[row]:
                    condition = {}
                    if batch.condition_ids is not None and batch.condition_mask is not None:
                        ids = batch.condition_ids[row][batch.condition_mask[row].bool()]
                        condition = {"condition_ids": ids.tolist()}
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
                            **condition,
                        }
                    )
        return rows

    def _update(self) -> bool:
        """Runs the optimizer's step on the accumulated gradients; returns False if they
        are not finite and the step was skipped on all ranks.

        DeepSpeed itself skips such steps, except at stage 0. The schedule continues, so
        that a step's learning rate depends on its number alone.
        """
        if self.zero_stage == 0:
            # Gradients are already summed over the ranks, so all ranks see the same norm.
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.module.parameters() if p.grad is not None]
            )
            with self.world.waiting():  # for the all-reduce of the gradients, on GPUs
                self._norm = float(norm)
            if not math.isfinite(self._norm):
                self.deepspeed.zero_grad()
                self.deepspeed.skipped_steps += 1  # as DeepSpeed counts at the other stages
                self.deepspeed.lr_scheduler.step()
                return False
        self.deepspeed.step()
        if self.deepspeed.was_step_applied():
            return True
        # With offloaded states, DeepSpeed would add the next gradients to those of this step.
        averaged = getattr(self.deepspeed.optimizer, "averaged_gradients", {})
        averaged.update(dict.fromkeys(averaged))
        self.deepspeed.lr_scheduler.step()
        return False

    def close(self) -> None:
        """Frees the engine's buffers and hooks."""
        self.deepspeed.destroy()

    @torch.no_grad()
    def _choose_noise(self, batch: MicroBatch) -> Tensor:
        """Returns the noise of each sentence's z, (B, E): of K draws the one that makes
        the sentence likeliest (speculative sampling, Sato et al. 2021).

        The draws are scored without dropout, all in one pass. It runs the modules in the
        order of the training pass: in another order, ZeRO 3 would forget which weights to
        fetch next, and learn it again in every step.
        """
        draws = batch.noise.shape[1]
        if draws == 1 or not self.phase.sample_latent:
            return batch.noise[:, 0]
        trace: Any = None
        if self.zero_stage == 3:
            trace = self.deepspeed.optimizer.parameter_offload.get_param_coordinator()
        unknown = trace is not None and trace.is_invalid_trace()
        self.module.eval()
        with self._autocast():
            out = self.module(
                batch.input_ids,
                batch.attention_mask,
                labels=batch.labels,
                sentence_weights=batch.weight,
                noise=batch.noise,
                condition_ids=batch.condition_ids,
                condition_mask=batch.condition_mask,
                packed=batch.packed_draws,
            )
        self.module.train()
        if unknown:  # the trace of this pass lacks the backward pass, and would never fit a step
            trace._invalidate_trace()
        best = out.nats.view(-1, draws).argmin(1)  # (B,)
        return batch.noise[torch.arange(len(best), device=best.device), best]

    def _forward(
        self,
        model: Any,
        batch: MicroBatch,
        noise: Tensor,
        weights: Tensor,
        *,
        detach_prior: bool = False,
    ) -> Any:
        """Runs one forward pass, through the engine or the bare model."""
        more: dict[str, Tensor | None] = {"factor": batch.factor}
        if batch.added is not None and self.spread is not None:
            more["added"] = batch.added * self.spread.std()
        if self.align_to is not None:
            more["align_states"] = self.align_to(batch.input_ids, batch.attention_mask)
        return model(
            batch.input_ids,
            batch.attention_mask,
            labels=batch.labels,
            sentence_weights=weights,
            noise=noise,
            sample_latent=self.phase.sample_latent,
            **_records(batch),
            **more,
            packed=batch.packed,
            detach_prior=detach_prior,
        )

    def _encode(self, batch: MicroBatch) -> Any:
        """Runs the encoder's passes of `_forward` alone, through the bare model."""
        return self.module(
            batch.input_ids,
            batch.attention_mask,
            **_records(batch),
            packed=batch.packed,
            encode_only=True,
        )

    @torch.no_grad()
    def _means_ahead(
        self, index: int, batches: list[MicroBatch], penalty: Penalty, sentences: int
    ) -> Statistics:
        """Returns the means of the statistics over the global batch, with the same
        dropout as the training passes. Collective.

        A penalty that is not linear needs them before the first backward pass. With one
        micro-batch the training pass itself gives them.
        """
        sums = torch.zeros((), device=self.world.device)
        for i, batch in enumerate(batches):
            self._seed(index, i)
            with self._autocast():
                out = self._encode(batch)
            statistics = penalty.statistics(out)
            sums = sums + batch.weight @ pack(statistics)
        return unpack(self.world.sum(sums) / sentences, statistics)

    def _autocast(self) -> torch.autocast:
        """Returns the autocast of the engine's forward pass: without it, the bare
        module would run in float32."""
        enabled = self.deepspeed.torch_autocast_enabled()
        dtype = self.deepspeed.torch_autocast_dtype() if enabled else None
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=enabled)

    def _seed(self, index: int, micro_batch: int) -> None:
        """Seeds the model's dropout by step, micro-batch and rank alone."""
        mixed = self.phase.seed
        for part in (index, micro_batch, self.world.rank):
            mixed = (mixed * 1_000_003 + part + 1) % (1 << 63)
        torch.manual_seed(mixed)


def _skip_by_the_norm_alone(optimizer: Any) -> None:
    """Switches off DeepSpeed's check of each gradient by itself (ZeRO 1 and 2 in
    16 bits).

    It takes 15 kernels per gradient, and with offloaded states one wait of the host for
    the GPU per gradient. The norm, which DeepSpeed checks next and skips the step by,
    is not finite if any number of any gradient is not.
    """
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.update_offload_overflow_tracker = lambda grad: None


def _records(batch: MicroBatch) -> dict[str, Tensor | None]:
    """Returns what belongs to the sentences of a batch, as `T5VAE.forward` takes it."""
    names = ("condition_ids", "condition_mask", "class_labels", "tag_labels")
    return {name: getattr(batch, name) for name in names}
