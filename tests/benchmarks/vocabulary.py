"""The loss on the vocabulary in pieces, beside torch's loss on all logits: memory and time
of a forward and backward pass of the output projection.

    python tests/benchmarks/vocabulary.py [--tokens 2048] [--width 512] [--rounds 5]

Memory is the most that is live beside the weights and the decoder's states: on CPU counted
by operator, on a GPU by torch's allocator. Time is the least of the rounds, which alternate
between the rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
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


def peak(step: Callable[[], None], device: str) -> int:
    """Most live bytes of a step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    live = LiveBytes()
    with live:
        live.restart()
        step()
        return live.restart()


def measure(
    vocabulary: int, width: int, tokens: int, dtype: torch.dtype, rounds: int, device: str
) -> dict[str, tuple[int, float]]:
    """(bytes, seconds) of each loss."""
    torch.manual_seed(0)
    head = VocabularyHead(width, vocabulary, device=device, dtype=dtype)
    hidden = torch.randn(tokens // 32, 32, width, device=device, dtype=dtype)
    labels = torch.randint(vocabulary, hidden.shape[:2], device=device)
    losses: dict[str, Loss] = {"all logits": plain, "in pieces": pieces}
    seconds = dict.fromkeys(losses, float("inf"))

    def step(loss: Loss) -> None:
        head.weight.grad = None
        loss(head, hidden.clone().requires_grad_(), labels).backward()

    memory = {name: peak(lambda loss=loss: step(loss), device) for name, loss in losses.items()}
    for _ in range(rounds):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: (memory[name], seconds[name]) for name in losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns: dict[str, list[str]] = {}
    for vocabulary in (32_128, 250_112):
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(
                vocabulary, options.width, options.tokens, dtype, options.rounds, device
            )
            most, longest = found["all logits"]
            for name, (size, seconds) in found.items():
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
