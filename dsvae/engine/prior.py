"""The phase `prior`: a denoiser trains on draws of q(z|x), and everything else is frozen.

The encoder runs on the fly, so that every epoch has other draws. The averaged weights lie
beside the optimizer's float32 weights, cut in the same way: to average takes no
communication. A checkpoint has them whole, in a file of their own, for any number of
ranks and any ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dsvae.data.batches import MicroBatch, Step, TrainingBatches
from dsvae.engine.engine import PhaseEngine
from dsvae.metrics.flow import QUARTERS, by_time, flow_losses
from dsvae.modeling.denoiser import Denoiser, FlowDraws
from dsvae.objective.elbo import Penalty
from dsvae.parallel.world import World

NORMALIZED_TEXTS = 65_536
"""The normalizer is that of so many training texts, or of all."""


@dataclass
class FlowSums:
    """Sums over this rank's sentences of an optimizer step."""

    sums: Tensor
    """(2, 4), of `by_time`."""
    skipped: bool
    """Whether the step was skipped on all ranks."""

    def means(self, world: World) -> FlowMeans:
        """Returns the means over the global batch. Collective."""
        return FlowMeans(flow_losses(world.sum(self.sums.clone()).cpu()))


@dataclass
class FlowMeans:
    """Means over the global batch of an optimizer step."""

    losses: dict[str, float]
    """Those of `flow_losses`."""

    def values(self, step: Step) -> dict[str, float]:
        """Returns what is logged, by name."""
        return self.losses

    @property
    def main(self) -> str:
        """The loss in words."""
        return f"flow_loss {self.losses['flow_loss']:.4g}"

    @property
    def finite(self) -> bool:
        return math.isfinite(self.losses["flow_loss"])

    @property
    def kl(self) -> Tensor:
        """No KL."""
        return torch.zeros(0)


class PriorEngine(PhaseEngine):
    """Trains the denoiser of a T5VAE with DeepSpeed. Arguments as of `PhaseEngine`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._index = 0
        self._averages: list[Tensor] = []

    @torch.no_grad()
    def measure_normalizer(self, batches: TrainingBatches) -> dict[str, list[float]]:
        """Computes mean and standard deviation of z over q(z|x) of the training texts, in
        one pass over the first epoch, or its first `NORMALIZED_TEXTS`. Collective; the
        same on all ranks.

        They are those of each number of a vector. With chunks, the vectors of all places
        have them in common: few texts have the last ones.
        """
        config, world = self.module.config, self.world
        vectors = config.latent_vectors
        shape = (vectors, config.latent_dim)
        sums = torch.zeros(3, *shape, dtype=torch.float64, device=world.device)
        self.module.eval()
        for index in range(
            math.ceil(
                min(batches.steps_per_epoch * batches.batch_size, NORMALIZED_TEXTS)
                / batches.batch_size
            )
        ):
            for given in batches.step(index).micro_batches:
                batch = given.to(world.device)
                with self._autocast():
                    posterior = self._encode(batch).posterior
                mean, variance = (each.double().view(-1, *shape) for each in posterior.moments())
                valid = self.module.posterior.pooling.valid(batch.attention_mask)
                weight = (valid * batch.weight[:, None])[..., None].double()
                moments = (weight.expand_as(mean), weight * mean, weight * (mean**2 + variance))
                sums += torch.stack([each.sum(0) for each in moments])
                world.heartbeat("normalizer")
        count, first, second = world.sum(sums).cpu()
        if config.pooling == "chunks":
            count, first, second = (each.sum(0).expand(shape) for each in (count, first, second))
        mean = first / count.clamp(min=1)
        std = (second / count.clamp(min=1) - mean**2).clamp(min=1e-12).sqrt()
        return {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}

    def set_normalizer(self, values: dict[str, list[float]]) -> None:
        """Puts a normalizer into the model."""
        self.module.denoiser.set_normalizer(values)
        self.normalizer = values

    def train_step(self, index: int, step: Step, penalty: Penalty) -> FlowSums:  # type: ignore[override]
        """Runs one optimizer step on the global batch. `step` is this rank's part of it.

        The loss is the sum of the squared errors over the global batch, divided by its N
        sentences and the Z numbers that each could have. What is reported is divided by
        the numbers that there are.
        """
        self.deepspeed.train()
        self.module.eval()  # the encoder is frozen, its dropout too
        self._index = index
        device = self.world.device
        batches = [batch.to(device) for batch in step.micro_batches]
        share = self.world.size / (step.sentences * self.module.family.latent_width)
        sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=device)
        self.world.heartbeat(f"step {index + 1}")
        for i, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
            out, draws = self._flow(self.deepspeed, batch)
            self.deepspeed.backward(batch.weight @ out.flow_errors * share, scale_wrt_gas=False)
            errors, numbers = out.flow_errors.detach(), out.flow_numbers * batch.weight
            sums += by_time(errors * batch.weight, numbers, draws.times)
            self.world.heartbeat(f"step {index + 1}, micro-batch {i + 1} of {len(batches)}")
        return FlowSums(sums, not self._update())

    def _flow(self, model: Any, batch: MicroBatch) -> tuple[Any, FlowDraws]:
        """Runs one forward pass, through the engine or the bare model."""
        settings = self.phase.config.prior
        width = self.module.family.noise_width
        noise = batch.noise[:, 0]
        draws = FlowDraws.of(
            noise[:, width:],
            logit_normal=settings.times == "logit_normal",
            drop=settings.condition_drop,
        )
        out = model(
            batch.input_ids,
            batch.attention_mask,
            condition_ids=batch.condition_ids,
            condition_mask=batch.condition_mask,
            class_labels=batch.class_labels if self.module.denoiser.classes else None,
            noise=noise[:, :width],
            flow=draws,
            packed=batch.packed,
        )
        return out, draws

    @torch.no_grad()
    def inspect(self, index: int, step: Step) -> list[dict[str, Any]]:
        """Returns what a step computes for each of this rank's sentences, as rows for
        JSON. Collective at ZeRO 3."""
        rows = []
        for i, given in enumerate(step.micro_batches):
            batch = given.to(self.world.device)
            with self._autocast():
                out, draws = self._flow(self.module, batch)
            for row in range(len(batch.weight)):
                if batch.weight[row]:
                    ids = batch.input_ids[row][batch.attention_mask[row].bool()]
                    rows.append(
                        {
                            "rank": self.world.rank,
                            "micro_batch": i,
                            "flow_error": float(out.flow_errors[row]),
                            "time": float(draws.times[row]),
                            "input_ids": ids.tolist(),
                            "labels": batch.labels[row][batch.labels[row] >= 0].tolist(),
                        }
                    )
        return rows

    def _update(self) -> bool:
        """Runs the optimizer's step, and averages; returns whether it was applied."""
        applied = super()._update()
        if applied:
            self._average()
        return applied

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averages toward the weights. In the first steps the share that stays
        is smaller, so that the start is soon forgotten."""
        weights = self._masters()
        if not self._averages:
            self._averages = [weight.detach().clone() for weight in weights]
            return
        stays = min(self.phase.config.prior.average, self._index / (self._index + 9))
        for average, weight in zip(self._averages, weights, strict=True):
            average.lerp_(weight.detach(), 1 - stays)

    def _masters(self) -> list[Tensor]:
        """Returns this rank's parts of the float32 weights."""
        if self.zero_stage == 3:
            return list(self.deepspeed.optimizer.fp32_partitioned_groups_flat)
        groups = self.deepspeed.basic_optimizer.param_groups
        return [weight for group in groups for weight in group["params"]]

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Puts the averages in the place of the float32 weights, in a block that only
        reads these."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self._averages, self._masters(), strict=bool(self._averages)):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def averaged(self) -> Denoiser:
        """Returns the denoiser with the averaged weights, whole and in float32, on every
        rank. Collective."""
        made = Denoiser(self.module.config).to(self.world.device).requires_grad_(False)
        with self.averaged_weights():
            for name, value in self._whole():
                made.get_parameter(name).copy_(value)
        for name, buffer in self.module.denoiser.named_buffers():
            getattr(made, name).copy_(buffer)
        return made.eval()

    def averages(self) -> dict[str, Tensor]:
        """Returns the averaged weights by name, on CPU, for a checkpoint. Collective."""
        with self.averaged_weights():
            return {name: value.to("cpu", copy=True) for name, value in self._whole()}

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the float32 weights of the denoiser, whole, on every rank. Collective."""
        for name, parameter in self.module.denoiser.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            # At ZeRO 0 the parameters are float32 themselves.
            yield name, parameter.detach() if value is None else value

    @torch.no_grad()
    def load_averages(self, path: Path) -> None:
        """Takes the averaged weights of a checkpoint."""
        kept = [weight.detach().clone() for weight in self._masters()]
        values = load_file(path)
        parameters: Any = self.module.denoiser.named_parameters()
        for name, parameter in parameters:
            value = values[name].to(self.world.device)
            if self.zero_stage == 3:
                part = parameter.ds_tensor.numel()
                padded = F.pad(value.flatten(), (0, part * self.world.size - value.numel()))
                own = padded[part * self.world.rank :][:part]
                safe_set_local_fp32_param(parameter, own)
            elif self.zero_stage == 0:
                parameter.copy_(value)
            else:
                safe_set_full_fp32_param(parameter, value)
        self._averages = [weight.detach().clone() for weight in self._masters()]
        for weight, before in zip(self._masters(), kept, strict=True):
            weight.copy_(before)
