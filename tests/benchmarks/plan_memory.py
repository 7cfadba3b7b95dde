"""Plan against measurement: peaks of real ranks on CPU, training a T5 from its
configuration, beside what `dsvae plan` counts.

    python tests/benchmarks/plan_memory.py [--only NAME,...] [--small]

Measured twice for rank 0 over three optimizer steps: live bytes of tensors, counted by
operator (what a GPU's allocator would be asked for), and resident memory (VmHWM) less
what the process had before it built the model. On CPU host and "GPU" are one memory, so
the plan's two sums are added, and attention is torch's composite.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from launch import CONFIGS, environment, free_port

T5 = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "dropout_rate": 0.1,
    "vocab_size": 32128,
}
SMALL = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.1,
    "vocab_size": 4000,
}
# the default of 5e8 elements is more than the model: it would hide the rest
BUCKETS = {"reduce_bucket_size": 10_000_000}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "zero0 fp32": {"config": "zero0", "precision": "fp32", "ranks": 2},
    "zero0 bf16 (autocast), one rank": {"config": "zero0", "precision": "bf16", "ranks": 1},
    "zero1 bf16": {"config": "zero1", "precision": "bf16", "ranks": 2},
    "zero2 bf16": {"config": "zero2", "precision": "bf16", "ranks": 2},
    "zero2 bf16, checkpointing": {
        "config": "zero2",
        "precision": "bf16",
        "ranks": 2,
        "checkpointing": True,
    },
    "zero2 fp32, frozen decoder": {
        "config": "zero2",
        "precision": "fp32",
        "ranks": 2,
        "freeze": True,
    },
    "zero2 bf16, two micro-batches, one rank": {
        "config": "zero2",
        "precision": "bf16",
        "ranks": 1,
        "micro_batches": 2,
    },
    "zero2_offload bf16": {"config": "zero2_offload", "precision": "bf16", "ranks": 2},
    "zero3 bf16": {"config": "zero3", "precision": "bf16", "ranks": 2},
    "zero3 fp32, checkpointing": {
        "config": "zero3",
        "precision": "fp32",
        "ranks": 2,
        "checkpointing": True,
    },
    "zero3_offload bf16": {"config": "zero3_offload", "precision": "bf16", "ranks": 2},
}


def resolved(job: dict[str, Any]) -> dict[str, Any]:
    """The job's DeepSpeed configuration as a run would resolve it."""
    from dsvae.config import PhaseConfig
    from dsvae.engine import ds_config

    raw = ds_config.load(CONFIGS / f"{job['config']}.json")
    if raw["zero_optimization"]["stage"] in (1, 2):
        raw["zero_optimization"] |= BUCKETS
    raw["zero_optimization"] |= job.get("zero", {})
    micro = job.get("micro_batches", 1)
    return ds_config.resolve(
        raw,
        phase=PhaseConfig(),
        precision=job["precision"],
        batch_size=job["rows"] * job["ranks"] * micro,
        micro_batches=micro,
        world_size=job["ranks"],
        bf16_supported=True,
        fp16_supported=False,
    )


def planned(job: dict[str, Any]) -> int:
    """Bytes of one rank at its peak: its own and its share of the host's."""
    import torch

    from dsvae.modeling.t5_vae import T5VAEConfig
    from dsvae.planning import memory
    from dsvae.planning.dry_run import build, dry_run, weights_of

    engine = memory.Engine.of(resolved(job))
    config = T5VAEConfig(t5=job["t5"], latent_dim=32)
    freeze = job.get("freeze", False)
    run = dry_run(
        config,
        rows=job["rows"],
        tokens=job["tokens"],
        evaluation_rows=0,
        dtype=torch.float32 if engine.compute == 4 else torch.bfloat16,
        autocast=torch.bfloat16 if engine.autocast else None,
        gradient_checkpointing=job.get("checkpointing", False),
        freeze_decoder=freeze,
        fused_attention=False,
    )
    ranks = memory.Ranks(job["ranks"], job["ranks"])
    weights, several = weights_of(build(config, freeze)), job.get("micro_batches", 1) > 1
    needs = memory.estimate(engine, weights, run, ranks, accumulates=several)
    return needs.gpu_peak + sum(needs.host.values()) // job["ranks"]


class Pieces:
    """What building a model asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def work(job: dict[str, Any]) -> None:
    """One rank: trains three steps and prints what it held."""
    import numpy as np
    import torch
    from deepspeed.utils import logger

    from dsvae.config import ModelConfig, Phase1Config, RunConfig
    from dsvae.data.batches import MicroBatch, Step
    from dsvae.engine.build import build_model
    from dsvae.engine.engine import PhaseEngine
    from dsvae.engine.process_group import lend_to_deepspeed
    from dsvae.objective.elbo import Penalty
    from dsvae.parallel.world import join, leave
    from dsvae.phases import Phase
    from dsvae.planning.dry_run import LiveBytes

    logger.setLevel("ERROR")
    world = join()
    lend_to_deepspeed(world)
    rows, tokens = job["rows"], job["tokens"]
    before = _resident("VmRSS")
    live = LiveBytes()

    def micro_batch() -> MicroBatch:
        ids = torch.randint(3, job["t5"]["vocab_size"], (rows, tokens))
        ids[-1, tokens // 2 :] = 0
        return MicroBatch(
            ids,
            (ids != 0).long(),
            ids.masked_fill(ids == 0, -100),
            torch.randn(rows, 1, 32),
            torch.ones(rows),
            np.arange(rows),
        )

    count = job.get("micro_batches", 1)
    with live:
        settings = ModelConfig(
            t5=job["t5"], latent_dim=32, gradient_checkpointing=job.get("checkpointing", False)
        )
        frozen = Phase1Config(freeze_decoder=job.get("freeze", False))
        config = RunConfig(model=settings, phase1=frozen)
        model, origin = build_model(
            settings, Pieces(job["t5"]["vocab_size"]), None, 0, world, resolved(job)
        )  # type: ignore[arg-type]
        engine = PhaseEngine(
            model,
            world,
            Phase(1, config, 0),
            resolved(job),
            origin=origin,
        )
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        live.restart()
        for index in range(3):
            step = Step([micro_batch() for _ in range(count)], rows * world.size * count, 1)
            engine.train_step(index, step, Penalty(1.0))
        peak = live.restart()
    if world.is_main:
        print(json.dumps({"live": peak, "resident": _resident("VmHWM") - before}))
    leave(world)


def _resident(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measure(job: dict[str, Any], timeout: float = 150) -> dict[str, int]:
    """Rank 0's peaks in bytes: live, resident."""
    port = str(free_port())
    # Freed blocks go back to the system at once: resident memory then follows the live
    # tensors.
    malloc = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank_of", json.dumps(job)],
                env=environment(
                    RANK=str(r),
                    LOCAL_RANK=str(r),
                    WORLD_SIZE=str(job["ranks"]),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                    **malloc,
                ),
                stdout=output if r == 0 else subprocess.DEVNULL,
                stderr=errors,
            )
            for r in range(job["ranks"])
        ]
        try:
            codes = [process.wait(timeout) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        output.seek(0)
        errors.seek(0)
        assert not any(codes), errors.read()[-3000:]
        return json.loads(output.read().strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rank_of")
    args = parser.parse_args()
    if args.rank_of:
        from dsvae.train import end_process

        work(json.loads(args.rank_of))
        end_process(0)
    shape = (
        {"t5": SMALL, "rows": 4, "tokens": 32}
        if args.small
        else {"t5": T5, "rows": 16, "tokens": 64}
    )
    print(
        "| combination | planned MB | live tensors MB | plan / live | resident MB | plan / "
        "resident |\n|---|---|---|---|---|---|"
    )
    for name, chosen in COMBINATIONS.items():
        if args.only and name not in args.only.split(";"):
            continue
        job = {
            **chosen,
            **shape,
            "t5": {"model_type": "t5", "decoder_start_token_id": 0, **shape["t5"]},
        }
        plan, measured = planned(job), measure(job)
        live, resident = measured["live"], measured["resident"]
        cells = (name, f"{plan / 1e6:.0f}", f"{live / 1e6:.0f}", f"{plan / live:.3f}")
        print(
            "|",
            " | ".join((*cells, f"{resident / 1e6:.0f}", f"{plan / resident:.3f}")),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
