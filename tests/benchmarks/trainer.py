"""Tokens/s of dsvae beside the Trainer of transformers, with the same model, loss and
number of sentences per step.

    python tests/benchmarks/trainer.py [--train_file FILE] [--precision bf16]
        [--sides dsvae,dsvae_packed,dsvae_compiled,trainer,trainer_grouped,bare]
        [--blocks 5] [--steps 10] [--profile]

The Trainer needs `pip install accelerate`. One rank, one thread. The sides take turns, a
block of steps each, and seconds are those of CPU time. A ratio is the median over the
blocks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import command
from benchmarks.sides import Job, make_side

from dsvae import T5VAE
from dsvae.config import DataConfig
from dsvae.data.prepared import load_prepared, prepare
from dsvae.engine.process_group import lend_to_deepspeed
from dsvae.parallel.world import join, leave
from dsvae.reports.table import markdown

T5 = {"model_type": "t5", "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2}
T5 |= {"num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
"""As the recipe speculative."""


def measure(args: argparse.Namespace) -> command.Results:
    """The tokens per second of each side in each block, and their ratios to dsvae's."""
    world = join()
    lend_to_deepspeed(world)
    with tempfile.TemporaryDirectory() as cache:
        data = DataConfig(train_file=args.train_file, max_tokens=32, cache_dir=cache)
        prepared = load_prepared(prepare(data, tokenizer=None, vocab_size=4256, seed=0))
        split = prepared.splits["train"]
        t5 = {**T5, "vocab_size": len(prepared.tokenizer)}
        sides = {}
        for name in args.sides.split(","):
            side = name.removesuffix("_compiled").removesuffix("_packed")
            packing = "_packed" in name
            cut = side == "dsvae" and not packing
            job = Job(
                t5,
                side=side,
                precision=args.precision,
                ds_config=args.ds_config,
                compile=name.endswith("_compiled"),
                packing=packing,
                batch_size=128,
                # The others' batch goes through at once, as a user would have it.
                micro_batch_tokens=args.micro_batch_tokens if cut else 128 * 32,
                max_tokens=32,
            )
            torch.manual_seed(0)
            sides[name] = make_side(job, T5VAE(job.model()), split, world)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for block in range(-1, args.blocks):
            for name in sorted(sides, reverse=block % 2 == 1):
                tokens, seconds, _ = sides[name]((block + 1) * args.steps, args.steps)
                if block >= 0:  # the first one warms up
                    rates[name].append(tokens / seconds)
            print(f"block {block + 1} of {args.blocks}", file=sys.stderr, flush=True)
        if args.profile:
            _profile(sides[args.profile], args.steps)
    leave(world)
    first = next(iter(sides))
    return {
        "tokens_per_s": rates,
        f"{first} / side": {
            name: [a / b for a, b in zip(rates[first], each, strict=True)]
            for name, each in rates.items()
        },
    }


def _profile(side: Any, steps: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        side(10**6, steps)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def report(results: command.Results) -> str:
    first, ratios = list(results.items())[1]
    columns: dict[str, list[str]] = {"side": [], "tokens/s": [], first: []}
    for name, each in ratios.items():
        columns["side"].append(name)
        columns["tokens/s"].append(f"{statistics.median(results['tokens_per_s'][name]):,.0f}")
        spread = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
        columns[first].append(spread)
    return markdown(columns, {"tokens/s", first})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train_file")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ds_config", default="zero1")
    parser.add_argument("--sides", default="dsvae,dsvae_compiled,trainer,trainer_grouped,bare")
    parser.add_argument("--micro_batch_tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--profile", help="also the profile of this side")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    command.run(parser, args, measure, report)


if __name__ == "__main__":
    main()
