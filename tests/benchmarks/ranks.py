"""Where the time of a training step goes on one rank and on two, on CPU.

    python tests/benchmarks/ranks.py [--train_file FILE] [--ds_config zero1] [--precision bf16]
        [--packing] [--steps 40] [--rounds 3] [--output FILE]

The model, loss and batches are those of trainer.py: 128 sentences per step, which two ranks
divide. Each measurement is a process of its own per rank, on one thread. `alone` is one rank,
`side by side` are two such ranks at once that know nothing of each other, which shows what the
machine has for a second process, and `together` are two ranks of one run. They take turns. The
figures are milliseconds per step by the clock, so nothing else may run: the mean over the
steps, the slowest rank, the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import command
from benchmarks.sides import BETA, Job, training_engine
from benchmarks.trainer import T5

from dsvae import T5VAE
from dsvae.config import DataConfig
from dsvae.data.batches import TrainingBatches
from dsvae.data.prepared import load_prepared, prepare
from dsvae.engine.process_group import lend_to_deepspeed
from dsvae.objective.elbo import Penalty
from dsvae.parallel.world import join, leave
from dsvae.reports.table import markdown

PARTS = ("batches", "forward and backward", "collectives and waiting", "optimizer")
KINDS = {"alone": (1, 1), "side by side": (2, 1), "together": (1, 2)}
"""How many runs there are at once, and the ranks of each."""
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "barrier")
COLLECTIVES += ("reduce_scatter_tensor", "all_gather")


class Clock:
    """Seconds by part; a part that begins inside another one stops the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._close()
        self._open.append(name)
        try:
            yield
        finally:
            self._close()
            self._open.pop()

    def _close(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)


def worker(job: Job, cache: str, steps: int, output: str) -> None:
    """Trains on this rank and writes the milliseconds per step of each part."""
    torch.set_num_threads(1)
    world = join()
    lend_to_deepspeed(world)
    prepared = load_prepared(cache)
    torch.manual_seed(0)
    engine = training_engine(job, T5VAE(job.model()), world)
    batches = TrainingBatches(
        prepared.splits["train"],
        batch_size=job.batch_size,
        token_budget=job.micro_batch_tokens,
        noise_width=32,
        deletion=0.0,
        seed=0,
        rank=world.rank,
        world_size=world.size,
        pad_id=0,
        packing=job.packing,
    )
    clock = Clock()
    for name in COLLECTIVES:
        clock.wrap(dist, name, PARTS[2])
    clock.wrap(dist.Work, "wait", PARTS[2])
    clock.wrap(engine, "_update", PARTS[3])
    passes = 0
    for index in range(-10, steps):
        if index == 0:  # the steps before warm up
            clock.seconds.clear()
            passes = 0
        with clock.part(PARTS[0]):
            step = batches.step(index + 10)
        with clock.part(PARTS[1]):
            engine.train_step(index + 10, step, Penalty(BETA))
        passes += len(step.micro_batches)
    found = {part: 1000 * clock.seconds[part] / steps for part in PARTS}
    found |= {"step": sum(found.values()), "passes": passes / steps}
    Path(f"{output}.{world.rank}").write_text(json.dumps(found))
    leave(world)


def _run(kind: str, args: argparse.Namespace, cache: str) -> dict[str, float]:
    """One measurement: the slowest rank's."""
    runs, ranks = KINDS[kind]
    with tempfile.TemporaryDirectory() as directory:
        started = []
        for run in range(runs):
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            words += [f"--nproc_per_node={ranks}", __file__, "--worker", cache]
            words += ["--worker_output", f"{directory}/{run}", "--steps", str(args.steps)]
            words += ["--ds_config", args.ds_config, "--precision", args.precision]
            words += ["--packing"] * args.packing
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(words, env=environment))
        codes = [process.wait(600) for process in started]
        if any(codes):
            raise SystemExit("a rank failed")
        found = [json.loads(path.read_text()) for path in Path(directory).iterdir()]
    return max(found, key=lambda each: each["step"])


def measure(args: argparse.Namespace) -> command.Results:
    """The figures of each kind, round by round."""
    with tempfile.TemporaryDirectory() as directory:
        data = DataConfig(train_file=args.train_file, max_tokens=32, cache_dir=directory)
        cache = str(prepare(data, tokenizer=None, vocab_size=4256, seed=0))
        found: command.Results = {kind: [] for kind in KINDS}
        for number in range(args.rounds):
            for kind in KINDS:
                found[kind].append(_run(kind, args, cache))
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return found


def report(results: command.Results) -> str:
    columns: dict[str, list[str]] = {"ms per step": [*PARTS, "step", "passes"]}
    for kind, rounds in results.items():
        columns[kind] = [
            f"{statistics.median(each[name] for each in rounds):.1f}"
            for name in columns["ms per step"]
        ]
    return markdown(columns, set(KINDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train_file")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ds_config", default="zero1")
    parser.add_argument("--packing", action="store_true", help="steps without padding")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--worker", metavar="CACHE", help=argparse.SUPPRESS)
    parser.add_argument("--worker_output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        vocab_size = len(load_prepared(args.worker).tokenizer)
        job = Job(
            {**T5, "vocab_size": vocab_size},
            precision=args.precision,
            ds_config=args.ds_config,
            batch_size=128,
            micro_batch_tokens=8192 if args.packing else 1024,
            packing=args.packing,
            max_tokens=32,
        )
        worker(job, args.worker, args.steps, args.worker_output)
    else:
        command.run(parser, args, measure, report)


if __name__ == "__main__":
    main()
