"""Memory and start time of a rank against the number of training sentences, once the
tokenized corpus is cached.

    python tests/benchmarks/data_scale.py [--sizes 10000 100000 1000000 10000000]
        [--rounds 3] [--tile 1000000] [--data_only] [--directory DIR] [--output results.json]

The sentences are those of the built-in corpus in a text file. Each measurement is the
training command in a process of its own, with the quickstart's model: from the start of
the process to the end of the first optimizer step, in seconds of the clock and of the
processor, and the memory in MiB after `--steps` steps: `peak` is VmHWM and `rss` is VmRSS,
which count the pages of mapped files, and `anonymous` is RssAnon, which does not: the
system can take those pages back at any time. The sizes are interleaved.

With `--data_only` the process does only what a rank does with the corpus, and no model is
made: it looks whether the sentences are those of the cache, opens them, and draws the
batches of `--steps` steps. The seconds are then those of this part up to the first batch,
without the imports.

A corpus of more than `--tile` sentences has the columns of the first `--tile` ones, over
and over: its file and its cache have the size of real ones, and are made in less time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import command
import datasets
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from dsvae import config as configuration
from dsvae.data import prepared
from dsvae.data.batches import TrainingBatches, most_micro_batches
from dsvae.data.grammar_variants import write_variant
from dsvae.data.records import BATCH_ROWS
from dsvae.data.sources import source_of
from dsvae.files import write_json

VALUES = ("seconds", "processor", "peak", "rss", "anonymous")


def flags(directory: Path, size: int) -> list[str]:
    """The training command's flags for a corpus."""
    return [
        *("--train_file", str(directory / f"{size}.txt")),
        *("--data.cache_dir", str(directory / "cache")),
        *("--ds_config", str(Path(__file__).parents[2] / "ds_configs" / "zero2.json")),
    ]


def prepare(directory: Path, size: int) -> Path:
    """The cache entry of a corpus, as the training command finds or makes it."""
    config = configuration.read(flags(directory, size))
    return prepared.prepare(
        config.data, tokenizer=None, vocab_size=config.model.vocab_size, seed=config.seed
    )


def prepare_tiled(directory: Path, size: int, tile: int) -> None:
    """A cache entry with the columns of a smaller one, `size` / `tile` times."""
    source = prepare(directory, tile)

    def fill(target: Path, *_: object) -> None:
        shutil.copytree(
            source,
            target,
            dirs_exist_ok=True,
            ignore=lambda folder, _: ["train.arrow"] if Path(folder) == source else [],
        )
        report = json.loads((source / "report.json").read_text())
        figures, times = report["splits"]["train"], size // tile
        train = datasets.Dataset.from_file(str(source / "train.arrow"))
        with ArrowWriter(
            path=str(target / "train.arrow"),
            features=train.features,
            writer_batch_size=BATCH_ROWS,
        ) as writer:
            for _ in range(times):
                for batch in train.data.table.to_batches():
                    writer.write_table(pa.Table.from_batches([batch]))
            writer.finalize()
        for name in ("sentences", "tokens"):
            figures[name] *= times
        report["row_lengths"] = {
            reads: [lengths, [count * times for count in counts]]
            for reads, (lengths, counts) in report["row_lengths"].items()
        }
        write_json(target / "report.json", report)

    original, prepared._fill = prepared._fill, fill
    try:
        prepare(directory, size)
    finally:
        prepared._fill = original


def memory() -> dict[str, float]:
    """The memory of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    found = {}
    for name, line in (("peak", "VmHWM"), ("rss", "VmRSS"), ("anonymous", "RssAnon")):
        found[name] = int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) / 1024
    return found


def data_alone(result: str, steps: str, *words: str) -> None:
    """What a rank does with the corpus until its step number `steps`."""
    config = configuration.read(words)
    config.data.batch_size = 128
    configuration.choose_micro_batches(config, "cpu")
    start, processor = time.perf_counter(), time.process_time()
    path = prepared.prepare(
        config.data,
        tokenizer=None,
        vocab_size=config.model.vocab_size,
        seed=config.seed,
        corpus=source_of(config.data).identity(config.seed),
    )
    data = prepared.load_prepared(path)
    budget = config.data.micro_batch_tokens
    most_micro_batches(data.longest("both", 128), 128, 1, budget)
    batches = TrainingBatches(
        data.splits["train"],
        batch_size=128,
        token_budget=budget,
        noise_width=32,
        deletion=0.0,
        seed=0,
        rank=0,
        world_size=1,
        pad_id=0,
    )
    batches.step(0)
    found = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
    }
    for index in range(1, int(steps)):
        batches.step(index)
    Path(result).write_text(json.dumps(found | memory()))


def worker(result: str, steps: str, *words: str) -> None:
    """The training command until its step number `steps`."""
    from dsvae import train
    from dsvae.engine.engine import PhaseEngine

    train_step, found, done = PhaseEngine.train_step, {}, 0

    def observed(self, *given):
        nonlocal done
        sums = train_step(self, *given)
        done += 1
        if done == 1:
            ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
            uptime = float(Path("/proc/uptime").read_text().split()[0])
            found["seconds"] = uptime - ticks / 100
            found["processor"] = time.process_time()
        if done == int(steps):
            Path(result).write_text(json.dumps(found | memory()))
            os._exit(0)
        return sums

    PhaseEngine.train_step = observed
    sys.exit(train.main(list(words)))


def measure(args: argparse.Namespace) -> command.Results:
    directory = Path(args.directory or tempfile.mkdtemp()).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    sizes = sorted(args.sizes)
    largest = directory / f"{sizes[-1]}.txt"
    if not largest.is_file():
        write_variant(largest, "plain", sizes[-1], 0)
    for size in {*sizes, args.tile} - {sizes[-1]}:
        with largest.open() as lines, (directory / f"{size}.txt").open("w") as out:
            out.writelines(islice(lines, size))
    for size in sizes:
        prepare_tiled(directory, size, args.tile) if size > args.tile else prepare(directory, size)
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(args.rounds):
        for size in sizes:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "found.json"
                options = [*flags(directory, size), "--output_dir", f"{scratch}/run"]
                kind = "--data_worker" if args.data_only else "--worker"
                words = [kind, str(out), str(args.steps), *options, "--eval_every", "0"]
                subprocess.run(
                    [sys.executable, __file__, *words], stdout=subprocess.DEVNULL, check=False
                )
                found[size].append(json.loads(out.read_text()))
                print(size, found[size][-1], file=sys.stderr, flush=True)
    return {str(size): values for size, values in found.items()}


def report(results: command.Results) -> str:
    lines = ["| sentences | " + " | ".join(VALUES) + " |", "|" + "---|" * (len(VALUES) + 1)]
    smallest = next(iter(results.values()))
    for size, runs in results.items():
        cells = []
        for name in VALUES:
            value = statistics.median(run[name] for run in runs)
            ratio = statistics.median(
                run[name] / base[name] for run, base in zip(runs, smallest, strict=True)
            )
            cells.append(
                f"{value:,.3g} ({ratio:.3f})" if value < 100 else f"{value:,.0f} ({ratio:.3f})"
            )
        lines.append(f"| {int(size):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--tile", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data_only", action="store_true")
    parser.add_argument("--directory")
    parser.add_argument("--output")
    args = parser.parse_args()
    command.run(parser, args, measure, report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    elif sys.argv[1:2] == ["--data_worker"]:
        data_alone(*sys.argv[2:])
    else:
        main()
