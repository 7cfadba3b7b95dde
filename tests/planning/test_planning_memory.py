"""Bytes of an engine against sums done by hand, and of a dry run against a real
step."""

import dataclasses

import pytest
import torch
from launch import CONFIGS
from small_models import t5gemma_config
from transformers import T5Config, T5EncoderModel

from dsvae.config import PhaseConfig
from dsvae.engine import ds_config
from dsvae.errors import UserError
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig
from dsvae.objective.elbo import loss_share
from dsvae.planning.dry_run import DryRun, LiveBytes, Weight, build, dry_run, weights_of
from dsvae.planning.memory import Engine, Ranks, estimate
from dsvae.planning.plan import frozen_encoder_of

T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 500,
}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.1}
MATRIX, EMBEDDING = Weight("matrix", 600, True), Weight("embedding", 400, True)
NOTHING = DryRun(0, 0, 0, 0)


def engine(name, precision="bf16", world=4, **zero):
    raw = ds_config.load(CONFIGS / f"{name}.json")
    raw["zero_optimization"] |= zero
    resolved = ds_config.resolve(
        raw,
        phase=PhaseConfig(),
        precision=precision,
        batch_size=64,
        micro_batches=1,
        world_size=world,
        bf16_supported=True,
        fp16_supported=True,
    )
    return Engine.of(resolved)


def find(
    name,
    precision="bf16",
    world=4,
    per_node=4,
    weights=(MATRIX, EMBEDDING),
    run=NOTHING,
    accumulates=False,
    **zero,
):
    made = engine(name, precision, world, **zero)
    return estimate(made, list(weights), run, Ranks(world, per_node), accumulates=accumulates)


# 1,000 weights on 4 ranks, by hand: 250 per rank.
@pytest.mark.parametrize(
    ("name", "precision", "gpu"),
    [
        ("zero0", "fp32", 4 * 1000 + 8 * 1000),
        ("zero0", "bf16", 4 * 1000 + 8 * 1000),  # autocast: float32 weights
        # float32 gradients of all weights
        ("zero1", "bf16", 2 * 1000 + 4 * 250 + 4 * 1000 + 8 * 250),
        ("zero1", "fp32", 4 * 1000 + 4 * 250 + 8 * 250),
        ("zero2", "bf16", 2 * 1000 + 4 * 250 + 8 * 250),
        ("zero2_offload", "bf16", 2 * 1000 + 2 * 600),  # and a buffer for the largest gradient
        ("zero3", "bf16", 2 * 250 + 4 * 250 + 4 * 250 + 8 * 250 + 2 * 50),
        ("zero3_offload", "bf16", 2 * 50),
    ],
)
def test_what_is_always_on_a_gpu(name, precision, gpu):
    zero = {}
    if name.startswith("zero3"):
        zero = {"stage3_param_persistence_threshold": 10, "reduce_bucket_size": 50}
    assert sum(find(name, precision, **zero).gpu.values()) == gpu


def test_what_is_always_on_a_node_is_that_of_its_ranks():
    # Float32 weights, gradients and moments of 250 elements, a bf16 copy of them, and
    # the gradient buffer: two ranks of four.
    host = find("zero2_offload", per_node=2).host
    assert sum(host.values()) == 2 * (250 * (4 + 4 + 8) + 2 * 250 + 2 * 600)


def test_the_encoder_that_z_is_aligned_with_is_whole_on_every_rank():
    config = T5VAEConfig(t5=T5, align=True)
    weights = weights_of(build(config, False))
    count = frozen_encoder_of(config, weights)
    assert count == sum(p.numel() for p in T5EncoderModel(T5Config(**T5)).parameters())
    assert frozen_encoder_of(T5VAEConfig(t5=T5), weights) == 0
    for name, width in (("zero0", 4), ("zero3", 2)):
        made, options = engine(name), {"accumulates": False}
        given = (made, weights, NOTHING, Ranks(4, 4))
        more = estimate(*given, **options, frozen_encoder=count).gpu_peak
        assert more - estimate(*given, **options).gpu_peak == width * count


def test_a_node_builds_whole_models_below_zero3_and_one_tensor_at_a_time_there():
    # 1,000 weights in float32 on each of two ranks; or a bf16 buffer of the largest,
    # 600, on each, and what rank 0 draws.
    assert find("zero2", per_node=2).host_moments["building the model"] == 2 * 4 * 1000
    assert find("zero3", per_node=2).host_moments["building the model"] == 2 * 2 * 600 + 4 * 600
    assert (
        find("zero3_offload", per_node=2).host_moments["building the model"]
        == 2 * 2 * (600 + 250) + 4 * 600
    )


def test_the_peak_at_stage_0_has_the_gradients_that_are_there():
    run = DryRun(forward=9000, backward=8900, with_gradients=11_200, evaluation=0)
    moments = find("zero0", "fp32", run=run).moments
    assert moments["forward and backward"] == 12_000 + 11_200
    assert moments["optimizer step"] == 12_000 + 4000
    # Gradients of an earlier micro-batch lie beside the activations of the next.
    assert (
        find("zero0", "fp32", run=run, accumulates=True).moments["forward and backward"]
        == 12_000 + 4000 + 9000
    )
    # With few activations the peak is at the end: all gradients and their flat copy.
    few = DryRun(forward=900, backward=890, with_gradients=4200, evaluation=0)
    assert find("zero0", "fp32", run=few).moments["forward and backward"] == 12_000 + 2 * 4000


def test_the_peak_of_zero2_is_before_the_gradients_or_beside_its_buckets():
    # Two buckets of 100 bf16 elements, and float32 gradients of 250 elements.
    beside = 2 * 2 * 100 + 4 * 250
    always = 2 * 1000 + 12 * 250
    for forward, backward, peak in (
        (9000, 8000, 8000 + beside),
        (9000, 7000, 9000),
        # a flat copy of the largest gradient, which fills a bucket alone
        (2000, 1000, beside + 2 * 600),
    ):
        run = DryRun(forward, backward, 0, evaluation=0)
        moments = find("zero2", run=run, reduce_bucket_size=100).moments
        assert moments["forward and backward"] == always + peak
    accumulating = DryRun(9000, 7000, 0, evaluation=0)
    moments = find("zero2", run=accumulating, reduce_bucket_size=100, accumulates=True).moments
    assert moments["forward and backward"] == always + 9000 + 4 * 250


def test_zero3_gathers_weights_up_to_its_limit():
    run = DryRun(forward=90_000, backward=0, with_gradients=0, evaluation=50_000)
    zero = {"stage3_param_persistence_threshold": 10, "reduce_bucket_size": 50}
    for limit, elements in ((10**9, 1000), (700, 700), (10, 600)):  # at least the largest
        needs = find("zero3", run=run, stage3_max_live_parameters=limit, **zero)
        always = sum(needs.gpu.values())
        assert needs.moments["forward and backward"] == always + 90_000 + 2 * elements
        assert needs.moments["evaluation"] == always + 50_000 + 2 * elements


def test_buckets_of_zero2_are_counted_whole_and_twice_where_communication_overlaps():
    small, large = (
        find("zero2", reduce_bucket_size=size).moments["forward and backward"]
        for size in (700, 900)
    )
    assert large - small == 3 * 2 * 200  # and a flat copy of one


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_bucket_has_no_more_elements_than_the_gradients(name):
    exact, larger = (
        find(name, reduce_bucket_size=size, stage3_param_persistence_threshold=10)
        for size in (1000, 1_000_000)
    )
    assert larger == exact


def test_a_frozen_decoder_has_neither_gradients_nor_moments():
    frozen = dataclasses.replace(EMBEDDING, trains=False)
    assert find("zero2", weights=(MATRIX, frozen)).gpu == {
        "weights": 2 * 1000,
        "float32 weights": 4 * 150,
        "Adam moments": 8 * 150,
    }


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_more_gpus_never_need_more_each(name):
    peaks = [find(name, world=world).gpu_peak for world in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_more_is_sharded_from_stage_to_stage():
    large = [Weight(f"m{i}", 1_000_000, True) for i in range(40)]
    fixed = {"reduce_bucket_size": 1000}
    always = [
        sum(find(f"zero{stage}", world=8, weights=large, **fixed).gpu.values())
        for stage in (0, 1, 2, 3)
    ]
    assert always == sorted(always, reverse=True)
    assert always[3] < always[0] / 5  # 18 bytes over 8 ranks against 12 on each


def test_stages_that_are_not_planned_for_are_refused():
    with pytest.raises(UserError, match="stage 0 with bf16"):
        Engine.of({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}})


def test_live_bytes_count_storages_once_and_forget_them():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        b = a + 1
        assert live.now == 8000
        del b
        assert live.now == 4000
        del a, view
    assert (live.now, live.restart()) == (0, 8000)


def real_step(config, rows, tokens, *, checkpointing):
    """Peak bytes of a forward and backward on CPU, gradients dropped as they come, and
    that of an evaluation pass."""
    torch.manual_seed(0)
    model = T5VAE(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = LiveBytes()
    for p in model.parameters():
        live.add(p)
    base = live.now
    with live:
        ids = torch.randint(3, 500, (rows, tokens))
        ids[-1, tokens // 2 :] = 0
        mask, labels = (ids != 0).long(), ids.masked_fill(ids == 0, -100)
        given = {"labels": labels, "sentence_weights": torch.ones(rows)}
        given |= {"noise": torch.randn(rows, model.family.noise_width)}
        if config.conditional:
            given |= {"condition_ids": ids.clone(), "condition_mask": mask.clone()}
            ids, mask = torch.cat([ids, ids], 1), torch.cat([mask, mask], 1)
        live.restart()
        out = model(ids, mask, **given)
        kl = {"kl": out.posterior.kl(out.prior)}
        slopes = {"kl": torch.ones(model.family.units)}
        loss_share(out.weighted_nats, kl, torch.ones(rows), slopes, rows).backward()
        training = live.restart() - base
        del out, kl
        live.restart()
        model.eval()
        with torch.no_grad():
            model(ids, mask, **given)
        return training, live.restart() - base


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        {"injection": "memory"},
        {"injection": "embedding"},
        {"injection": "memory", "conditional": True, "prior": "learned"},
        {"injection": "cross", "memory_slots": 4},
        {"injection": "cross", "t5": t5gemma_config(vocab_size=500)},
        {"injection": "cross", "latent_vectors": 8, "pooling": "chunks"},
        {"injection": "memory", "latent_vectors": 8, "pooling": "queries"},
    ],
)
def test_a_dry_run_counts_what_a_real_step_holds(checkpointing, path):
    config = T5VAEConfig(**{"t5": T5, "latent_dim": 8, **path})
    run = dry_run(
        config,
        rows=6,
        tokens=32,
        evaluation_rows=6,
        dtype=torch.float32,
        autocast=None,
        gradient_checkpointing=checkpointing,
        freeze_decoder=False,
        fused_attention=False,
    )
    training, evaluation = real_step(config, 6, 32, checkpointing=checkpointing)
    assert max(run.forward, run.backward) == pytest.approx(training, rel=0.02)
    assert run.evaluation == pytest.approx(evaluation, rel=0.02)


def test_checkpointing_and_the_fused_kernel_need_less_and_longer_sentences_more():
    def peak(rows=8, tokens=128, **other):
        options = {"gradient_checkpointing": False, "fused_attention": True} | other
        run = dry_run(
            T5VAEConfig(t5=T5 | {"num_layers": 4, "num_heads": 8}, latent_dim=8),
            rows=rows,
            tokens=tokens,
            evaluation_rows=0,
            dtype=torch.bfloat16,
            autocast=None,
            freeze_decoder=False,
            **options,
        )
        return max(run.forward, run.backward)

    plain = peak()
    assert peak(gradient_checkpointing=True) < 0.6 * plain
    assert peak(fused_attention=False) > 1.3 * plain
    assert peak(rows=4) < 0.6 * plain
    assert peak(rows=4, tokens=256) > plain
