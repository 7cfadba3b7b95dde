"""Everything a phase trains with: its ds_config filled in, its model, its engine, its
batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from dsvae.config import RunConfig
from dsvae.data.batches import TrainingBatches, most_micro_batches
from dsvae.data.prepared import Prepared
from dsvae.data.tokenization import mask_token
from dsvae.engine import compilation, ds_config, nvme
from dsvae.engine.build import Annotations, build_model, find_origin
from dsvae.engine.checkpoint import Checkpoint
from dsvae.engine.engine import PhaseEngine
from dsvae.engine.latent_noise import FrozenEncoder
from dsvae.engine.prior import PriorEngine
from dsvae.engine.process_group import lend_to_deepspeed
from dsvae.errors import UserError
from dsvae.modeling.denoiser import CHOICES
from dsvae.modeling.families import make_family
from dsvae.modeling.settings import DenoiserConfig, declared
from dsvae.modeling.t5_vae import T5VAE
from dsvae.modeling.weight_source import Origin
from dsvae.parallel.device import has_fast_bf16
from dsvae.parallel.world import World
from dsvae.phases import Phase


@contextmanager
def phase_engine(
    phase: Phase,
    raw: dict[str, Any],
    data: Prepared,
    weights: Path | None,
    world: World,
    resumed: Checkpoint | None,
) -> Iterator[tuple[PhaseEngine, TrainingBatches]]:
    """Yields the engine of a phase and its batches, which agree on how a step is cut.
    Collective. What the engine has put on a disk is removed after the block.

    Args:
        raw: the DeepSpeed configuration as it was read.
        weights: a T5VAE directory to start from; None: the model of the configuration.
        resumed: the checkpoint that the engine will load: it has the factors of the
            learning rate. None: a fresh phase.

    Raises:
        UserError: on every rank: the ds_config or the model cannot be used.
    """
    config = phase.config
    given = raw.get("gradient_accumulation_steps", "auto")
    with ExitStack() as cleanup:
        with world.suspend_hang_detection():
            resolved = _resolve(phase, raw, data, world)
            if phase.trains_prior and nvme.sections(resolved):
                raise UserError("phase prior does not work with states on a disk (nvme)")
            cleanup.enter_context(nvme.place(resolved, config.output_dir, world))
            model, origin = build_model(
                config.model,
                data.tokenizer,
                weights,
                config.seed,
                world,
                resolved,
                _columns(config, data),
                _denoiser(config, data) if phase.trains_prior else None,
            )
            if config.data.packing:
                try:
                    model.config.check_packing()
                except ValueError as error:
                    raise UserError(f"data.packing: {error}; set it to false") from None
            model.config.max_tokens = config.data.max_tokens  # for the exported config.json
            if model.config.pooling == "chunks":
                reads = config.model.posterior_reads
                model.config.vector_counts = data.vector_counts(
                    reads, model.config.chunk, model.config.latent_vectors
                )
                model.family = make_family(model.config)
            batches = TrainingBatches(
                data.splits["train"],
                batch_size=config.data.batch_size,
                token_budget=config.data.micro_batch_tokens,
                micro_batches=None if given == "auto" else given,
                noise_width=model.family.noise_width
                + (model.family.latent_width + CHOICES if phase.trains_prior else 0),
                draws=phase.inputs.draws,
                latent_width=model.family.latent_width,
                latent_noise=phase.inputs.latent_noise,
                latent_dropout=phase.inputs.latent_dropout,
                deletion=phase.inputs.deletion,
                token_mask=phase.inputs.token_mask,
                mask_id=mask_token(data.tokenizer),
                seed=phase.seed,
                rank=world.rank,
                world_size=world.size,
                pad_id=model.config.pad_token_id,
                posterior_reads=config.model.posterior_reads,
                packing=config.data.packing,
                mixture=data.mixture(config.data.weights),
            )
            scales = world.run_on_rank0(lambda: resumed.meta.get("lr_scales")) if resumed else None
            spread = world.run_on_rank0(lambda: resumed.meta.get("spread")) if resumed else None
            kind = PriorEngine if phase.trains_prior else PhaseEngine
            engine = kind(
                model,
                world,
                phase,
                resolved,
                origin=origin,
                lr_scales=scales,
                spread=spread,
                align_to=None
                if phase.trains_prior
                else _first_encoder(config, data, model, world, resolved),
            )
            if isinstance(engine, PriorEngine):
                known = world.run_on_rank0(lambda: resumed and resumed.meta["normalizer"])
                engine.set_normalizer(known or engine.measure_normalizer(batches))
        yield engine, batches
        engine.close()


def _denoiser(config: RunConfig, data: Prepared) -> dict[str, Any]:
    """Returns the `DenoiserFields` of a run."""
    model, classes = config.model, list(data.labels) if config.data.label_column else []
    counts: list[list[int]] = []
    if classes and model.pooling == "chunks":
        given = (model.posterior_reads, model.chunk, model.latent_vectors)
        counts = data.class_vector_counts(*given)
    return {
        **{name: getattr(config.prior, name) for name in declared(DenoiserConfig)},
        "classes": classes,
        "class_vector_counts": counts,
        "conditional": config.conditional,
    }


def _first_encoder(
    config: RunConfig, data: Prepared, model: T5VAE, world: World, resolved: dict[str, Any]
) -> FrozenEncoder | None:
    """Returns the encoder that z is aligned with: that of the model that the run is
    named, whatever phase 1 has made of it. Collective."""
    if not model.config.align:
        return None
    origins: list[Origin] = []  # of rank 0
    given = (config.model, data.tokenizer, None, config.seed, _columns(config, data))
    world.run_on_rank0(lambda: origins.append(find_origin(*given)))
    return FrozenEncoder(model.config, origins[0] if origins else None, world, resolved)


def _columns(config: RunConfig, data: Prepared) -> Annotations:
    given = config.data
    for column, names in ((given.label_column, data.labels), (given.tags_column, data.tags)):
        if column is not None and not names:
            raise UserError(
                f"no training record has anything in column {column}: leave the column out, or "
                f"label some records"
            )
    heads = config.heads
    return Annotations(
        config.conditional,
        data.labels if heads.class_weight else (),
        data.tags if heads.tag_weight else (),
        heads.align_weight > 0,
    )


def _resolve(phase: Phase, raw: dict[str, Any], data: Prepared, world: World) -> dict[str, Any]:
    """Returns the ds_config of a phase, accepted by DeepSpeed."""
    settings = phase.config.data
    accelerator = get_accelerator()
    resolved = ds_config.resolve(
        raw,
        phase=phase.settings,
        precision=phase.config.precision,
        batch_size=settings.batch_size,
        micro_batches=most_micro_batches(
            data.longest(phase.config.model.posterior_reads, settings.batch_size),
            settings.batch_size,
            world.size,
            settings.micro_batch_tokens,
            mixed=len(settings.weights) > 1,
            packing=settings.packing,
        ),
        world_size=world.size,
        bf16_supported=accelerator.is_bf16_supported(),
        fp16_supported=accelerator.is_fp16_supported(),
        bf16_fast=has_fast_bf16(world.device),
    )
    lend_to_deepspeed(world)  # its check compares batch sizes with the number of ranks
    ds_config.check_with_deepspeed(resolved)
    if phase.config.compile:
        compilation.check(ds_config.zero_stage(resolved), world.device)
    return resolved
