"""The loss on the vocabulary in pieces, beside torch's loss on all logits: memory and time
of a forward and backward pass of the output projection.

    python tests/benchmarks/vocabulary.py [--tokens 2048] [--memory_tokens 8192]
        [--width 512] [--rounds 5]

Memory is the most that is live beside the weights and the decoder's states: on CPU counted
by operator, on tensors without data, on a GPU by torch's allocator. Time is the least of the
rounds, which alternate between the rows: on CPU that of the process, on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from dsvae.modeling.vocabulary import VocabularyHead
from dsvae.planning.dry_run import LiveBytes
from dsvae.reports.table import markdown

Loss = Callable[[VocabularyHead, Tensor, Tensor], Tensor]


def plain(head: VocabularyHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum over all tokens, by torch."""
    logits = head(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="none").sum()


def pieces(head: VocabularyHead, hidden: Tensor, labels: Tensor) -> Tensor:
    return head(hidden, labels, torch.ones(len(labels), device=labels.device))[1]


LOSSES: dict[str, Loss] = {"all logits": plain, "in pieces": pieces}


def make(
    vocabulary: int, width: int, tokens: int, dtype: torch.dtype, device: str
) -> Callable[[Loss], None]:
    """A step, as a function of the loss."""
    torch.manual_seed(0)
    head = VocabularyHead(width, vocabulary, device=device, dtype=dtype)
    hidden = torch.randn(tokens // 32, 32, width, device=device, dtype=dtype)
    labels = torch.randint(vocabulary, hidden.shape[:2], device=device)

    def step(loss: Loss) -> None:
        head.weight.grad = None
        loss(head, hidden.clone().requires_grad_(), labels).backward()
        head.weight.grad = None

    return step


def peaks(device: str, *shape: Any) -> dict[str, int]:
    """Most live bytes of a step with each loss."""
    found = {}
    live = LiveBytes()
    without_data = FakeTensorMode() if device == "cpu" else nullcontext()
    with without_data:
        step = make(*shape, device)
        for name, loss in LOSSES.items():
            if device == "cpu":
                with live:
                    live.restart()
                    before = live.now
                    step(loss)
                    found[name] = live.restart() - before
            else:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(loss)
                found[name] = torch.cuda.max_memory_allocated() - before
    return found


def times(device: str, rounds: int, *shape: Any) -> dict[str, float]:
    """Least seconds of a step with each loss."""
    step = make(*shape, device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = dict.fromkeys(LOSSES, float("inf"))
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            start = clock()
            step(loss)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the time")
    parser.add_argument("--memory_tokens", type=int, default=8192)
    parser.add_argument("--vocabularies", default="32128,250112")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    columns: dict[str, list[str]] = {}
    for vocabulary in map(int, options.vocabularies.split(",")):
        for dtype in (torch.float32, torch.bfloat16):
            memory = peaks(device, vocabulary, options.width, options.memory_tokens, dtype)
            took = times(device, options.rounds, vocabulary, options.width, options.tokens, dtype)
            most, longest = (each["all logits"] for each in (memory, took))
            for name in LOSSES:
                size, seconds = memory[name], took[name]
                row = {
                    "vocabulary": f"{vocabulary:,}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "loss": name,
                    "MiB": f"{size / 2**20:.0f}",
                    "of all logits": f"{size / most:.2f}",
                    "ms": f"{1000 * seconds:.0f}",
                    "of their time": f"{seconds / longest:.2f}",
                }
                for heading, cell in row.items():
                    columns.setdefault(heading, []).append(cell)
    print(markdown(columns, {"MiB", "of all logits", "ms", "of their time"}))


if __name__ == "__main__":
    main()
