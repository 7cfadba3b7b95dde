"""Tokens/s of the engine against a bare loop, and of token-budget batches against
padding to 256: ratios from one run.

    python tests/benchmarks/throughput.py --size small --train_file FILE
        [--configs zero0,zero1,zero2] [--precision fp32]
    python tests/benchmarks/throughput.py --padding --train_file FILE

One rank. The two sides take turns, a block of steps each, and the ratio is the median
over the blocks: what else the machine does then hits both. Without --train_file the
built-in corpus is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
SIZES = {
    # as the recipe speculative
    "small": {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
    # t5-small
    "60m": {
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "dropout_rate": 0.0,
    },
}
VOCABULARY = {"small": None, "60m": 32128}  # None: that of the tokenizer


def prepare_split(train_file: str | None):
    from dsvae.config import DataConfig
    from dsvae.data.prepared import load_prepared, prepare

    cache = tempfile.mkdtemp()
    data = DataConfig(train_file=train_file, max_tokens=32, cache_dir=cache)
    return load_prepared(prepare(data, tokenizer=None, vocab_size=4256, seed=0))


def make_model(size: str, vocab_size: int):
    from dsvae import T5VAE, T5VAEConfig

    torch.manual_seed(0)
    t5 = {**SIZES[size], "vocab_size": VOCABULARY[size] or vocab_size, "decoder_start_token_id": 0}
    return T5VAE(T5VAEConfig(t5=t5, latent_dim=32, injection="memory"))


def bare_step(model, optimizer, step, beta, free_bits, dtype):
    """The same objective in plain torch."""
    from torch.nn import functional as F

    (batch,) = step.micro_batches
    out = model(batch.input_ids, batch.attention_mask, labels=batch.labels, noise=batch.noise[:, 0])
    rec = (
        F.cross_entropy(out.logits.float().flatten(0, 1), batch.labels.flatten(), reduction="sum")
        / step.sentences
    )
    kl = out.posterior.kl(out.prior).mean(0)
    loss = rec + beta * kl.clamp(min=free_bits).sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def engine_ratio(args: argparse.Namespace, data, world) -> None:
    from dsvae.config import Phase2Config, RunConfig
    from dsvae.data.batches import TrainingBatches
    from dsvae.engine import ds_config
    from dsvae.engine.engine import PhaseEngine
    from dsvae.engine.weights import parameter_groups
    from dsvae.objective.elbo import Penalty
    from dsvae.phases import Phase

    phase = Phase2Config(lr=1e-4, free_bits=0.5)
    split = data.splits["train"]
    batches = TrainingBatches(
        split,
        batch_size=args.batch_size,
        token_budget=10**6,
        noise_width=32,
        deletion=0.0,
        seed=0,
        rank=0,
        world_size=1,
        pad_id=0,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    initial = make_model(args.size, len(data.tokenizer))
    print(
        f"{args.size}: {sum(p.numel() for p in initial.parameters()) / 1e6:.1f} M parameters, "
        f"{args.precision}, "
        f"batch {args.batch_size}",
        flush=True,
    )
    for name in args.configs.split(","):
        bare = copy.deepcopy(initial).to(dtype).train()
        optimizer = torch.optim.AdamW(parameter_groups(bare, 0.01), lr=1e-4, fused=True)
        resolved = ds_config.resolve(
            ds_config.load(ROOT / "ds_configs" / f"{name}.json"),
            phase=phase,
            precision=args.precision,
            batch_size=args.batch_size,
            micro_batches=1,
            world_size=1,
            bf16_supported=True,
            fp16_supported=False,
        )
        engine = PhaseEngine(
            copy.deepcopy(initial),
            world,
            Phase(2, RunConfig(phase2=phase), 0),
            resolved,
            origin=None,
        )
        rates: dict[str, list[float]] = {"bare": [], "engine": []}
        index = 0
        for block in range(args.blocks + 1):
            for side in ("bare", "engine") if block % 2 else ("engine", "bare"):
                tokens, start = 0, time.perf_counter()
                for i in range(index, index + args.steps):
                    step = batches.step(i)
                    if side == "bare":
                        bare_step(bare, optimizer, step, 0.5, 0.5, dtype)
                    else:
                        engine.train_step(i, step, Penalty(0.5, 0.5))
                    tokens += step.tokens
                if block:  # the first one warms up
                    rates[side].append(tokens / (time.perf_counter() - start))
            index += args.steps
        ratios = [e / b for e, b in zip(rates["engine"], rates["bare"], strict=True)]
        print(
            json.dumps(
                {
                    "config": name,
                    "ratio": round(statistics.median(ratios), 3),
                    "min": round(min(ratios), 3),
                    "max": round(max(ratios), 3),
                    "engine_tokens_per_s": round(statistics.median(rates["engine"])),
                    "bare_tokens_per_s": round(statistics.median(rates["bare"])),
                }
            ),
            flush=True,
        )
        engine.close()


def padding_ratio(args: argparse.Namespace, data, world) -> None:
    """Sentences/s of the training step: batches cut by tokens sorted inside a step, and
    every sentence padded to 256."""
    from dsvae.data.batches import MicroBatch, TrainingBatches
    from dsvae.engine.weights import parameter_groups

    batches = TrainingBatches(
        data.splits["train"],
        batch_size=args.batch_size,
        token_budget=10**6,
        noise_width=32,
        deletion=0.0,
        seed=0,
        rank=0,
        world_size=1,
        pad_id=0,
    )

    def to_256(step):
        (batch,) = step.micro_batches
        pad = lambda t, value: torch.nn.functional.pad(t, (0, 256 - t.shape[1]), value=value)  # noqa: E731
        return type(step)(
            [
                MicroBatch(
                    pad(batch.input_ids, 0),
                    pad(batch.attention_mask, 0),
                    pad(batch.labels, -100),
                    batch.noise,
                    batch.weight,
                    batch.indices,
                )
            ],
            step.sentences,
            step.tokens,
        )

    model = make_model(args.size, len(data.tokenizer)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-4, fused=True)
    ratios, rates = [], {"buckets": [], "256": []}
    for block in range(args.blocks + 1):
        for side, steps in (("buckets", args.steps), ("256", max(1, args.steps // 8))):
            made = [batches.step(block * args.steps + i) for i in range(steps)]
            made = [to_256(step) for step in made] if side == "256" else made
            start = time.perf_counter()
            for step in made:
                bare_step(model, optimizer, step, 0.5, 0.5, torch.float32)
            if block:
                rates[side].append(
                    sum(step.sentences for step in made) / (time.perf_counter() - start)
                )
        if block:
            ratios.append(rates["buckets"][-1] / rates["256"][-1])
    print(
        json.dumps(
            {
                "padding": "buckets / 256",
                "size": args.size,
                "ratio": round(statistics.median(ratios), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
                "buckets_sentences_per_s": round(float(np.median(rates["buckets"]))),
                "256_sentences_per_s": round(float(np.median(rates["256"])), 1),
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--configs", default="zero0,zero1,zero2,zero3")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--train_file")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument(
        "--padding", action="store_true", help="measure padding instead of the engine"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    from deepspeed.utils import logger

    from dsvae.parallel.world import join, leave

    logger.setLevel("ERROR")
    from dsvae.engine.process_group import lend_to_deepspeed

    world = join()
    lend_to_deepspeed(world)
    data = prepare_split(args.train_file)
    (padding_ratio if args.padding else engine_ratio)(args, data, world)
    leave(world)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
