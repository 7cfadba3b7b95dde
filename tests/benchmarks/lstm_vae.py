"""The LSTM VAE and the LSTM language model that a T5 sentence VAE is compared with.

    python tests/benchmarks/lstm_vae.py MODEL_DIR --train_file F --test_file F
        (--target 8 | --free_bits 8 | --latent_dim 0) [--output results.json]

MODEL_DIR is a model of dsvae. Its tokenizer and its `max_tokens` are used, so both kinds of
model predict the same tokens, EOS included. `--steps 0` measures MODEL_DIR itself.

The model is the usual one (Bowman et al. 2016; He et al. 2019), of one layer on each side.
The last state of the encoder gives mean and log-variance of z. z gives the first state of
the decoder (c = Wz + b, h = tanh c) and is concatenated to each of its inputs. As in T5, one
embedding is shared by the encoder, the decoder and the softmax. With `--latent_dim 0` there
is no encoder.

Training is plain torch. First `--ae_steps` without KL, with drawn z (Li et al. 2019). They
draw the decoder again after these, as `--reset_decoder` does. Then `--steps` follow with

- `--target`: beta * KL, where beta += 0.001 (KL - target) after each step, between 0 and 1;
- `--free_bits`: beta * max(free bits, KL), the KL in total, the mean of the batch; beta
  rises linearly to 1 in the first half of the steps.

The optimizer and its clipping are those of `yelp_cpu`. With `--lr_decay` the learning rate
falls along a line at the end of `--steps`.

The evaluation is that of dsvae, in float32: the same code, names, and draws. In the JSON
file it is `test`. Its nll_iw has `--iw_samples` draws per sentence. `many_draws` has
`--draws` of them for `--draws_sentences` sentences that their content chooses, beside the
rec and kl of these sentences. `dsvae evaluate --sentences` chooses others.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.labelled import longest

from dsvae import pretrained
from dsvae.data.readers import read_file
from dsvae.data.record_tokens import tokenize
from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import UserError
from dsvae.files import write_json
from dsvae.inference.passes import Passes
from dsvae.metrics import evaluate
from dsvae.metrics.labelled import add
from dsvae.modeling.families import GaussianFamily
from dsvae.modeling.t5_vae import T5VAEOutput
from dsvae.parallel.world import World
from dsvae.reports.table import result_table

GAIN = 0.001
"""How much beta moves per step and per nat of distance from the target."""
PARTS = 2
"""A batch is sorted by length and computed in so many parts, which have less padding."""
BUDGET = 16_384
IGNORE = -100
WORLD = World(0, 0, 1, torch.device("cpu"))


class LstmVae(nn.Module):
    """Called as dsvae calls a T5VAE, so that the same code measures it.

    Args:
        pad: the token before the first one, as in T5.
        latent_dim: 0 for a language model.
    """

    def __init__(
        self, vocabulary: int, pad: int, *, embedding: int, hidden: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.family = GaussianFamily(latent_dim)
        self.config = SimpleNamespace(
            latent_dim=latent_dim,
            has_latent=latent_dim > 0,
            pad_token_id=pad,
            prior="fixed",
            posterior_reads="both",
            conditional=False,
            classes=(),
            tags=(),
            clusters=0,
        )
        self.embedding = nn.Embedding(vocabulary, embedding)
        nn.init.normal_(self.embedding.weight, std=0.1)
        if latent_dim:
            self.encoder = nn.LSTM(embedding, hidden, batch_first=True)
            self.head = nn.Linear(hidden, 2 * latent_dim)
            self.start = nn.Linear(latent_dim, hidden)
        self.decoder = nn.LSTM(embedding + latent_dim, hidden, batch_first=True)
        self.output = nn.Linear(hidden, embedding)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def draw_decoder(self) -> None:
        """New weights for the decoder. The embedding, which the encoder has too, stays."""
        for module in (self.start, self.decoder, self.output):
            module.reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        latent: Tensor | None = None,
        encode_only: bool = False,
        **_: Any,
    ) -> Any:
        """The `posterior` of sentences, or their `nats` and the tokens that are the likeliest
        ones, `right`, (B,) each, under z."""
        if encode_only:
            parameters = self.encode(input_ids, attention_mask.sum(1))
            return T5VAEOutput(posterior=self.family.of(parameters))
        previous = labels.roll(1, 1).clamp(min=0)
        previous[:, 0] = self.config.pad_token_id
        logits = self.logits(self.states(previous, latent))
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum(1)
        return SimpleNamespace(nats=nats.sum(1), right=right)

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Means and log-variances (B, 2Z) of sentences (B, T)."""
        if not self.config.latent_dim:
            return torch.zeros(len(ids), 0)
        states, _ = self.encoder(self.embedding(ids))
        return self.head(states[torch.arange(len(ids)), lengths - 1])

    def states(self, previous: Tensor, latent: Tensor) -> Tensor:
        """The decoder's states (B, T, H) after the tokens `previous` (B, T)."""
        inputs = self.embedding(previous)
        if not self.config.latent_dim:
            return self.decoder(inputs)[0]
        cell = self.start(latent)[None]
        repeated = latent[:, None].expand(-1, inputs.shape[1], -1)
        states, _ = self.decoder(torch.cat([inputs, repeated], -1), (cell.tanh(), cell))
        return states

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(self.output(states), self.embedding.weight, self.bias)


def count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def batches(split: TokenizedSplit, size: int, seed: int) -> Iterator[list[NDArray[np.int64]]]:
    """Batches of random sentences without end, each sentence once per epoch."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(len(split))])
        yield split.rows(order[:size])
        order = order[size:]


def loss_of(
    model: LstmVae, rows: list[NDArray[np.int64]], word_dropout: float, unk: int
) -> tuple[Tensor, Tensor]:
    """-log p(x|z) and KL in nats, the means over a batch."""
    pad, units = model.config.pad_token_id, model.config.latent_dim
    prior = model.family.prior()
    rows = sorted(rows, key=len, reverse=True)
    rec, kl = torch.zeros(()), torch.zeros(())
    for start in range(0, len(rows), part := math.ceil(len(rows) / PARTS)):
        ids = nn.utils.rnn.pad_sequence(
            [torch.from_numpy(row) for row in rows[start : start + part]], True, pad
        )
        lengths = torch.tensor([len(row) for row in rows[start : start + part]])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        posterior = model.family.of(model.encode(ids, lengths))
        latent = posterior.sample(torch.randn(len(ids), units))
        previous = F.pad(ids[:, :-1], (1, 0), value=pad)
        if word_dropout:
            previous[(torch.rand(ids.shape) < word_dropout) & (previous != pad)] = unk
        logits = model.logits(model.states(previous, latent)[real])
        rec = rec + F.cross_entropy(logits, ids[real], reduction="sum")
        kl = kl + posterior.kl(prior).sum()
    return rec / len(rows), kl / len(rows)


def train(model: LstmVae, split: TokenizedSplit, unk: int, args: argparse.Namespace) -> float:
    """Trains, and returns the seconds that it took."""
    source = batches(split, args.batch_size, args.seed)
    began = time.perf_counter()
    for phase, steps in (("ae", args.ae_steps), ("vae", args.steps)):
        if phase == "vae" and args.reset_decoder:
            model.draw_decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
        beta = 0.0
        for step in range(steps):
            if phase == "vae" and args.lr_decay:
                falling = (steps - step) / (args.lr_decay * steps)
                optimizer.param_groups[0]["lr"] = args.lr * min(1.0, falling)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                rec, kl = loss_of(model, next(source), args.word_dropout, unk)
            penalty = kl
            if args.free_bits is not None:
                beta = min(1.0, 2 * step / steps)
                penalty = kl.clamp(min=args.free_bits)
            loss = rec + beta * penalty if phase == "vae" else rec
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if args.target is not None:
                moved = beta + GAIN * (kl.item() - args.target)
                beta = min(max(moved, 0.0), 1.0) if phase == "vae" else 0.0
            if (step + 1) % 100 == 0:
                print(
                    f"{phase} {step + 1}: rec {rec.item():.2f} kl {kl.item():.2f} beta {beta:.3f}"
                    f" after {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
    return time.perf_counter() - began


def measure(
    model: Any, split: TokenizedSplit, more: TokenizedSplit, args: argparse.Namespace
) -> dict[str, Any]:
    """`test` and `many_draws` as in the JSON file."""
    passes = Passes(model, WORLD, token_budget=BUDGET)
    with torch.inference_mode():
        found = evaluate.measure(passes, split, samples=1, seed=0, more=more)
        test = evaluate.summarize(found, split)
        results = {"test": test}
        if model.config.latent_dim:
            for name, draws, sentences in (
                ("test", args.iw_samples, len(split)),
                ("many_draws", args.draws, args.draws_sentences),
            ):
                rows = np.argsort(split.content_keys)[:sentences]
                part = split.select(rows)
                own_of = evaluate.measure(passes, part, samples=1, iw_samples=draws, seed=0)
                more_of = evaluate.importance_weighted(own_of.log_weights, part)
                if name == "many_draws":
                    own = {"rec": found.rec[rows], "kl": found.kl.sum(1)[rows]}
                    means = {each: evaluate.likelihood.mean(own[each]) for each in own}
                    results[name] = {
                        "sentences": len(part),
                        **{each: mean for each, (mean, _) in means.items()},
                        "se": {each: error for each, (_, error) in means.items()},
                    }
                add(results[name], more_of)
        gain, error = evaluate.likelihood.mean(found.rec_shuffled - found.rec)
        test["rec_shuffled-rec"], test["se"]["rec_shuffled-rec"] = gain, error
        test["warnings"] = evaluate.warnings_of(test, found)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    objective = parser.add_mutually_exclusive_group()
    objective.add_argument("--target", type=float, help="KL to hold, in nats per sentence")
    objective.add_argument("--free_bits", type=float, help="in nats per sentence")
    parser.add_argument("--latent_dim", type=int, default=32)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ae_steps", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--reset_decoder", action="store_true", help="after ae_steps")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr_decay", type=float, help="share of --steps in which lr falls to 0")
    parser.add_argument("--word_dropout", type=float, default=0.0, help="share of decoder inputs")
    parser.add_argument("--bf16", action="store_true", help="autocast in training")
    parser.add_argument("--iw_samples", type=int, default=10)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--draws_sentences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    controlled = args.target is not None or args.free_bits is not None
    if args.steps and controlled != bool(args.latent_dim):
        parser.error("give --target or --free_bits, or --latent_dim 0")
    if not args.latent_dim and (args.ae_steps or args.reset_decoder):
        parser.error("a language model has no phase without KL")
    logging.disable_progress_bar()
    try:
        t5, tokenizer = pretrained.load(args.model_dir)
        splits = [
            tokenize(read_file(Path(file), "FILE", "text"), tokenizer, longest(t5), file)[0]
            for file in (args.train_file, args.test_file)
        ]
    except UserError as problem:
        parser.error(str(problem))
    results: dict[str, Any] = {"settings": vars(args), "parameters_t5": count(t5)}
    model: Any = t5
    if args.steps:
        torch.manual_seed(args.seed)
        sizes = {name: getattr(args, name) for name in ("embedding", "hidden", "latent_dim")}
        model = LstmVae(t5.config.vocab_size, t5.config.pad_token_id, **sizes)
        results["parameters"] = count(model)
        print(f"{count(model):,} parameters; {args.model_dir} has {count(t5):,}", flush=True)
        seconds = train(model, splits[0], tokenizer.unk_token_id, args)
        results["steps_per_second"] = (args.ae_steps + args.steps) / seconds
    results |= measure(model, splits[1], splits[0], args)
    print(result_table("test", results["test"]))
    if args.output:
        write_json(Path(args.output), results)


if __name__ == "__main__":
    main()
