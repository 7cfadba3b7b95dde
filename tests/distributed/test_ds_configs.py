"""Shipped ds_configs that no other test trains in bf16 with the real command: on two
ranks; if the machine cannot, it says so in one line."""

import os
import shutil

import pytest
import torch
from launch import CONFIGS, rows, train

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))


def run(name, tiny, tmp_path, *more, **options):
    return train(
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / f"{name}.json",
        "--output_dir",
        tmp_path / "run",
        "--phase1.steps",
        "2",
        "--phase2.steps",
        "2",
        "--phase1.freeze_decoder",
        *more,
        ranks=2,
        **options,
    )


def test_the_shipped_ones_are_those_of_the_design():
    assert set(SHIPPED) == {
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
        "zero3_nvme",
        "fp16",
    }


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_trains_as_shipped(name, tiny, tmp_path):
    run(name, tiny, tmp_path, "--precision", "bf16")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 4
    assert all(0 < loss < 200 for loss in losses)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests train with fp16")
def test_fp16_on_cpu_is_one_clear_line(tiny, tmp_path):
    refused = run("fp16", tiny, tmp_path, code=2)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("dsvae: error:")]
    assert "fp16 needs a GPU" in line


@pytest.mark.timeout(1500)
def test_nvme_trains_as_shipped(tiny, tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip(
            "NVMe offload needs libaio's headers and a C++ compiler (apt-get install libaio-dev "
            "g++)"
        )
    if not os.access("/", os.W_OK):
        pytest.skip("the shipped nvme_path is /local_nvme, and this user cannot make it")
    existed = os.path.isdir("/local_nvme")
    os.makedirs("/local_nvme", exist_ok=True)
    try:
        # the first use compiles DeepSpeed's I/O: minutes
        run("zero3_nvme", tiny, tmp_path, timeout=1400)
    finally:
        if not existed:
            shutil.rmtree("/local_nvme")
    assert all(0 < row["loss"] < 200 for row in rows(tmp_path / "run"))
