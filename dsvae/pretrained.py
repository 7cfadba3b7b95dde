"""Loads a finished model from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedTokenizerBase

from dsvae import private_names
from dsvae.data.tokenization import load_tokenizer
from dsvae.errors import UserError, first_line
from dsvae.modeling.settings import Precision
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig
from dsvae.modeling.weight_source import PICKLES, refuse_pickles
from dsvae.run_directory import RunDirectory

ADVICE = "name the directory `model` in the output_dir of a run"


def load(
    model_dir: str | Path,
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> tuple[T5VAE, PreTrainedTokenizerBase]:
    """Loads the model in evaluation mode, and its tokenizer.

    Args:
        model_dir: a directory, or a hub id.
        device: None: the CPU.
        precision: fp32: float32 weights and products. tf32: float32 weights, whose matrix
            products have 10 bits of mantissa, on NVIDIA GPUs alone; it holds for the
            whole process. bf16: bfloat16 weights, except for the float32 heads.

    Raises:
        UserError: there is no such directory or hub model, or no T5VAE in it; its weights
            or its tokenizer are missing, damaged or those of another model; the device
            lacks the precision; or this release of transformers does not fit.
    """
    device = device or torch.device("cpu")
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision tf32 needs an NVIDIA GPU, not {device}: use fp32 or bf16")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    private_names.check(private_names.TRANSFORMERS)
    directory = find_model(model_dir)
    pair: Any  # because of `output_loading_info`; the annotation of transformers says a model
    try:
        pair = T5VAE.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and json each raise their own
        raise UserError(
            f"{directory}: its model cannot be loaded ({first_line(error)}); export it again, or "
            f"copy the whole directory"
        ) from error
    model: T5VAE
    model, report = pair
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{directory} lacks weights: {', '.join(missing[:3])} ({len(missing)} in all); copy "
            f"the whole directory"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{directory} contains weights its config.json does not describe: "
            f"{', '.join(unexpected[:3])} ({len(unexpected)} in all); copy the whole directory, "
            f"with its original config.json"
        )
    tokenizer = load_tokenizer(str(directory))
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has {len(tokenizer)} pieces, but its model has a "
            f"vocabulary of {model.config.vocab_size}: copy both from the same model"
        )
    nn.Module.to(model, device)  # transformers' own `to` is not annotated
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    return model.eval(), tokenizer


def precision_of(model: T5VAE) -> str:
    """Returns the precision of a model's products: fp32, tf32, bf16 or fp16."""
    dtype = next(model.parameters()).dtype
    if dtype == torch.float32 and model.device.type == "cuda":
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def find_model(model_dir: str | Path) -> Path:
    """Finds the directory of a T5VAE by its config.json; arguments and errors as of
    `load`."""
    directory = find_directory(str(model_dir))
    kind = _model_type(directory)
    if kind != T5VAEConfig.model_type:
        raise UserError(
            f"{directory} contains a {kind} model, not one that dsvae trained: train from it with "
            f"--model {directory} first"
        )
    try:
        refuse_pickles(directory)
    except OSError as error:
        raise UserError(str(error)) from error
    return directory


def find_directory(name: str) -> Path:
    """Finds the directory of that name, or that of a downloaded hub model."""
    directory = Path(name).expanduser()
    is_path = directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or directory.exists():
        return directory
    try:
        return Path(snapshot_download(name, ignore_patterns=[f"*{ending}" for ending in PICKLES]))
    except Exception as error:  # the hub's client and the network each raise their own
        raise UserError(
            f"{name}: neither a directory nor a hub model that can be reached "
            f"({first_line(error)}); {ADVICE}"
        ) from error


def _model_type(directory: Path) -> str:
    """Reads the `model_type` in the directory's config.json."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: {'is not a' if directory.exists() else 'no such'} directory; {ADVICE}"
        )
    path = directory / "config.json"
    if not path.is_file():
        below = RunDirectory(directory).model
        hint = f" (is it {below}?)" if (below / "config.json").is_file() else ""
        raise UserError(f"{directory} has no config.json{hint}; {ADVICE}")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type", "nameless")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a model's configuration ({error}); {ADVICE}"
        ) from error
