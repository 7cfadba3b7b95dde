"""What a GPU makes of T5s of the published sizes: tokens/s, MFU and peak memory, beside a
bare torch loop, transformers' Trainer and what `dsvae plan` predicts.

    python tests/benchmarks/gpu.py [--output gpu.json] [--minutes 9] [--only WORD,...]
    python tests/benchmarks/gpu.py --table gpu.json
    python tests/benchmarks/gpu.py --small        (tiny shapes, to see that it works)

Models come from their configurations, with random weights and random sentences of 8 to 64
tokens: nothing is downloaded. (The Trainer's cases need `pip install accelerate`.) Each
case is a process of its own with a limit of time. The file is written after every case,
also after one that failed, and the cases that matter most come first. While one case is
measured, the next one imports its libraries and makes its plan.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from launch import environment

Case = dict[str, Any]
WARM_UP, STEPS, SECONDS = 2, 10, 20.0
"""Steps of a case, and about how long they may take."""
SLOW = 100.0
"""Seconds for a case that compiles or is large; others get 60."""

SIZES: dict[str, Case] = {
    "base": {"model": "t5-base"},
    "large": {"model": "t5-large", "batch_size": 256, "micro_batch_tokens": 8192},
    "3b": {
        "model": "t5-3b",
        "batch_size": 256,
        "micro_batch_tokens": 8192,
        "gradient_checkpointing": True,
    },
    "11b": {
        "model": "t5-11b",
        "batch_size": 128,
        "micro_batch_tokens": 8192,
        "gradient_checkpointing": True,
        "lora": 8,
    },
    "small": {"model": "small", "batch_size": 16, "micro_batch_tokens": 256, "max_tokens": 24},
}
SMALL = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
SMALL |= {"num_heads": 2, "vocab_size": 100, "dropout_rate": 0.1, "decoder_start_token_id": 0}

ORDER = """
base dsvae zero1 bf16
base bare bf16
base trainer bf16
base dsvae zero1 bf16 compile
large dsvae zero2 bf16
large bare bf16
large trainer bf16
large dsvae zero2 bf16 compile
3b dsvae zero2 bf16
11b dsvae zero2 bf16
base trainer_grouped bf16
base dsvae fp16 fp16
base trainer fp16
3b dsvae zero2 bf16 compile
3b bare bf16
large dsvae fp16 fp16
base dsvae zero0 bf16
base dsvae zero2 bf16
3b dsvae zero2_offload bf16
base dsvae zero3 bf16
large dsvae zero0 bf16
large dsvae zero1 bf16
large dsvae zero3 bf16
3b dsvae zero3_offload bf16
base trainer bf16 compile
"""
SMALL_ORDER = """
small dsvae zero1 bf16
small bare bf16
small trainer bf16
small trainer_grouped fp32
small dsvae fp16 fp16
small dsvae zero0 fp32 compile
"""


def cases(order: str, only: list[str]) -> list[Case]:
    """The cases of an order whose words include all of `only`."""
    found = []
    for line in order.strip().splitlines():
        words = line.split()
        if set(only) <= set(words):
            size, side, *rest = words
            shared = {"name": line, "side": side, "compile": "compile" in words}
            if side == "dsvae":
                shared["ds_config"], *rest = rest
            found.append({**SIZES[size], **shared, "precision": rest[0]})
    return found


def measure(case: Case, ready: Any = lambda: None) -> dict[str, Any]:
    """The figures of a case. `ready` returns when the device is free."""
    import torch
    from benchmarks.sides import make_side, random_split
    from deepspeed.utils import logger

    from dsvae import T5VAE
    from dsvae.engine.process_group import lend_to_deepspeed
    from dsvae.metrics.throughput import ModelFlops, peak_flops, peak_memory
    from dsvae.parallel.world import join, leave

    logger.setLevel("ERROR")
    job = job_of(case)
    split = random_split(job, 8 * job.batch_size)
    planned = plan_of(job) if job.side == "dsvae" else None
    ready()
    world = join()
    lend_to_deepspeed(world)
    torch.manual_seed(0)
    with torch.device(world.device):  # a large model takes minutes on CPU
        model = T5VAE(job.model())
    parameters = sum(p.numel() for p in model.parameters())
    side = make_side(job, model, split, world)
    flops = ModelFlops.of(model)
    start = time.monotonic()
    side(0, 1)
    first = time.monotonic() - start
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tokens, seconds, _ = side(1, WARM_UP)
    steps = max(2, min(STEPS, int(SECONDS * WARM_UP / seconds)))
    tokens, seconds, skipped = side(1 + WARM_UP, steps)
    peak = peak_flops(job.precision)
    rate = flops_per_token(flops, split, job) * tokens / seconds
    figures = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "parameters": parameters,
        "tokens_per_s": tokens / seconds,
        "flops_per_s": rate,
        "mfu": None if peak is None else rate / peak,
        "peak_gb": peak_memory() / 1e9,
        "planned_gb": None if planned is None else planned / 1e9,
        "first_step_s": first,
        "steps": steps,
        "skipped_steps": skipped,
        "graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
    }
    leave(world)
    return figures


def job_of(case: Case) -> Any:
    from benchmarks.sides import Job

    from dsvae.planning.sizes import configuration_of

    t5 = SMALL if case["model"] == "small" else configuration_of(case["model"])
    fields = {field.name for field in dataclasses.fields(Job)}
    return Job(t5=t5, **{name: value for name, value in case.items() if name in fields})


def flops_per_token(flops: Any, split: Any, job: Any) -> float:
    """The mean over a few steps; no side's steps differ from the others' in more than which
    sentences they have."""
    from benchmarks.sides import training_batches

    steps = [training_batches(job, split).step(index) for index in range(4)]
    total = sum(flops.count(batch) for step in steps for batch in step.micro_batches)
    return total / sum(step.tokens for step in steps)


def plan_of(job: Any) -> int:
    """Bytes at the peak of training, by `dsvae plan`'s sums."""
    import torch

    from dsvae.planning import memory
    from dsvae.planning.dry_run import build, dry_run, weights_of

    engine = memory.Engine.of(job.resolved())
    low = torch.float16 if job.precision == "fp16" else torch.bfloat16
    run = dry_run(
        job.model(),
        rows=job.rows,
        tokens=job.max_tokens,
        evaluation_rows=0,
        dtype=torch.float32 if engine.compute == 4 else low,
        autocast=low if engine.autocast else None,
        gradient_checkpointing=job.gradient_checkpointing,
        freeze_decoder=False,
        fused_attention=torch.cuda.is_available(),
    )
    ranks = memory.Ranks(1, 1)
    several = job.micro_batches > 1
    needs = memory.estimate(
        engine, weights_of(build(job.model(), False)), run, ranks, accumulates=several
    )
    return needs.gpu_peak


class Worker:
    """The process of a case. It is started while the one before is measured."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--case", json.dumps(case)],
            env=environment(
                PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
                OMP_NUM_THREADS=str(
                    max(1, (os.cpu_count() or 1) // 2)
                ),  # AdamW of offloaded states
            ),
            start_new_session=True,  # what compiles belongs to it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self, limit: float) -> dict[str, Any]:
        """The figures, or why there are none. The process has ended then."""
        try:
            output, _ = self.process.communicate("go\n", timeout=limit)
        except subprocess.TimeoutExpired:
            self.end()
            return {"error": f"not done within {limit:.0f} s"}
        for line in reversed(output.splitlines()):  # libraries may print after the figures
            with contextlib.suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    return found
        tail = " ".join(output.split())[-600:]
        return {"error": f"exit code {self.process.returncode}: {tail}"}

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def work(case: Case) -> None:
    """A worker: waits for its turn, prints the figures and ends."""
    from dsvae.failures import end_process

    figures = measure(case, ready=lambda: sys.stdin.readline() or sys.exit("not wanted"))
    print(json.dumps(figures), flush=True)
    end_process(0)


def run(chosen: list[Case], minutes: float, output: Path, patience: float = 1.0) -> None:
    """All cases within the time. The file has every case, each as soon as it is done.

    Args:
        patience: multiplies the limits of the cases, for a slow machine.
    """
    end = time.monotonic() + 60 * minutes
    packages = ("torch", "transformers", "deepspeed")
    found: dict[str, Any] = {"versions": {name: version(name) for name in packages}, "cases": []}
    waiting = [*chosen]

    def start() -> Worker | None:
        in_time = waiting and time.monotonic() < end
        return Worker(waiting.pop(0)) if in_time else None

    following = start()
    while following is not None:
        worker, following = following, start()
        begun = time.monotonic()
        large = worker.case["compile"] or worker.case["model"] in ("t5-3b", "t5-11b")
        result = worker.result(max(0.0, min(patience * (SLOW if large else 60.0), end - begun)))
        result["seconds"] = time.monotonic() - begun
        found["cases"].append({**worker.case, **result})
        output.write_text(json.dumps(found, indent=1) + "\n")
        shown = result.get("error") or f"{result['tokens_per_s']:,.0f} tokens/s"
        print(f"{worker.case['name']}: {shown[:150]} ({result['seconds']:.0f} s)", flush=True)
    found["cases"] += [{**case, "error": "no time left"} for case in waiting]
    output.write_text(json.dumps(found, indent=1) + "\n")


def table(path: Path) -> str:
    """The file as docs/results/speed.md has it. Ratios are to dsvae's first eager case of
    the same model and precision."""
    from dsvae.reports.table import markdown

    found = json.loads(path.read_text())
    reference: dict[tuple[str, str], float] = {}
    columns: dict[str, list[str]] = {}
    for case in found["cases"]:
        rate, key = case.get("tokens_per_s"), (case["model"], case["precision"])
        if rate and case["side"] == "dsvae" and not case["compile"]:
            reference.setdefault(key, rate)
        ratio = rate / reference[key] if rate and key in reference else None
        row = {
            "case": case["name"],
            "tokens/s": f"{rate:,.0f}" if rate else case.get("error", "")[:60],
            "of dsvae, eager": f"{ratio:.2f}" if ratio else "",
            "MFU": f"{case['mfu']:.1%}" if case.get("mfu") else "",
            "peak GB": f"{case['peak_gb']:.1f}" if rate else "",
            "planned GB": f"{case['planned_gb']:.1f}" if case.get("planned_gb") else "",
            "skipped": str(case.get("skipped_steps") or ""),
            "first step, s": f"{case['first_step_s']:.0f}" if rate else "",
        }
        for heading, cell in row.items():
            columns.setdefault(heading, []).append(cell)
    devices = {case["device"] for case in found["cases"] if "device" in case}
    versions = (f"{name} {number}" for name, number in found["versions"].items())
    title = ", ".join((*sorted(devices), *versions))
    return f"{title}\n\n{markdown(columns, set(columns) - {'case'})}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="words that the cases must have")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        work(json.loads(args.case))
    if args.table is None:
        chosen = cases(SMALL_ORDER if args.small else ORDER, args.only.replace(",", " ").split())
        run(chosen, args.minutes, args.output)
    print(table(args.table or args.output))


if __name__ == "__main__":
    main()
