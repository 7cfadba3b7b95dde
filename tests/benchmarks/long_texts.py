"""Memory and time per token of training on texts of 64, 128, 256 and 512 tokens, with and
without gradient checkpointing, as the recipe `paragraphs` does it.

    python tests/benchmarks/long_texts.py --model T5_DIRECTORY --texts FILE
        [--lengths 64 128 256 512] [--tokens 4096] [--steps 3] [--output results.json]

The texts are the lines of FILE, joined and cut to exactly that many tokens, EOS included.
There is one vector of z per 4 tokens. Each case is a process of its own, with one thread,
and takes `--steps` steps of `--tokens` tokens in float32: forward, backward, AdamW.

`seconds` are those of the processor and not of the clock, so that other work on the machine
hardly matters: per 1,000 tokens of text, each of which the encoder reads and the decoder
predicts. The first step warms up and is not counted. `peak` is the largest resident memory
of the process (VmHWM) in MiB, and `activations` is by how much it exceeds what the process
has between two steps: weights, moments, libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import command
from benchmarks.memory import peak_mib

from dsvae import T5VAE
from dsvae.config import RECIPES, load_tree

CASES = (False, True)


def joined(lines: Iterator[list[int]], length: int, count: int, eos: int) -> torch.Tensor:
    """`count` texts of `length` tokens, (count, length), of lines without their EOS."""
    rows, row = [], []
    for line in lines:
        row += line
        if len(row) >= length - 1:
            rows.append([*row[: length - 1], eos])
            row = []
        if len(rows) == count:
            return torch.tensor(rows)
    raise SystemExit(f"--texts has only {len(rows)} texts of {length} tokens: {count} are needed")


def worker(model: str, texts: str, length: int, tokens: int, steps: int, saving: bool) -> dict:
    """Measures one case in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    latent = load_tree(str(RECIPES / "paragraphs.yaml"))["model"]
    latent = {name: latent[name] for name in ("latent_dim", "pooling", "chunk", "injection")}
    latent["latent_vectors"] = -(-length // latent["chunk"])
    vae = T5VAE.from_t5(model, dropout_rate=0.0, dtype=torch.float32, **latent).train()
    if saving:
        vae.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, fused=True)
    with Path(texts).open(encoding="utf-8") as lines:
        ids = (tokenizer(line.strip(), add_special_tokens=False).input_ids for line in lines)
        rows = tokens // length
        data = joined(ids, length, rows * (steps + 1), tokenizer.eos_token_id)
    seconds = 0.0
    for step, batch in enumerate(data.split(rows)):
        start = time.process_time()
        noise = torch.randn(rows, vae.family.noise_width)
        out = vae(batch, labels=batch, sentence_weights=torch.ones(rows), noise=noise)
        loss = out.weighted_nats + 1e-3 * out.posterior.kl(out.prior).sum()
        (loss / rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        del out, loss
        seconds += (time.process_time() - start) if step else 0.0
    peak = peak_mib(os.getpid())
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "length": length,
        "checkpointing": saving,
        "seconds": 1000 * seconds / (steps * rows * length),
        "peak": peak,
        "activations": peak - resident / 2**20,
    }


def measure(args: argparse.Namespace) -> command.Results:
    cases = []
    for length in args.lengths:
        for saving in CASES:
            given = [args.model, args.texts, length, args.tokens, args.steps, saving]
            words = [sys.executable, __file__, "--worker", json.dumps(given)]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
            cases.append(json.loads(done.stdout.splitlines()[-1]))
            print(cases[-1], file=sys.stderr, flush=True)
    return {"cases": cases}


def report(results: command.Results) -> str:
    lines = [
        "| tokens of a text | checkpointing | seconds per 1,000 tokens | peak | activations |",
        "|" + "---|" * 5,
    ]
    for case in results["cases"]:
        saving = "yes" if case["checkpointing"] else "no"
        lines.append(
            f"| {case['length']} | {saving} | {case['seconds']:.2f} | {case['peak']:,.0f} MiB "
            f"| {case['activations']:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output")
    args = parser.parse_args()
    command.run(parser, args, measure, report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*json.loads(sys.argv[2]))))
    else:
        main()
