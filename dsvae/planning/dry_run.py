"""A dry run: the real model's forward and backward on tensors that have a shape and no
data.

What a micro-batch needs beside weights and engine is not estimated from formulas. The
T5VAE itself runs under `FakeTensorMode`, and its live bytes are counted operator by
operator: saved activations, attention matrices, the copies of the logits, recomputation
under gradient checkpointing. Gradients are taken away the moment they are ready, as
ZeRO does; who keeps them is said elsewhere (`dsvae.planning.memory`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dsvae.modeling.families import make_family
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig
from dsvae.objective.elbo import loss_share, reconstruction_nats
from dsvae.planning.live import LiveBytes

MASK_ALIGNMENT = 16
"""The memory-efficient kernel wants rows of the bias that are multiples of 16 elements;
torch pads them."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the model: its size, whether it trains, and AdamW's group of
    it."""

    name: str
    numel: int
    trains: bool
    decays: bool


@dataclass(frozen=True)
class Event:
    """Something an engine acts upon, in the order of a training step."""

    kind: str
    """enter or leave (a module with parameters of its own), gradient (of one
    parameter), loss (forward is over), end."""
    weights: tuple[int, ...]
    """Which parameters, by their place in `DryRun.weights`."""
    before: int
    """The most live bytes since the event before, weights and finished gradients left
    out."""
    now: int
    """Live bytes at the event, the same left out."""


@dataclass(frozen=True)
class DryRun:
    """A training step and an evaluation pass of one micro-batch."""

    events: tuple[Event, ...]
    evaluation: int
    """Peak bytes of a forward pass without gradients, weights left out."""
    kept: int
    """Bytes of the logits, which the training loop still holds while the optimizer
    steps."""


def build(config: T5VAEConfig) -> T5VAE:
    """The model without data: exact shapes, no memory."""
    with torch.device("meta"):
        return T5VAE(config)


def weights_of(model: T5VAE, freeze_decoder: bool) -> list[Weight]:
    """All parameters in the order of `named_parameters`, each once however often it is
    tied."""
    frozen = (
        {id(p) for part in (model.shared, model.decoder, model.lm_head) for p in part.parameters()}
        if freeze_decoder
        else set()
    )
    found = []
    for name, p in model.named_parameters():
        decays = p.ndim >= 2 and "shared" not in name and "relative_attention_bias" not in name
        found.append(Weight(name, p.numel(), id(p) not in frozen, decays))
    return found


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
    """Runs a padded micro-batch through the model.

    Args:
        rows, tokens: B and T; one row is shorter, so that the masks are written out as
            in most batches.
        evaluation_rows: B of an evaluation pass; 0: none.
        dtype: of the weights as the engine holds them. autocast: of torch.autocast
            around the forward, if any.
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
    for part in (model.shared, model.decoder, model.lm_head) if freeze_decoder else ():
        part.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = dict(model.named_parameters())
    place = {id(p): i for i, p in enumerate(parameters.values())}
    live = LiveBytes()
    for p in parameters.values():
        live.add(p)
    base = live.now
    live.restart()
    events: list[Event] = []

    def record(kind: str, weights: tuple[int, ...] = ()) -> None:
        events.append(Event(kind, weights, live.restart() - base, live.now - base))

    def finished(p: Tensor) -> None:
        record("gradient", (place[id(p)],))
        p.grad = None

    for p in parameters.values():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(finished)
    for module in model.modules():
        if own := tuple(sorted({place[id(p)] for p in module.parameters(recurse=False)})):
            _watch(module, own, record)

    attention = _efficient_attention() if fused_attention else contextlib.nullcontext()
    evaluation = 0
    with mode, live, attention:
        batch = _batch(rows, tokens, config)
        live.restart()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = model(batch["ids"], batch["mask"], labels=batch["labels"], noise=batch["noise"])
        rec = reconstruction_nats(out.logits, batch["labels"])
        kl = model.family.of(out.posterior_parameters).kl(model.prior())
        share = loss_share(rec, kl, batch["weight"], torch.ones(kl.shape[1]), rows)
        record("loss")
        share.backward()
        record("end")
        kept = out.logits.untyped_storage().nbytes()
        del out, rec, kl, share, batch
        if evaluation_rows:
            watched, events = events, []  # the hooks go on recording, into a list that nobody reads
            model.eval()
            batch = _batch(evaluation_rows, tokens, config)
            live.restart()
            with torch.no_grad():
                out = model(
                    batch["ids"], batch["mask"], labels=batch["labels"], noise=batch["noise"]
                )
                reconstruction_nats(out.logits, batch["labels"])
            evaluation = max([live.restart() - base, *(event.before for event in events)])
            events = watched
    return DryRun(tuple(events), evaluation, kept)


def _watch(module: nn.Module, own: tuple[int, ...], record: Any) -> None:
    """Records when a module begins and ends its forward and its backward, as ZeRO-3
    fetches and releases weights."""

    class Enter(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            record("leave", own)
            return gradients[0]

    class Leave(Enter):
        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            record("enter", own)
            return gradients[0]

    def before(_: nn.Module, inputs: tuple) -> Any:
        record("enter", own)
        return tuple(
            Enter.apply(x)
            if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
            else x
            for x in inputs
        )

    def after(_: nn.Module, __: tuple, output: Any) -> Any:
        record("leave", own)
        return (
            Leave.apply(output) if isinstance(output, Tensor) and output.requires_grad else output
        )

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _batch(rows: int, tokens: int, config: T5VAEConfig) -> dict[str, Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    labels = torch.zeros(rows, tokens, dtype=torch.int64)
    return {
        "ids": torch.zeros(rows, tokens, dtype=torch.int64),
        "mask": mask,
        "labels": labels,
        "noise": torch.zeros(rows, make_family(config).noise_width),
        "weight": torch.ones(rows),
    }


@contextlib.contextmanager
def _efficient_attention() -> Iterator[None]:
    """Scaled dot-product attention by the memory-efficient kernel, which keeps the
    output and one number a query.

    torch chooses the kernel by the device, and here there is none. (A TorchFunctionMode
    would be off during backward, where gradient checkpointing runs the forward again.)
    """
    stock = F.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            to = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(to), key.to(to), value.to(to)
        bias = attn_mask
        if bias is not None:
            k = key.shape[2]
            bias = bias.to(query.dtype)
            if k % MASK_ALIGNMENT:
                bias = F.pad(bias, (0, MASK_ALIGNMENT - k % MASK_ALIGNMENT))[..., :k]
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], k)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    torch.nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
