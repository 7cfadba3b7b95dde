"""A model at the command line: loaded, seeded, and its counts reported at the end."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from dsvae.config import convert
from dsvae.console import say
from dsvae.generation.options import check
from dsvae.generation.reading import no_sentences
from dsvae.generation.sentence_vae import SentenceVAE
from dsvae.modeling.settings import Precision, Seed


@contextmanager
def session(
    model_dir: str,
    *,
    device: str | None,
    precision: Precision,
    max_tokens: int,
    batch_size: int = 128,
    options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    draws: bool = False,
    conditions: bool = False,
) -> Iterator[tuple[SentenceVAE, int]]:
    """Opens a model; yields it and the seed of its random numbers.

    Args:
        model_dir, device, precision, max_tokens, batch_size: as of `SentenceVAE.from_pretrained`.
        options: of transformers' `generate`; they are checked before the model loads.
        seed: None draws a fresh one.
        draws: whether something besides the tokens is random. A fresh seed is printed
            wherever anything is random.
        conditions: whether the sentences have conditions.

    Raises:
        UserError: as `SentenceVAE.from_pretrained`, or a mistake in the other arguments,
            or conditions are missing or not read.
    """
    options = options or {}
    check(options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vae = SentenceVAE.from_pretrained(
        model_dir,
        device=device,
        precision=precision,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    vae.inputs.check(conditions)
    chosen = secrets.randbits(32) if seed is None else convert(seed, Seed, "--seed")
    if seed is None and (draws or options.get("do_sample")):
        say(f"seed {chosen} (--seed {chosen} repeats this)")
    torch.manual_seed(chosen)
    yield vae, chosen
    counts = vae.counts
    if counts.blank:
        say(f"{counts.blank} blank sentences skipped")
    if counts.truncated:
        say(f"{counts.truncated} sentences truncated to {max_tokens} tokens (--max_tokens)")
    if counts.conditions_truncated:
        say(
            f"{counts.conditions_truncated} conditions truncated to {max_tokens} tokens "
            f"(--max_tokens)"
        )
    if counts.unfinished:
        say(f"{counts.unfinished} generated sentences cut before their end (--max_new_tokens)")


def check_not_empty(vae: SentenceVAE, file: str | None) -> None:
    """Raises UserError if a stream held no sentence.

    Args:
        file: what it was read from; stdin for None and "-".
    """
    if not vae.counts.sentences:
        raise no_sentences("stdin" if file in (None, "-") else str(file))
