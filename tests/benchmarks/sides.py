"""Three ways to train the same T5VAE with the same loss: dsvae's engine, a bare loop of
torch, and the Trainer of transformers. trainer.py and gpu.py measure their speed.

Each side is a function (first step, steps) -> (predicted tokens, seconds by `_now`, steps that
were skipped because float16 overflowed), and can be called again and again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from dsvae import T5VAE, T5VAEConfig
from dsvae.config import LoraConfig, ModelConfig, Phase2Config, RunConfig
from dsvae.data.batches import MicroBatch, Step, TrainingBatches
from dsvae.data.record_tokens import features_of
from dsvae.data.tokenization import TokenizedSplit
from dsvae.engine import ds_config, engine, weights
from dsvae.modeling.crf import IGNORE
from dsvae.objective.elbo import Penalty
from dsvae.parallel.world import World
from dsvae.phases import Phase

Side = Callable[[int, int], tuple[int, float, int]]

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BETA, CLIP, LR = 0.5, 1.0, 1e-4


@dataclass(frozen=True)
class Job:
    """What is trained, and how."""

    t5: dict[str, Any]
    side: str = "dsvae"
    """dsvae, bare, trainer, or trainer_grouped (batches of similar lengths)."""
    precision: str = "bf16"
    ds_config: str = "zero1"
    """Of dsvae's side, by the name of its file."""
    compile: bool = False
    packing: bool = False
    gradient_checkpointing: bool = False
    lora: int = 0
    batch_size: int = 512
    micro_batch_tokens: int = 16384
    max_tokens: int = 64

    @property
    def rows(self) -> int:
        """Sentences of the Trainer's micro-batch: as many as dsvae's largest has."""
        return min(self.batch_size, self.micro_batch_tokens // self.max_tokens)

    @property
    def micro_batches(self) -> int:
        return -(-self.batch_size // self.rows)

    def model(self) -> T5VAEConfig:
        lora = {"rank": self.lora, "alpha": 16.0, "targets": ["q", "v"]} if self.lora else None
        return T5VAEConfig(t5=self.t5, latent_dim=32, lora=lora)

    def resolved(self, ranks: int = 1) -> dict[str, Any]:
        """Its DeepSpeed configuration, as a run would resolve it."""
        return ds_config.resolve(
            ds_config.load(ROOT / "ds_configs" / f"{self.ds_config}.json"),
            phase=Phase2Config(lr=LR, max_grad_norm=CLIP),
            precision=self.precision,
            batch_size=self.batch_size,
            micro_batches=self.micro_batches,
            world_size=ranks,
            bf16_supported=True,
            fp16_supported=torch.cuda.is_available(),
        )


def random_split(job: Job, sentences: int) -> TokenizedSplit:
    """Sentences of random pieces, of 8 tokens to the most that the job allows."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(min(8, job.max_tokens), job.max_tokens + 1, sentences)
    ids = [[*rng.integers(3, job.t5["vocab_size"], n - 1).tolist(), 1] for n in lengths]
    rest = {"words": [0] * sentences, "bytes": [0] * sentences, "truncated": [False] * sentences}
    columns = {"input_ids": ids, **rest, "hash": list(range(sentences))}
    return TokenizedSplit(datasets.Dataset.from_dict(columns, features=features_of(["text"])))


def training_batches(job: Job, split: TokenizedSplit) -> TrainingBatches:
    return TrainingBatches(
        split,
        batch_size=job.batch_size,
        token_budget=job.micro_batch_tokens,
        noise_width=32,
        deletion=0.0,
        seed=0,
        rank=0,
        world_size=1,
        pad_id=0,
        packing=job.packing,
    )


def make_side(job: Job, model: T5VAE, split: TokenizedSplit, world: World) -> Side:
    """A side of a job.

    Args:
        model: fresh, float32, on the device that it trains on.
    """
    if job.side == "dsvae":
        return _timed(_engine_step(job, model, world), job, split)
    model = model.to(world.device).train()
    weights.freeze_pretrained(model)
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if job.side == "bare":
        return _timed(_bare_step(job, model, world.device), job, split)
    return _trainer(job, model, split, world.device)


def _timed(do: Callable[[int, Step], bool], job: Job, split: TokenizedSplit) -> Side:
    """A side whose `do` takes a step and says whether it was skipped."""
    batches = training_batches(job, split)

    def side(first: int, steps: int) -> tuple[int, float, int]:
        tokens = skipped = 0
        start = _now()
        for index in range(first, first + steps):
            step = batches.step(index)
            skipped += do(index, step)
            tokens += step.tokens
        return tokens, _now() - start, skipped

    return side


def training_engine(job: Job, model: T5VAE, world: World) -> engine.PhaseEngine:
    """dsvae's engine for a job, without a run around it."""
    settings = ModelConfig(
        gradient_checkpointing=job.gradient_checkpointing, lora=LoraConfig(rank=job.lora)
    )
    phase = Phase2Config(lr=LR, max_grad_norm=CLIP)
    config = RunConfig(model=settings, phase2=phase, compile=job.compile)
    # Once per run, of files that do not exist here.
    digest, engine.frozen_digest = engine.frozen_digest, lambda *_: None
    try:
        resolved = job.resolved(world.size)
        return engine.PhaseEngine(model, world, Phase(2, config, 0), resolved, origin=None)
    finally:
        engine.frozen_digest = digest


def _engine_step(job: Job, model: T5VAE, world: World) -> Callable[[int, Step], bool]:
    trained = training_engine(job, model, world)

    def do(index: int, step: Step) -> bool:
        return trained.train_step(index, step, Penalty(BETA)).skipped

    return do


def _bare_step(job: Job, model: T5VAE, device: torch.device) -> Callable[[int, Step], bool]:
    """Weights in float32, autocast, torch's AdamW: what a loop by hand does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=job.precision == "fp16")
    dtype = DTYPES[job.precision]

    def do(_: int, step: Step) -> bool:
        for batch in (each.to(device) for each in step.micro_batches):
            with torch.autocast(device.type, dtype=dtype, enabled=job.precision != "fp32"):
                loss = _loss(model, batch) * len(batch.labels) / step.sentences
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return scaler.get_scale() < before

    return do


def _loss(model: Any, batch: MicroBatch | Any) -> torch.Tensor:
    """The mean over the sentences, with all logits at once."""
    noise = getattr(batch, "noise", None)  # the Trainer's model draws its own
    noise = None if noise is None else noise[:, 0]
    out = model(batch.input_ids, batch.attention_mask, labels=batch.labels, noise=noise)
    rows = len(batch.labels)
    logits = out.logits.float().flatten(0, 1)
    rec = F.cross_entropy(logits, batch.labels.flatten(), reduction="sum") / rows
    kl = out.posterior.kl(out.prior).mean(0)
    return rec + BETA * kl.sum()


class _Clock(TrainerCallback):
    """When the first step began and the last one ended, and how many were skipped."""

    start = end = 0.0
    skipped = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.start or _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped += kwargs["optimizer"].step_was_skipped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = _now()


class _Trainer(Trainer):
    """transformers' Trainer with the loss of a VAE."""

    tokens: Any = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens = self.tokens + (inputs["labels"] != IGNORE).sum()
        return _loss(model, type("Batch", (), inputs))


def _trainer(job: Job, model: T5VAE, split: TokenizedSplit, device: torch.device) -> Side:
    rows = [{"input_ids": row, "length": len(row)} for row in split.rows(range(len(split)))]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(each["input_ids"]) for each in examples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)
        return {"input_ids": ids, "attention_mask": (labels != IGNORE).long(), "labels": labels}

    def side(first: int, steps: int) -> tuple[int, float, int]:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as directory, _without_ranks():
            arguments = TrainingArguments(
                output_dir=directory,
                max_steps=steps,
                seed=first,
                per_device_train_batch_size=job.rows,
                gradient_accumulation_steps=job.micro_batches,
                train_sampling_strategy="group_by_length" if "grouped" in job.side else "random",
                learning_rate=LR,
                lr_scheduler_type="constant",
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                bf16=job.precision == "bf16",
                fp16=job.precision == "fp16",
                torch_compile=job.compile,
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=device.type != "cpu",
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = _Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,  # type: ignore[arg-type]
                data_collator=collate,
                callbacks=[clock],
            )
            trainer.train()
        # A Trainer wraps the model's forward pass in autocast and marks the model. Without
        # the mark's removal, the next one would not wrap it again, and would run in float32.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
        return int(trainer.tokens), clock.end - clock.start, clock.skipped

    return side


@contextlib.contextmanager
def _without_ranks() -> Iterator[None]:
    """Hides the variables that `join` lends to DeepSpeed: with them, the Trainer would wrap
    the model in DDP, with a search for unused parameters."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _now() -> float:
    """Seconds. On a GPU by the clock, when it has done what was asked of it; on CPU those of
    this process alone, which other work on the machine does not lengthen."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
