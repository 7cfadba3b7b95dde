"""The public T5-family models whose configurations are known without a download.

Only fields that decide sizes: d_model, d_kv, d_ff, layers (encoder and decoder), heads,
vocabulary, and the kind of feed-forward. Dropout is 0.1 in all of them but T5Gemma,
which has none; what is not here has the same value in every T5Gemma, that of
transformers.
"""

from __future__ import annotations

import copy
from typing import Any

V1, GATED, GATED_SILU = "relu", "gated-gelu", "gated-silu"

# d_model, d_kv, d_ff, encoder layers, decoder layers, heads
_T5 = {
    "small": (512, 64, 2048, 6, 6, 8),
    "base": (768, 64, 3072, 12, 12, 12),
    "large": (1024, 64, 4096, 24, 24, 16),
    "3b": (1024, 128, 16384, 24, 24, 32),
    "11b": (1024, 128, 65536, 24, 24, 128),
}
_V11 = {
    "small": (512, 64, 1024, 8, 8, 6),
    "base": (768, 64, 2048, 12, 12, 12),
    "large": (1024, 64, 2816, 24, 24, 16),
    "xl": (2048, 64, 5120, 24, 24, 32),
    "xxl": (4096, 64, 10240, 24, 24, 64),
}
_BYT5 = {
    "small": (1472, 64, 3584, 12, 4, 6),
    "base": (1536, 64, 3968, 18, 6, 12),
    "large": (1536, 64, 3840, 36, 12, 16),
    "xl": (2560, 64, 6720, 36, 12, 32),
    "xxl": (4672, 64, 12352, 36, 12, 64),
}
_UL2 = (4096, 256, 16384, 32, 32, 16)
# of one side: width, feed-forward, layers, heads of queries and of keys, width of a head
_GEMMA = {
    "s": (512, 1024, 8, 8, 8, 64),
    "b": (768, 2048, 12, 12, 12, 64),
    "l": (1024, 2816, 24, 16, 16, 64),
    "ml": (1152, 6912, 26, 4, 4, 256),
    "xl": (2048, 5120, 24, 32, 32, 64),
    "2b": (2304, 9216, 26, 8, 4, 256),
    "9b": (3584, 14336, 42, 16, 8, 256),
}
_T5GEMMA = ("s-s", "b-b", "l-l", "ml-ml", "xl-xl", "2b-2b", "9b-2b", "9b-9b")


def _config(kind: str, shape: tuple[int, ...], vocab: int, feed_forward: str) -> dict[str, Any]:
    names = ("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
    config: dict[str, Any] = {"model_type": kind, **dict(zip(names, shape, strict=True))}
    config |= {"vocab_size": vocab, "feed_forward_proj": feed_forward}
    config |= {"dropout_rate": 0.1, "decoder_start_token_id": 0}
    if kind == "t5":
        config["tie_word_embeddings"] = feed_forward == V1
    return config


def _side(size: str) -> dict[str, int]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    return dict(zip(names, _GEMMA[size], strict=True))


def _known() -> dict[str, dict[str, Any]]:
    configs = {f"google-t5/t5-{size}": _config("t5", _T5[size], 32128, V1) for size in _T5}
    for size, shape in _V11.items():
        configs[f"google/t5-v1_1-{size}"] = _config("t5", shape, 32128, GATED)
        configs[f"google/flan-t5-{size}"] = _config("t5", shape, 32128, GATED)
        configs[f"google/mt5-{size}"] = _config("mt5", shape, 250112, GATED)
        if size != "large":  # there is no umt5-large
            configs[f"google/umt5-{size}"] = _config("umt5", shape, 256384, GATED)
    for size, shape in _BYT5.items():
        configs[f"google/byt5-{size}"] = _config("t5", shape, 384, GATED) | {
            "tie_word_embeddings": False
        }
    for sizes in _T5GEMMA:
        encoder, decoder = (_side(size) for size in sizes.split("-"))
        for variant in ("prefixlm", "prefixlm-it", "ul2", "ul2-it"):
            configs[f"google/t5gemma-{sizes}-{variant}"] = {
                "model_type": "t5gemma",
                "encoder": encoder,
                "decoder": decoder,
            }
    for name in ("google/ul2", "google/flan-ul2"):
        configs[name] = _config("t5", _UL2, 32128, GATED_SILU)
    return configs


KNOWN = _known()
"""Configuration of every known model by its hub id."""


def known_name(name: str) -> str | None:
    """Returns the hub id of a public model, also of its last part; None if unknown."""
    candidates = (name, f"google-t5/{name}", f"google/{name}")
    return next((candidate for candidate in candidates if candidate in KNOWN), None)


def configuration_of(name: str) -> dict[str, Any] | None:
    """Returns the T5 configuration of a public model; None for an unknown name."""
    known = known_name(name)
    return None if known is None else copy.deepcopy(KNOWN[known])
