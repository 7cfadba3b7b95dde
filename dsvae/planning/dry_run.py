"""A dry run: the model's own forward and backward on tensors that have a shape and no
data.

No formula estimates what a micro-batch needs beside weights and engine. The T5VAE runs
under `FakeTensorMode`, and its live bytes are counted operator by operator: saved
activations, attention matrices, the loss on the vocabulary in pieces, recomputation
under gradient checkpointing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsvae.engine.weights import freeze_decoder as freeze_decoder_of
from dsvae.engine.weights import freeze_pretrained
from dsvae.modeling.attention import MASK_ALIGNMENT
from dsvae.modeling.families import make_family
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig
from dsvae.objective.elbo import Penalty, loss_share


@dataclass(frozen=True)
class Weight:
    """A parameter of the model: its size, and whether it trains."""

    name: str
    numel: int
    trains: bool


@dataclass(frozen=True)
class DryRun:
    """Peak bytes of one micro-batch, weights left out."""

    forward: int
    """Until the first gradient is ready: forward pass, loss and the first operators of
    the backward pass."""
    backward: int
    """From then on, if every gradient is taken away as soon as it is ready."""
    with_gradients: int
    """Of both, if every gradient stays, in the dtype of its weight."""
    evaluation: int
    """Of a forward pass without gradients; 0 if none was asked for."""


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return while the mode is on, until the last
    reference to each is gone.

    Views share their storage and count once. Scratch memory inside an operator is not
    seen. The counter reads a dry run (the plan) and a real run (its check).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Live bytes."""
        self.peak = 0
        """The peak since the last `restart`, in bytes."""
        self._seen: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen and self._seen[key]() is storage:
            return

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Returns the peak since the last restart, in bytes; starts a new count."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.add(leaf)
        return result


def build(config: T5VAEConfig, freeze_decoder: bool) -> T5VAE:
    """Builds the model without data: exact shapes, no memory."""
    with torch.device("meta"):
        model = T5VAE(config)
    freeze_pretrained(model)
    if freeze_decoder:
        freeze_decoder_of(model)
    return model


def weights_of(model: T5VAE) -> list[Weight]:
    """Returns all parameters, each once however often it is tied."""
    return [Weight(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()]


def dry_run(
    config: T5VAEConfig,
    *,
    rows: int,
    tokens: int,
    evaluation_rows: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    gradient_checkpointing: bool,
    freeze_decoder: bool,
    fused_attention: bool,
) -> DryRun:
    """Runs a micro-batch through the model.

    Args:
        rows, tokens: B, and T of the sentences and of the conditions, if any.
        evaluation_rows: B of an evaluation pass; 0: none.
        dtype: of the weights as the engine holds them. autocast: of torch.autocast
            around the forward pass, if any.
        fused_attention: attend with the memory-efficient kernel, as GPUs do; otherwise
            with torch's composite, as CPUs do when the position bias trains: it writes
            out the (B, H, T, T) matrices.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in it: fake parameters cannot be cast in place
    try:
        with FakeTensorMode() as mode:
            model = T5VAE(config)
    finally:
        torch.set_default_dtype(default)
    model.train()
    freeze_pretrained(model)
    if freeze_decoder:
        freeze_decoder_of(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    live = LiveBytes()
    for p in model.parameters():
        live.add(p)
    base = live.restart()
    peaks: list[tuple[int, int]] = []  # (since the entry before, bytes of gradients by then)
    gradients = 0

    def finished(p: Tensor) -> None:
        nonlocal gradients
        peaks.append((live.restart() - base, gradients))
        gradients += p.numel() * p.element_size()
        p.grad = None

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(finished)

    attention = _efficient_attention() if fused_attention else contextlib.nullcontext()
    evaluation = 0
    with mode, live, attention:
        batch = _batch(rows, tokens, config)
        live.restart()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = model(**batch)
        penalty = Penalty(beta=1.0)
        statistics = penalty.statistics(out)
        slopes = {name: torch.ones(each.shape[1]) for name, each in statistics.items()}
        loss_share(out.weighted_nats, statistics, torch.ones(rows), slopes, rows).backward()
        peaks.append((live.restart() - base, gradients))
        del out, statistics, slopes, batch
        if evaluation_rows:
            model.eval()
            batch = _batch(evaluation_rows, tokens, config)
            live.restart()
            with torch.no_grad():
                model(**batch)
            evaluation = live.restart() - base
    return DryRun(
        forward=peaks[0][0],
        backward=max(peak for peak, _ in peaks[1:]),
        with_gradients=max(peak + kept for peak, kept in peaks),
        evaluation=evaluation,
    )


def _batch(rows: int, tokens: int, config: T5VAEConfig) -> dict[str, Tensor]:
    """Returns the arguments of `T5VAE.forward`. A condition is as long as a
    sentence."""
    condition = {}
    if config.conditional:
        condition = {
            "condition_ids": torch.zeros(rows, tokens, dtype=torch.int64),
            "condition_mask": torch.ones(rows, tokens, dtype=torch.int64),
        }
    read = tokens * (2 if config.conditional else 1)
    return {
        "input_ids": torch.zeros(rows, read, dtype=torch.int64),
        "attention_mask": torch.ones(rows, read, dtype=torch.int64),
        "labels": torch.zeros(rows, tokens, dtype=torch.int64),
        "sentence_weights": torch.ones(rows),
        "noise": torch.zeros(rows, make_family(config).noise_width),
        **condition,
    }


@contextlib.contextmanager
def _efficient_attention() -> Iterator[None]:
    """Makes scaled dot-product attention use the memory-efficient kernel, which keeps
    the output and one number per query.

    torch chooses the kernel by the device, and here there is none. (A TorchFunctionMode
    would be off during backward, in which gradient checkpointing runs the forward
    again.)
    """
    stock = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        if torch.is_autocast_enabled("cpu"):
            to = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(to), key.to(to), value.to(to)
        bias = attn_mask
        if bias is not None:
            k = key.shape[2]
            bias = bias.to(query.dtype)
            if any(stride % MASK_ALIGNMENT for stride in bias.stride()[:-1]):  # torch pads it
                bias = F.pad(bias, (0, MASK_ALIGNMENT - k % MASK_ALIGNMENT))[..., :k]
            bias = bias.expand(*query.shape[:3], k)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock
