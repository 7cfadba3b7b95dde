"""The projection to the vocabulary, and the loss on it, without all logits at once.

The logits of 8,192 tokens are 1 GB in float32 for T5 (32,128 pieces) and 8 GB for mT5
(250,112), and the loss of torch makes several copies of them. Here they are made for a
few tokens at a time, in two uses: the nats of the tokens, and the gradients of their
weighted sum, which the forward pass keeps in place of the logits. So no logit is
computed twice, and the gradients are exact.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same. It is not used:
in bfloat16 on CPU it was 3 to 5 times slower than the plain loss and its loss was off
by 0.3 to 1.5% (2,048 tokens, 32,128 pieces, width 512); and with a weight per sentence
it computes all logits twice.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsvae.modeling.crf import IGNORE

MOST_LOGITS = 1 << 24
"""How many logits there are at a time: 64 MB in float32."""


class VocabularyHead(nn.Linear):
    """A linear layer without bias, (..., d) -> (..., V), which can also give the loss.

    The loss is a part of this module so that ZeRO 3 gathers its weight once per pass.

    Args:
        cap: the logits l become cap tanh(l / cap), as in Gemma. None: they stay.
    """

    def __init__(
        self, width: int, vocabulary: int, cap: float | None = None, **factory: Any
    ) -> None:
        super().__init__(width, vocabulary, bias=False, **factory)
        self.cap = cap
        self.piece = piece  # in training; it may be replaced by the same compiled

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...

    @overload
    def forward(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, right: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        right: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits; or, with labels, -log p of sentences in nats.

        Args:
            hidden: (B, T, d).
            labels: (B, T), `IGNORE` where there is no token.
            weights: (B,) of the sentences.
            right: (B * T,), is filled with 1 where the most likely piece is the label, 0
                elsewhere.

        Returns: (..., V); or (nats (B,) of each sentence, the sum over its tokens,
            float32 without gradient; the sum of weights * nats, a scalar with gradient).
        """
        if labels is None:
            return _capped(super().forward(hidden), self.cap)
        assert weights is not None
        hidden, weight = hidden.flatten(0, 1), self.weight
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        present = (labels != IGNORE).float()
        scale = (present * weights[:, None]).flatten()
        target = labels.clamp(min=0).flatten()
        nats, total = _Nats.apply(
            hidden, weight, target, scale, self.cap, self.piece if self.training else piece, right
        )
        if right is not None:
            right.mul_((labels != IGNORE).flatten())
        return (nats.view(labels.shape) * present).sum(1), total


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else (logits / cap).tanh() * cap


def piece(
    logits: Tensor, target: Tensor, scale: Tensor, cap: float | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Returns -log p of each target (N,), float32, and the gradient with respect to the
    logits of their sum weighted by `scale` (N,): (N, V) in `dtype`, or None without
    `dtype`. It may overwrite `logits`."""
    logits = _capped(logits.float(), cap)
    of_target = logits.gather(1, target[:, None])
    if dtype is None:
        return (logits.logsumexp(1, keepdim=True) - of_target)[:, 0], None
    slope = None if cap is None else 1 - (logits / cap).square()  # of the cap
    # One pass of exp gives the loss and its gradient, (softmax - one-hot) * scale.
    largest = logits.amax(1, keepdim=True)
    d_logits = logits.sub_(largest).exp_()
    total = d_logits.sum(1, keepdim=True)
    d_logits.mul_(scale[:, None] / total)
    d_logits.scatter_add_(1, target[:, None], -scale[:, None])
    if slope is not None:
        d_logits.mul_(slope)
    return (largest + total.log() - of_target)[:, 0], d_logits.to(dtype)


class _Nats(torch.autograd.Function):
    """(hidden (N, d), weight (V, d), target (N,), scale (N,), cap, piece, right) -> -log p
    of each target (N,), and their sum weighted by `scale`, which alone has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        scale: Tensor,
        cap: float | None,
        piece: Any,
        right: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        ctx.dtype = weight.dtype
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        if torch.is_autocast_enabled(hidden.device.type):
            # Here and not left to autocast: it does not know the sum that adds to the
            # gradient of the weight, which would be a float32 product.
            low = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(low), weight.to(low)
        dtype = hidden.dtype if of_hidden or of_weight else None
        # in float32, so that the sum over the pieces is not rounded at each of them
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        nats = torch.empty_like(scale)
        # Each piece adds to the whole gradient of the weight. With as many rows as the
        # weight is wide, it has as many numbers itself.
        rows = max(weight.shape[1], MOST_LOGITS // len(weight))
        for start in range(0, len(target), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight)
            if right is not None:
                right[part] = logits.argmax(1) == target[part]
            nats[part], d_logits = piece(logits, target[part], scale[part], cap, dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                if d_logits.dtype == torch.float32:
                    d_weight.addmm_(d_logits.T, hidden[part])
                else:
                    d_weight += d_logits.T @ hidden[part]
        ctx.d_hidden, ctx.d_weight = d_hidden, d_weight
        ctx.mark_non_differentiable(nats)
        return nats, nats @ scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (
            None if each is None else each.mul_(d_total) for each in (ctx.d_hidden, ctx.d_weight)
        )
        del ctx.d_hidden, ctx.d_weight
        d_weight = None if d_weight is None else d_weight.to(ctx.dtype)
        return d_hidden, d_weight, *[None] * 5
