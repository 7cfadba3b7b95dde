"""The training command with deviations of the code that Park & Lee released in 2021, one
by one or together.

    python tests/benchmarks/as_released.py SWITCH[,SWITCH...] --ds_config ... (flags of
        train.py, for one rank)
    python tests/benchmarks/as_released.py all --ds_config ... --output_dir DIR

Without --config it trains the quickstart's model in `BASE`. It prints a row of a table in
nats per sentence. `all` runs every switch of `SWITCHES` alone in DIR/SWITCH, skips those
that are finished, and prints the table. docs/results/as_released.md says what each is.

Models with `tied` are of another shape: nothing but this script can load them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.t5.modeling_t5 import T5Attention

from dsvae.config import RunConfig, merge, parse_flags
from dsvae.data import batches, order
from dsvae.data.batches import MicroBatch, TrainingBatches
from dsvae.engine import engine, weights
from dsvae.failures import end_process
from dsvae.inference import passes
from dsvae.modeling import t5_vae
from dsvae.modeling.attention import LATENT_ATTENTION, latent_attention_forward
from dsvae.modeling.backbone import T5Backbone
from dsvae.modeling.injection import Injection, MemoryInjection
from dsvae.modeling.posterior import Pooling
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig
from dsvae.run_directory import RunDirectory
from dsvae.train import main as train

Options = dict[str, Any]

BASE: Options = {
    "config": "quickstart",
    "model.injection": "memory",
    "data.micro_batch_tokens": 65536,  # a step is one batch
    "phase1.steps": 200,
    "phase2.steps": 300,
    "phase2.free_bits": 0.5,
    "phase2.free_bits_mode": "dimension",
    "eval.iw_samples": 0,
    "eval_every": 0,
    "checkpoint_every": 0,
}


def mix(projected: Tensor, layers: int) -> Tensor:
    """(B, L w) as the released code reads it, as (L, B, w): the slot of layer l and
    sentence b is part (l B + b) mod L of sentence (l B + b) // L. Returned as (B, L w)."""
    count = len(projected)
    return projected.reshape(layers, count, -1).transpose(0, 1).reshape(count, -1)


class ReleasedMemory(MemoryInjection):
    """`MemoryInjection` with the deviations of the released code.

    Args:
        group: rows that are mixed among themselves; 0: each has its own slots. More rows
            are so many batches one after the other.
        tied: one vector is key and value, and the projection has no bias.
    """

    def __init__(
        self, backbone: T5Backbone, latent_width: int, slots: int, *, group: int, tied: bool
    ) -> None:
        super().__init__(backbone, latent_width, vectors=1, memory_slots=slots)
        heads, width = backbone.key_value_heads, backbone.head_width
        self.shape = (backbone.decoder_layers, 1 if tied else 2, slots, heads, width)
        self.group = group
        self.projection = nn.Linear(latent_width, math.prod(self.shape), bias=not tied)

    def forward(self, latent: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.projection(latent.to(self.projection.weight.dtype))
        if self.group:
            memory = torch.cat([mix(part, self.shape[0]) for part in memory.split(self.group)])
        memory = memory.view(-1, *self.shape)
        return embeddings, {"latent_memory": memory.expand(-1, -1, 2, -1, -1, -1)}


def other_memory(config: RunConfig, *, mixed: bool, tied: bool) -> None:
    """Gives the model a `ReleasedMemory`."""
    if config.model.injection != "memory":
        sys.exit("as_released: these switches need --injection memory")
    group = config.data.batch_size if mixed else 0

    def make(config: T5VAEConfig, width: int) -> Injection:
        return ReleasedMemory(config.backbone, width, config.memory_slots, group=group, tied=tied)

    t5_vae.make_injection = make
    if not mixed:
        return
    # Batches are sorted by length, so a neighbour's z would tell the length. There, as
    # here, they have the order of the file, in evaluation as well.
    micro_batch = TrainingBatches._micro_batch

    def unsorted(
        self: TrainingBatches, sentences: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> MicroBatch:
        if len(sentences) != config.data.batch_size:
            sys.exit("as_released: mixed needs one micro-batch per step, on one rank")
        order = np.argsort(sentences, kind="stable")
        return micro_batch(self, sentences[order], epochs[order])

    def whole_groups(
        lengths: NDArray[np.int32], *, token_budget: int, rank: int, world_size: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        rows = group * max(1, token_budget // int(lengths.max()) // group)
        for start in range(0, len(lengths), rows):
            part = np.arange(start, min(start + rows, len(lengths)))
            yield part, np.ones(len(part), dtype=np.float32)

    TrainingBatches._micro_batch = unsorted
    passes.evaluation_batches = whole_groups


def slot_has_a_position(config: RunConfig) -> None:
    """The slot gets the relative bias of the place before the first token."""
    compute_bias = T5Attention.compute_bias

    def with_slot(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
    ) -> Tensor:
        if self.is_decoder:
            key_length, past_seen_tokens = key_length + 1, past_seen_tokens + 1
        return compute_bias(self, query_length, key_length, device, past_seen_tokens)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        latent_memory: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        slots = latent_memory[:, module.layer_idx].to(key.dtype).transpose(2, 3)
        key, value = (torch.cat(pair, dim=2) for pair in ((slots[:, 0], key), (slots[:, 1], value)))
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (1, 0), value=True)
        return latent_attention_forward(module, query, key, value, attention_mask, **kwargs)

    T5Attention.compute_bias = with_slot
    AttentionInterface.register(LATENT_ATTENTION, attend)


def fewer_deletions(config: RunConfig) -> None:
    """Deletes 0 to floor(rate * (T - 1)) - 1 tokens, each number as often as another."""

    def delete(ids: NDArray[np.int64], rate: float, rng: np.random.Generator) -> NDArray[np.int64]:
        words = ids.shape[-1] - 1
        most = int(words * rate)
        count = int(rng.integers(most)) if most > 1 else 0
        return np.delete(ids, rng.permutation(words)[:count], axis=-1)

    batches.delete_tokens = delete


def exchange_ids_and_mask(config: RunConfig) -> None:
    """In training the encoder reads the mask, 1 for each token, and ids are its mask. An
    id is a token where it is not 0, so that mask stays as it was."""
    micro_batch = TrainingBatches._micro_batch

    def exchanged(self: TrainingBatches, *given: Any) -> MicroBatch:
        batch = micro_batch(self, *given)
        return dataclasses.replace(batch, input_ids=batch.attention_mask)

    TrainingBatches._micro_batch = exchanged


def pool_over_padding(config: RunConfig) -> None:
    """Pads every sentence to data.max_tokens for the encoder, and pools all positions."""
    read, pool, width = T5VAE._read, Pooling.forward, config.data.max_tokens

    def padded(
        self: T5VAE, ids: Tensor, mask: Tensor | None, *labels: Any, **capture: Any
    ) -> dict[str, Any]:
        mask = torch.ones_like(ids) if mask is None else mask
        room = (0, width - ids.shape[1])
        ids = F.pad(ids, room, value=self.config.pad_token_id)
        return read(self, ids, F.pad(mask, room), *labels, **capture)

    def all_positions(self: Pooling, states: Tensor, mask: Tensor) -> Tensor:
        return pool(self, states, torch.ones_like(mask))

    T5VAE._read = padded
    Pooling.forward = all_positions


def freeze_the_projection(config: RunConfig) -> None:
    """Phase 1 freezes the injection with the decoder."""
    freeze = engine.freeze_decoder

    def both(model: T5VAE) -> None:
        freeze(model)
        model.injection.requires_grad_(False)

    engine.freeze_decoder = both


def decay_everything(config: RunConfig) -> None:
    """Weight decay acts on norms, biases and embeddings too."""
    names = weights.parameter_names
    weights.parameter_names = lambda model: [sum(names(model), []), []]


def keep_the_order(config: RunConfig) -> None:
    """Every epoch has the order of the file."""
    order.epoch_order = lambda count, seed, epoch: np.arange(count)


def in_both_phases(**values: Any) -> Options:
    """The same values for both phases."""
    return {f"{phase}.{name}": v for phase in ("phase1", "phase2") for name, v in values.items()}


SLOW = in_both_phases(lr=1e-4, lr_schedule="constant", warmup_steps=0)
LINEAR = {"phase2.beta.kind": "linear", "phase2.beta.zero": 0, "phase2.beta.rise": 1}
SWITCHES: dict[str, tuple[Options, Callable[[RunConfig], None] | None]] = {
    "none": ({}, None),
    "beta": (LINEAR | {"phase2.beta.max": 25.6}, None),
    "clamped": ({"phase2.free_bits_mode": "sentence"}, None),
    "mixed": ({}, partial(other_memory, mixed=True, tied=False)),
    "tied": ({}, partial(other_memory, mixed=False, tied=True)),
    "position": ({}, slot_has_a_position),
    "deletion": (in_both_phases(deletion=0.4), None),  # no deviation: for comparison
    "half": (in_both_phases(deletion=0.4), fewer_deletions),
    "exchanged": (in_both_phases(deletion=0.4), exchange_ids_and_mask),
    "max": ({"model.pooling": "max"}, None),  # no deviation, the paper's own
    "padded": ({}, pool_over_padding),
    "frozen": ({"phase1.freeze_decoder": "true"}, None),  # no deviation, the paper's own
    "frozen_projection": ({"phase1.freeze_decoder": "true"}, freeze_the_projection),
    "decay": ({}, decay_everything),
    "unclipped": (in_both_phases(max_grad_norm=0), None),
    "ordered": ({}, keep_the_order),
    "lr": (SLOW, None),
}


def row(name: str, directory: Path) -> str:
    """A line of the table from the final evaluation of a run."""
    found = json.loads((directory / "metrics.json").read_text())["test"]
    values = [*(found[key] for key in ("rec", "kl", "mi")), found["rec_shuffled"] - found["rec"]]
    return f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


def table(rows: list[str]) -> str:
    """The rows under their head."""
    return "\n".join(["| switch | rec | kl | mi | rec_shuffled - rec |", "|---" * 5 + "|", *rows])


def run(names: list[str], given: Options) -> int:
    """Trains with some switches; the exit code of the command."""
    options = given if "config" in given else BASE | given
    patches = []
    for name in names:
        own, patch = SWITCHES[name]
        options = options | own
        patches += [patch] if patch else []
    if {"mixed", "tied"} <= set(names):  # one memory with both
        patches = [each for each in patches if getattr(each, "func", None) is not other_memory]
        patches.append(partial(other_memory, mixed=True, tied=True))
    settings = merge({name: str(value) for name, value in options.items()})
    for patch in patches:
        patch(settings)
    code = train([f"--{name}={value}" for name, value in options.items()])
    if code == 0:
        print(table([row(",".join(names), Path(settings.output_dir))]))
    return code


def run_all(flags: list[str], directory: Path) -> int:
    """Runs every switch alone, one after the other; the number of runs that failed."""
    rows, failed = [], 0
    for name in SWITCHES:
        place = directory / name
        if not RunDirectory(place).is_finished("all"):
            command = [sys.executable, __file__, name, *flags, "--output_dir", str(place)]
            if subprocess.run(command, stdout=sys.stderr).returncode:
                failed += 1
                continue
        rows.append(row(name, place))
    print(table(rows))
    return failed


if __name__ == "__main__":
    what, flags = sys.argv[1], parse_flags(sys.argv[2:])
    if what == "all":
        directory = Path(flags.pop("output_dir"))
        sys.exit(run_all([f"--{name}={value}" for name, value in flags.items()], directory))
    if unknown := set(what.split(",")) - set(SWITCHES):
        sys.exit(f"as_released: no switch {', '.join(unknown)}; there are {', '.join(SWITCHES)}")
    end_process(run(what.split(","), flags))
