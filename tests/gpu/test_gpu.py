"""What only a GPU can show: bf16 and fp16 steps, SDPA on the device, gradient
checkpointing, a T5-large-sized model."""

import shutil
import time

import pytest
import torch
import yaml
from launch import CONFIGS, TINY, rows, start, train
from small_models import make_vae

from dsvae import T5VAE, T5VAEConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, cache_dir):
    """As the CPU's tests have it, but with heads as wide as 16-bit kernels want them: a
    multiple of 8."""
    model = {**TINY["model"], "t5": {**TINY["model"]["t5"], "d_kv": 16}}
    config = {**TINY, "model": model, "data": {**TINY["data"], "cache_dir": str(cache_dir)}}
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    "config", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fp16"]
)
def test_the_command_trains(config, tiny, tmp_path):
    train(
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / f"{config}.json",
        "--output_dir",
        tmp_path / "run",
        timeout=300,
    )
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 8
    assert all(0 < loss < 200 for loss in losses)


def test_losses_agree_with_the_cpu(tiny, tmp_path):
    """fp32 on the GPU against fp32 on the CPU: same seed, same data."""
    import os

    common = ("--config", tiny, "--ds_config", CONFIGS / "zero2.json", "--precision", "fp32")
    train(*common, "--output_dir", tmp_path / "gpu")
    os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"] = "cpu", ""
    try:
        train(*common, "--output_dir", tmp_path / "cpu")
    finally:
        del os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"]
    found, expected = ([row["loss"] for row in rows(tmp_path / d)] for d in ("gpu", "cpu"))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_losses_are_the_same(checkpointing, tiny, tmp_path):
    """Dropout included: it draws the same numbers."""
    common = ("--config", tiny, "--ds_config", CONFIGS / "zero2.json", "--precision", "fp32")
    common += ("--model.dropout", "0.1", "--model.gradient_checkpointing", checkpointing)
    train(*common, "--output_dir", tmp_path / "eager")
    run = train(*common, "--output_dir", tmp_path / "compiled", "--compile", timeout=600)
    assert "recompile_limit" not in run.stderr
    found, expected = ([row["loss"] for row in rows(tmp_path / d)] for d in ("compiled", "eager"))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_run_goes_on_at_other_stages(tiny, tmp_path):
    """ZeRO 2, 3, 1, 0 on one GPU: the converted states must lie where each stage has
    its own."""
    common = (
        "--config",
        tiny,
        "--precision",
        "fp32",
        "--phase",
        "1",
        "--phase1.steps",
        "12",
        "--checkpoint_every",
        "3",
        "--keep_checkpoints",
        "9",
    )
    train(
        *common,
        "--ds_config",
        CONFIGS / "zero2.json",
        "--output_dir",
        tmp_path / "uncut",
        timeout=300,
    )
    cut = (*common, "--output_dir", tmp_path / "cut")
    for stage, step in (("zero2", 3), ("zero3", 6), ("zero1", 9)):
        run = start(*cut, "--ds_config", CONFIGS / f"{stage}.json")
        run.wait_for(tmp_path / "cut" / "checkpoints" / f"phase1-step{step:08d}" / "COMPLETE")
        run.kill()
        for later in (tmp_path / "cut" / "checkpoints").glob("phase1-*"):
            if later.name > f"phase1-step{step:08d}":
                shutil.rmtree(later)
    shutil.rmtree(tmp_path / "cut" / "phase1", ignore_errors=True)
    train(*cut, "--ds_config", CONFIGS / "zero0.json", timeout=300)
    found, expected = ([row["loss"] for row in rows(tmp_path / d)] for d in ("cut", "uncut"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_batch_equals_batches_of_one_on_the_device(kind, injection, batch):
    model = make_vae(kind, injection=injection).cuda()
    ids, mask, labels = (t.cuda() for t in batch)
    together = model(ids, mask, labels=labels)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length], labels=labels[row : row + 1, :length])
        torch.testing.assert_close(
            together.logits[row, :length], alone.logits[0], atol=5e-3, rtol=5e-3
        )


def test_gradient_checkpointing_saves_memory_and_changes_nothing(injection):
    t5 = {
        "vocab_size": 1000,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 8,
        "num_heads": 8,
        "dropout_rate": 0.0,
    }
    model = (
        T5VAE(T5VAEConfig(t5={**t5, "decoder_start_token_id": 0}, injection=injection))
        .cuda()
        .bfloat16()
        .train()
    )
    ids = torch.randint(3, 1000, (64, 64), device="cuda")
    noise = torch.randn(64, 32, device="cuda")
    peaks, losses, gradients = [], [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        out = model(ids, labels=ids, noise=noise)
        loss = (
            torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), ids.flatten())
            + out.posterior.kl(out.prior).mean()
        )
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert peaks[1] < 0.6 * peaks[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-2, rtol=5e-2, msg=name)


def test_a_t5_large_sized_model(tmp_path, cache_dir):
    """770 M parameters less cross-attention, from its configuration: steps in bf16 at
    ZeRO 2, tokens/s printed."""
    config = {
        **TINY,
        "data": {
            **TINY["data"],
            "cache_dir": str(cache_dir),
            "batch_size": 256,
            "micro_batch_tokens": 16384,
        },
        "model": {
            "vocab_size": 516,
            "t5": {
                "d_model": 1024,
                "d_kv": 64,
                "d_ff": 4096,
                "num_layers": 24,
                "num_heads": 16,
                "dropout_rate": 0.1,
            },
        },
        "phase1": {"steps": 5, "lr": 1e-4},
        "phase2": {"steps": 15, "lr": 1e-4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    start = time.monotonic()
    command = (
        "--config",
        tmp_path / "config.yaml",
        "--ds_config",
        CONFIGS / "zero2.json",
        "--output_dir",
        tmp_path / "run",
    )
    train(*command, "--keep_checkpoints", "1", timeout=550)
    speeds = [row["tokens_per_s"] for row in rows(tmp_path / "run")]
    print(
        f"T5-large-sized: {sorted(speeds)[len(speeds) // 2]:.0f} tokens/s, "
        f"{time.monotonic() - start:.0f} s in all"
    )
    assert all(0 < row["loss"] < 500 for row in rows(tmp_path / "run"))
