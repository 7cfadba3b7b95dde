"""The training passes of a model through torch.compile.

The blocks of the T5 are compiled and not the whole model: all blocks of a stack share
what was compiled, so that compiling takes as long for 24 layers as for two. Rows and
widths are symbols in it. It is compiled again only for another kind of pass, or if a
size is 1.

Dropout draws the same numbers as without compilation. Evaluation, generation and
exports are not compiled, and no weight changes its name.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsvae.errors import UserError
from dsvae.modeling.t5_vae import T5VAE
from dsvae.modeling.vocabulary import piece

VARIANTS = 64
"""How many kinds of passes one function is compiled for, at most. They are the product of
encoder and decoder, with and without gradient, with and without a position bias of its
own, one row and several. torch's own limit, 8, would leave the rest uncompiled."""


def check(zero_stage: int, device: torch.device) -> None:
    """Raises UserError if the model cannot be compiled."""
    if zero_stage == 3:
        raise UserError(
            "--compile works at ZeRO 0, 1 and 2: at ZeRO 3, hooks fetch the weights of every "
            "layer, and torch.compile cannot see through them; leave --compile out, or use "
            "--ds_config zero2"
        )
    if device.type == "cpu":
        _need("a C++ compiler", os.environ.get("CXX", "g++"))
        return
    # Triton compiles the call of every kernel against Python's own headers.
    _need("a C compiler", *([os.environ["CC"]] if "CC" in os.environ else ("clang", "gcc")))
    header = Path(str(sysconfig.get_config_var("INCLUDEPY"))) / "Python.h"
    if not header.is_file():
        raise UserError(
            f"--compile on a GPU needs Python's headers, and there is no {header}: install them "
            "(apt-get install python3-dev)"
        )


def _need(what: str, *names: str) -> None:
    if not any(map(shutil.which, names)):
        raise UserError(f"--compile needs {what}, and there is no {' or '.join(names)}: install it")


def compile_training(model: T5VAE) -> None:
    """Compiles the blocks and the loss on the vocabulary, at their first training
    pass."""
    torch._dynamo.config.recompile_limit = VARIANTS
    settings: dict[str, Any] = {"dynamic": True, "options": {"fallback_random": True}}
    compiled: dict[type, Any] = {}
    for stack in (getattr(model, "encoder", None), model.decoder):
        modules = stack.modules() if stack is not None else ()
        blocks = [each for each in modules if type(each).__name__ in model.config.backbone.blocks]
        for number, block in enumerate(blocks):
            kind: Any = type(block)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, **settings)
            own = (
                partial(model.injection.of_layer, layer=number) if stack is model.decoder else dict
            )
            block.forward = partial(_forward, block, own, compiled[kind])
    model.lm_head.piece = torch.compile(piece, **settings)


def _forward(
    block: nn.Module,
    own: Callable[[dict[str, Any]], dict[str, Any]],
    compiled: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs a block, compiled in training, with its own part of the keyword
    arguments."""
    plain: Any = type(block).forward
    return (compiled if block.training else plain)(block, *args, **own(kwargs))
