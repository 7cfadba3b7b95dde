"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen matrix of a T5 with the product of
two thin ones beside it.

y = W x + (alpha / r) B A x. A (r, in) is drawn and B (out, r) is zero, so that a model
with fresh adapters computes what it computed without them.

The adapters are parameters of the linear layer itself: the pretrained matrix keeps its
name, by which it is read, partitioned, frozen and exported like any other weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsvae.modeling.settings import Count, LoraConfig, convert, declared

_IN_GEMMA = {"gate": "wi", "up": "wi", "down": "wo"}
"""What a T5Gemma calls the projections of its feed-forwards, without their ending."""

_A, _B = "lora_a", "lora_b"


class LoraLinear(nn.Linear):
    """A linear layer without bias, and its adapter.

    Args:
        base: gives the matrix.
        scale: alpha / r.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        assert getattr(base, "bias", None) is None
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(base.out_features, rank))
        self.scale = scale
        for name in (_A, _B):
            draw(name, getattr(self, name))

    def forward(self, input: Tensor) -> Tensor:
        change = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.weight) + self.scale * change


def checked(lora: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `LoraConfig` as a model's configuration has them.

    Raises:
        ValueError: they make no sense.
    """
    kinds = declared(LoraConfig) | {"rank": Count}  # a model without adapters has no `lora`
    lora = {name: convert(lora[name], kind, f"lora.{name}") for name, kind in kinds.items()}
    return lora | {"targets": sorted(set(lora["targets"]))}


def add_adapters(stack: nn.Module, lora: dict[str, Any]) -> None:
    """Gives the linear layers of a stack that `lora` names fresh adapters."""
    for module in list(stack.modules()):
        for key, child in list(module.named_children()):
            kind = key.partition("_")[0]
            if isinstance(child, nn.Linear) and _IN_GEMMA.get(kind, kind) in lora["targets"]:
                setattr(module, key, LoraLinear(child, lora["rank"], scale_of(lora)))


def scale_of(lora: dict[str, Any]) -> float:
    """Returns alpha / r, the factor on B A."""
    return lora["alpha"] / lora["rank"]


def is_adapter(name: str) -> bool:
    """Returns whether the parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in (_A, _B)


@torch.no_grad()
def draw(name: str, out: Tensor) -> Tensor:
    """Fills a parameter of an adapter with its first value, and returns it: A has unit
    scale for unit-scale input."""
    return out.zero_() if name.endswith(_B) else out.normal_(0.0, out.shape[1] ** -0.5)


def in_peft(name: str) -> str:
    """Returns the name that a parameter of a T5VAE has in a file of the package
    peft."""
    for ours, theirs in ((_A, "lora_A.weight"), (_B, "lora_B.weight")):
        if name.endswith(ours):
            name = name.removesuffix(ours) + theirs
    return f"base_model.model.{name}"


def peft_config(names: Sequence[str], lora: dict[str, Any], base: str) -> dict[str, Any]:
    """Returns the content of an adapter_config.json of peft.

    Args:
        names: of the adapters' parameters, and of others that are saved with them.
        base: the pretrained model.
    """
    adapted = {name.split(".")[-2] for name in names if is_adapter(name)}
    others = {name.partition(".")[0] for name in names if not is_adapter(name)}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": sorted(adapted),
        "modules_to_save": sorted(others),
        "inference_mode": True,
    }


def merged(
    weights: Iterator[tuple[str, Tensor | None]], lora: dict[str, Any]
) -> Iterator[tuple[str, Tensor | None]]:
    """Yields the weights of the model without adapters that computes the same, W +
    scale B A.

    Args:
        weights: whole, in the order of `named_parameters`, where the adapter follows
            its matrix. None: another rank has the value.
    """
    held: tuple[str, Tensor | None] | None = None
    a: Tensor | None = None
    for name, value in weights:
        if name.endswith(_A):
            a = value
        elif name.endswith(_B):
            if held and held[1] is not None and a is not None and value is not None:
                held = held[0], torch.addmm(held[1], value, a, alpha=scale_of(lora))
        else:
            if held:
                yield held
            held = name, value
    if held:
        yield held
