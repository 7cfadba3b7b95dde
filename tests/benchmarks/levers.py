"""Changes to training that are no options: the real command with a patch.

    python tests/benchmarks/levers.py LEVER=VALUE ... --ds_config ... (the flags of train.py)

It runs under deepspeed, torchrun and srun like train.py. `--help` lists the levers. A run
writes them into OUTPUT_DIR/ds_config.json, so that `dsvae compare` shows them as a column.
Without a lever it is train.py. A run with refit, lagging or decoder_lr cannot resume at
another number of ranks.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import deepspeed
import numpy as np
import torch
from torch import nn

from dsvae import train
from dsvae.data.noise import generator
from dsvae.engine import engine as engines
from dsvae.engine.engine import PhaseEngine
from dsvae.errors import UserError, did_you_mean
from dsvae.failures import end_process
from dsvae.modeling.posterior import Float32Linear, PosteriorHead
from dsvae.modeling.t5_vae import T5VAE
from dsvae.phases import Phase

UNKNOWN = 2
"""The unknown piece in the vocabularies of T5 and of dsvae's own tokenizers."""
WORDS = 5
"""The purpose of word dropout's random numbers, beside those of `dsvae.data.noise`."""

now = SimpleNamespace(phase=None, step=0)
"""The phase that trains, and its optimizer step from 0."""


def ema(decay: float) -> None:
    """At the end of phase 2 the weights become their exponential moving average (decay per
    step).

    The average is a part of AdamW's state: it lies on the float32 weights, sharded as they
    are, and checkpoints have it. Evaluations during training see the weights themselves.
    """

    @torch.no_grad()
    def average(optimizer: Any, args: Any, kwargs: Any) -> None:
        last = now.step == now.phase.steps - 1
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for weight in weights:
            if state := optimizer.state.get(weight):
                mean = state.setdefault("ema", weight.detach().clone())
                mean.lerp_(weight, 1 - decay)
                if last:
                    weight.copy_(mean)

    def register(optimizer: Any, scheduler: Any) -> None:
        if now.phase.number == 2:
            optimizer.register_step_post_hook(average)

    before_engine(register)


def refit(share: float) -> None:
    """In the last SHARE of phase 2 only the encoder and the posterior train."""
    hold_decoder(lambda step, phase: float(step < round((1 - share) * phase.steps)))


def lagging(period: float) -> None:
    """In phase 2 the decoder trains only in every PERIOD-th step (after He et al. 2019)."""
    hold_decoder(lambda step, phase: float(step % period == 0))


def decoder_lr(factor: float) -> None:
    """In phase 2 the decoder, the embedding and the injection have this share of the learning
    rate."""
    hold_decoder(lambda step, phase: factor)


def word_dropout(rate: float) -> None:
    """In training this share of the decoder's input tokens is the unknown piece (Bowman et
    al. 2016), in both phases."""
    forward = PhaseEngine._forward

    def with_gaps(engine: PhaseEngine, model: Any, batch: Any, *args: Any, **options: Any) -> Any:
        ids = engine.module.shift_right(batch.labels)
        streams = (generator(now.phase.seed, WORDS, now.step, int(i)) for i in batch.indices)
        gaps = torch.from_numpy(np.stack([each.random(ids.shape[1]) < rate for each in streams]))
        gaps[:, 0] = False  # the start token
        ids = ids.masked_fill(gaps.to(ids.device), UNKNOWN)
        model = functools.partial(model, decoder_input_ids=ids)
        return forward(engine, model, batch, *args, **options)

    PhaseEngine._forward = with_gaps  # type: ignore[method-assign]


def injection_scale(factor: float) -> None:
    """New weights of the injection start this many times as large."""
    draw = T5VAE._init_weights

    @torch.no_grad()
    def scaled(model: T5VAE, module: nn.Module) -> None:
        draw(model, module)
        if isinstance(module, nn.Linear) and any(module is m for m in model.injection.modules()):
            module.weight.mul_(factor)

    T5VAE._init_weights = scaled  # type: ignore[method-assign]


def head_width(width: float) -> None:
    """The posterior's head has a hidden layer of this width. Its model loads only with this
    lever."""
    make = PosteriorHead.__init__

    def with_hidden(head: PosteriorHead, d_model: int, parameters: int, *args: Any) -> None:
        make(head, d_model, parameters, *args)
        layers = (
            Float32Linear(d_model, int(width)),
            nn.GELU(),
            Float32Linear(int(width), parameters),
        )
        head.head = nn.Sequential(*layers)

    PosteriorHead.__init__ = with_hidden  # type: ignore[method-assign]


def mean_of_draws(count: float) -> None:
    """Training on the mean of this many draws of z, the ablation of speculative sampling
    (Sato et al. 2021, "Monte Carlo"): one draw with the noise divided by the root."""
    choose = PhaseEngine._choose_noise

    def averaged(engine: PhaseEngine, batch: Any) -> Any:
        return choose(engine, batch) / math.sqrt(count)

    PhaseEngine._choose_noise = averaged  # type: ignore[method-assign]


def before_engine(change: Callable[[Any, Any], None]) -> None:
    """Calls `change` with the optimizer and the scheduler of each engine that is made."""
    initialize = deepspeed.initialize

    def changed(**given: Any) -> Any:
        change(given["optimizer"], given["lr_scheduler"])
        return initialize(**given)

    deepspeed.initialize = changed


def hold_decoder(share: Callable[[int, Phase], float]) -> None:
    """In phase 2 everything but the encoder and the posterior trains with `share` (of step
    and phase) of the learning rate. Where that is 0, it stays as it is, and gradients are
    clipped without it."""
    groups = engines.parameter_groups

    def divided(model: T5VAE, weight_decay: float) -> list[dict[str, Any]]:
        found = groups(model, weight_decay)
        if now.phase.number == 1:
            return found
        parts = (model.shared, model.decoder, model.lm_head, model.injection)
        held = {id(weight): weight for part in parts for weight in part.parameters()}
        for weight in held.values():
            weight.register_hook(lambda grad: grad if share(now.step, now.phase) else grad * 0)
        split = [
            {
                **group,
                "params": [p for p in group["params"] if (id(p) in held) == slow],
                "slow": slow,
            }
            for slow in (False, True)  # the learning rate that is logged is the encoder's
            for group in found
        ]
        return [group for group in split if group["params"]]

    def slow_down(optimizer: Any, scheduler: Any) -> None:
        phase, (full, *_) = now.phase, scheduler.lr_lambdas
        for i, group in enumerate(optimizer.param_groups):
            if group.get("slow"):
                scheduler.lr_lambdas[i] = lambda step: full(step) * share(step, phase)
                group["lr"] *= share(0, phase)

    engines.parameter_groups = divided
    before_engine(slow_down)


def keep_time() -> None:
    """Keeps `now` up to date."""
    make, step = PhaseEngine.__init__, PhaseEngine.train_step

    def made(engine: PhaseEngine, model: Any, world: Any, phase: Phase, *a: Any, **b: Any) -> None:
        now.phase, now.step = phase, 0
        make(engine, model, world, phase, *a, **b)

    def timed(engine: PhaseEngine, index: int, *args: Any) -> Any:
        now.step = index
        return step(engine, index, *args)

    PhaseEngine.__init__ = made  # type: ignore[method-assign]
    PhaseEngine.train_step = timed  # type: ignore[method-assign]


LEVERS: dict[str, Callable[[float], None]] = {
    lever.__name__: lever
    for lever in (
        *(ema, refit, lagging, decoder_lr),
        *(word_dropout, injection_scale, head_width, mean_of_draws),
    )
}


def pull(words: list[str]) -> list[str]:
    """Pulls the levers of a command line; the rest of it.

    Raises:
        UserError: an unknown lever, or a value that is missing or no number.
    """
    count = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    for word in words[:count]:
        name, _, value = word.partition("=")
        if name not in LEVERS:
            raise UserError(f"{name} is no lever{did_you_mean(name, LEVERS)}; --help lists them")
        try:
            LEVERS[name](float(value))
        except ValueError:
            usage = " ".join(inspect.signature(LEVERS[name]).parameters)
            raise UserError(f"{word}: the lever {name} takes {usage}") from None
    keep_time()
    write_down = train.write_down

    def written(config: Any, ds_config: dict[str, Any], *rest: Any) -> None:
        write_down(config, ds_config | {"levers": " ".join(words[:count])}, *rest)

    train.write_down = written
    return words[count:]


def usage() -> str:
    """What the levers do."""
    lines = [str(__doc__)]
    for name, lever in LEVERS.items():
        (value,) = inspect.signature(lever).parameters
        lines += [f"{name}={value.upper()}", textwrap.indent(str(inspect.getdoc(lever)), "    ")]
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Runs train.py with levers; its exit code."""
    if "--help" in words:
        print(usage())
        return 0
    if words[:1] and words[0].startswith("--local_rank"):
        words = words[1:]  # of the deepspeed launcher; the environment says it too
    try:
        return train.main(pull(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
