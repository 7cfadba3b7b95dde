"""What training costs: tokens and floating-point operations per second, and memory.

Only the operations that the model's formula needs are counted. Padding, activations that
gradient checkpointing computes again, the KL ahead of a step with free bits, and
everything that is not a matrix product are left out. docs/operations.md has the formula.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from dsvae.data.batches import MicroBatch, Step
from dsvae.modeling.crf import IGNORE
from dsvae.modeling.lora import LoraLinear
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.device import local_device

PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}
"""Words of a device's name -> its FLOP/s for dense matrices in 16 bits, from its
vendor's data sheet. The first entry that matches is used."""


CROSS_KEYS = (
    ".EncDecAttention.k",
    ".EncDecAttention.v",
    ".cross_attn.k_proj",
    ".cross_attn.v_proj",
)
"""How the names of the layers end that make keys and values of encoder states."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a forward and backward pass, by what they grow
    with.

    A multiplication and an addition are two operations. A trained matrix is multiplied
    three times: forward, and backward for its input and for itself. A frozen matrix
    needs no gradient for itself.
    """

    encoder_token: float
    encoder_pair: float
    """Per query and key of self-attention, over all layers and heads."""
    decoder_token: float
    decoder_pair: float
    slots: int
    """Keys per decoder layer that are made of z."""
    sentence: float
    vector: float = 0.0
    """Per vector of z, of a denoiser that trains."""
    chunk: int = 0
    """Tokens per vector; 0: all texts have all."""

    @classmethod
    def of(cls, model: T5VAE) -> ModelFlops:
        """Counts the weights of a model, sharded or not."""
        per: Counter[str] = Counter()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                adapter = (module.lora_a, module.lora_b) if isinstance(module, LoraLinear) else ()
                for weight in (module.weight, *adapter):
                    size = getattr(weight, "ds_numel", weight.numel())  # ZeRO 3 leaves an empty one
                    per[_grows_with(name)] += size * (6 if weight.requires_grad else 4)
        if model.config.denoiser:
            return cls._of_prior(model)
        backbone, injection = model.config.backbone, model.injection
        # queries times keys, and the weights times values; each also twice backward
        pair = 12 * backbone.query_heads * backbone.head_width
        encoder_pair = 12 * backbone.encoder_heads * backbone.head_width
        # Cross-attention makes keys and values of the vectors that z became.
        of_slots, of_token = (injection.slots, 0) if injection.in_cross_attention else (0, 1)
        return cls(
            encoder_token=per["encoder token"],
            encoder_pair=encoder_pair * backbone.encoder_layers if hasattr(model, "encoder") else 0,
            decoder_token=per["decoder token"] + of_token * per["cross key"],
            decoder_pair=pair * backbone.decoder_layers,
            slots=injection.slots,
            sentence=per["sentence"] + of_slots * per["cross key"],
        )

    @classmethod
    def _of_prior(cls, model: T5VAE) -> ModelFlops:
        """Counts the phase `prior`: the frozen encoder goes forward once. The denoiser goes
        forward twice, once for its own estimate, and backward once."""
        found: Counter[str] = Counter()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            size = getattr(module.weight, "ds_numel", module.weight.numel())
            if not name.startswith("denoiser."):
                found[_grows_with(name)] += 2 * size
            elif name.endswith("modulation") or ".clock." in name:
                found["sentence"] += 8 * size
            else:
                found["vector"] += 8 * size
        backbone, chunked = model.config.backbone, model.config.pooling == "chunks"
        pair = 4 * backbone.encoder_heads * backbone.head_width * backbone.encoder_layers
        every = found["vector"] * model.config.latent_vectors
        return cls(
            encoder_token=found["encoder token"],
            encoder_pair=pair,
            decoder_token=0.0,
            decoder_pair=0.0,
            slots=0,
            sentence=found["sentence"] + (0.0 if chunked else every),
            vector=found["vector"] if chunked else 0.0,
            chunk=model.config.chunk if chunked else 0,
        )

    def count(self, batch: MicroBatch) -> float:
        """Counts the operations for the tokens of one rank's micro-batch, without
        padding and fillers."""
        weight = batch.weight.double()
        encoder = batch.attention_mask.sum(1).double()  # (B,) tokens
        decoder = (batch.labels != IGNORE).sum(1).double()
        operations = (
            self.encoder_token * encoder
            + self.encoder_pair * encoder**2
            + self.decoder_token * decoder
            + self.decoder_pair * decoder * (decoder + self.slots)
            + self.sentence
        )
        if self.chunk:
            operations += self.vector * (encoder / self.chunk).ceil()
        return float(weight @ operations)


def _grows_with(name: str) -> str:
    """Returns what a linear layer of this name is applied to."""
    if name.startswith(("encoder.", "posterior.pooling.")):
        return "encoder token"
    if name.endswith(CROSS_KEYS):
        return "cross key"
    return "decoder token" if name.startswith(("decoder.", "lm_head")) else "sentence"


class Speed:
    """Work per second between two readings, and peak memory.

    Args:
        model: as the phase trains it, with the phase's frozen parameters.
        precision: in which the engine multiplies: fp32, bf16 or fp16.
    """

    def __init__(self, model: T5VAE, precision: str) -> None:
        self._flops, self._peak = ModelFlops.of(model), peak_flops(precision)
        self._since, self._tokens, self._operations = time.monotonic(), 0, 0.0

    def count(self, step: Step) -> None:
        """Adds one optimizer step."""
        self._tokens += step.tokens
        self._operations += sum(map(self._flops.count, step.micro_batches))

    def read(self) -> dict[str, float]:
        """Returns the metrics since the last reading.

        `tokens_per_s` counts the predicted tokens of all ranks. `flops_per_s` is of this
        rank, and so is `mfu`, its share of what the device could do, if that is known.
        `peak_memory_gb` (10^9 bytes) is since the start.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = {
            "tokens_per_s": self._tokens / seconds,
            "flops_per_s": self._operations / seconds,
            "peak_memory_gb": peak_memory() / 1e9,
        }
        if self._peak is not None:
            speed["mfu"] = speed["flops_per_s"] / self._peak
        self._since, self._tokens, self._operations = time.monotonic(), 0, 0.0
        return speed


def peak_flops(precision: str) -> float | None:
    """Returns the FLOP/s that this rank's device could do in 16 bits; None for an
    unlisted device, and in fp32, where it depends on torch's settings."""
    if precision == "fp32" or local_device().type != "cuda":
        return None
    words = set(torch.cuda.get_device_name().replace("-", " ").split())
    return next((peak for name, peak in PEAKS.items() if words >= set(name.split())), None)


def peak_memory() -> int:
    """Returns the largest number of bytes that this process has held since its start:
    GPU memory on a GPU, else resident host memory."""
    if local_device().type != "cpu":
        return torch.accelerator.max_memory_allocated()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB
