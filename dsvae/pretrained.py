"""A finished model from its directory, for everything that uses one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from dsvae import private_names
from dsvae.data.tokenization import load_tokenizer
from dsvae.errors import UserError, first_line
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig
from dsvae.modeling.weight_source import PICKLES, refuse_pickles

ADVICE = "name the `model` directory that a run left in its output_dir"


def load(model_dir: str | Path) -> tuple[T5VAE, PreTrainedTokenizerBase]:
    """The model in evaluation mode, float32, on CPU, and its tokenizer.

    Args:
        model_dir: a directory, or a hub id.

    Raises:
        UserError: no such directory or hub model, no T5VAE in it, weights or tokenizer
            missing, damaged or not its own, or a release of transformers that does not
            fit.
    """
    private_names.check(private_names.TRANSFORMERS)
    directory = _directory(str(model_dir))
    kind = _model_type(directory)
    if kind != T5VAEConfig.model_type:
        raise UserError(
            f"{directory} holds a {kind} model, not one that dsvae trained: train from it with "
            f"--model {directory} first"
        )
    try:
        refuse_pickles(directory)
    except OSError as error:
        raise UserError(str(error)) from error
    # with `output_loading_info` a pair, which the annotation of transformers does not
    # say
    loaded: Any
    try:
        loaded = T5VAE.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and json each raise their own
        reason = first_line(error)
        raise UserError(
            f"{directory}: its model cannot be loaded ({reason}); export it anew or copy it whole"
        ) from error
    model: T5VAE
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{directory} lacks weights: {', '.join(missing[:3])} ({len(missing)} in all); copy "
            f"it whole"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{directory} has weights that a model of its config.json has not: "
            f"{', '.join(unexpected[:3])} ({len(unexpected)} in "
            "all); copy it whole, config.json as it was"
        )
    tokenizer = load_tokenizer(str(directory))
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has {len(tokenizer)} pieces, its model a vocabulary of "
            f"{model.config.vocab_size}: "
            "they are not of one model"
        )
    return model.eval(), tokenizer


def _directory(name: str) -> Path:
    """The directory of that name, or the one that a hub model of that name was
    downloaded to."""
    directory = Path(name).expanduser()
    if (
        directory.exists()
        or directory.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
    ):
        return directory
    try:
        return Path(snapshot_download(name, ignore_patterns=[f"*{ending}" for ending in PICKLES]))
    except Exception as error:  # the hub's client and the network each raise their own
        reason = first_line(error)
        raise UserError(
            f"{name}: neither a directory nor a hub model that can be reached ({reason}); {ADVICE}"
        ) from error


def _model_type(directory: Path) -> str:
    """What the directory's config.json says it is."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: {'is not a' if directory.exists() else 'no such'} directory; {ADVICE}"
        )
    path = directory / "config.json"
    if not path.is_file():
        hint = (
            f" (is it {directory / 'model'}?)"
            if (directory / "model" / "config.json").is_file()
            else ""
        )
        raise UserError(f"{directory} is no model directory, it has no config.json{hint}; {ADVICE}")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type", "nameless")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a model's configuration ({error}); {ADVICE}"
        ) from error
