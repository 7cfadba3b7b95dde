"""The model card of an exported model, with what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dsvae.config import RunConfig
from dsvae.data.sources import source_of
from dsvae.reports.card_use import use
from dsvae.reports.table import result_table

SHOWN_NAMES = 20
"""The most classes or tags that are listed."""


def write_card(
    path: Path,
    config: RunConfig,
    model: PreTrainedConfig,
    metrics: dict[str, Any],
    pairs: list[tuple[str, str]],
    prior: list[str],
) -> None:
    """Writes the model card (README.md with the hub's metadata) of a finished run.

    Args:
        model: the configuration of its model.
        pairs, prior: text samples from `dsvae.metrics.text`.
    """
    phases = {"all": "phase 1 and phase 2", "1": "phase 1", "2": "phase 2"}[config.phase]
    draws = f" {metrics['samples']} sample(s) of z," if model.latent_dim else ""
    path.write_text(
        f"""{_head(config, model, phases)}

## Measured

By dsvae {version("dsvae")} at the end of training: means per sentence,{draws}
computed in {metrics["precision"]}.

```
{result_table("test", metrics)}
```

{use(model, config.data)}
## Samples

{_samples(model, pairs, prior)}
""",
        encoding="utf-8",
    )


def write_checkpoint_card(
    path: Path,
    config: RunConfig,
    model: PreTrainedConfig,
    phase: int,
    step: int,
    valid: float | None,
) -> None:
    """Writes the model card of a checkpoint's model.

    Args:
        model: the configuration of the model.
        step: optimizer steps done in that phase.
        valid: rec (phase 1) or rec + kl (phase 2) on validation text in nats per
            sentence; None if it was not measured at this step.
    """
    steps = (config.phase1 if phase == 1 else config.phase2).steps
    trained = f"step {step} of {steps} of phase {phase}, a checkpoint"
    value = "not measured at this step"
    if valid is not None:
        value = f"{'rec' if phase == 1 else 'rec + kl'} {valid:.2f} nats per sentence"
    path.write_text(
        f"""{_head(config, model, trained)}
- validation text: {value}

{use(model, config.data)}""",
        encoding="utf-8",
    )


def _head(config: RunConfig, model: PreTrainedConfig, trained: str) -> str:
    """The metadata for the hub, and what the model is."""
    base = config.model.name or "a new T5 from its configuration"
    data = source_of(config.data).description
    tag, title = "variational-autoencoder", "A sentence VAE"
    about = f"""A T5 as a variational autoencoder of sentences, finetuned with dsvae
{version("dsvae")} after Park & Lee 2021
(*Finetuning Pretrained Transformers into Variational Autoencoders*)."""
    if not model.latent_dim and model.conditional:
        tag, title = "text-generation", "From a condition to a sentence"
        about = f"""A T5 from a condition to a sentence, trained with dsvae
{version("dsvae")}: the baseline for the perplexities of a conditional sentence VAE."""
    elif not model.latent_dim:
        tag, title = "text-generation", "A language model"
        about = f"""The decoder of a T5 alone, trained as a language model with dsvae
{version("dsvae")}: the baseline for the perplexities of a sentence VAE."""
    lines = "\n".join(f"- {line}" for line in _parts(model))
    return f"""---
library_name: transformers
tags:
- dsvae
- {tag}
---

# {title}

{about}

- from: {base}
- data: {data}
- trained: {trained}
{lines}"""


def _parts(model: PreTrainedConfig) -> list[str]:
    """The latent, the prior, the condition and the heads, one line each."""
    if model.latent_dim:
        lines = [f"latent: {_latent(model)}; pooling {model.pooling}, injection {model.injection}"]
    else:
        lines = ["no latent (injection none)"]
    if model.conditional:
        reads = "the condition and the sentence" if model.latent_dim else "the condition"
        lines.append(f"condition: the decoder reads it; the encoder reads {reads}")
        if model.latent_dim:
            learned = model.prior == "learned"
            lines.append(
                "prior: learned, p(z|c) of the condition c"
                if learned
                else "prior: fixed, the same for every condition"
            )
    elif model.posterior_reads == "condition":
        lines.append("condition: the encoder reads it and no sentence; the decoder reads z alone")
    heads = [f"{model.clusters} clusters"] if model.clusters else []
    for kind, names in (("classes", model.classes), ("tags", model.tags)):
        if names:
            shown = ", ".join(names[:SHOWN_NAMES])
            more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
            heads.append(f"{kind} {shown}{more}")
    return [*lines, f"heads: {'; '.join(heads)}"] if heads else lines


def _latent(model: PreTrainedConfig) -> str:
    """The family and its size."""
    units = model.latent_dim
    if model.family == "categorical":
        return f"{units} categorical variables of {model.categories} values"
    if model.family == "spike_slab":
        a, b = model.spike_prior
        return f"{units} dimensions, spike and slab, prior Beta({a:g}, {b:g})"
    return f"{units} dimensions, Gaussian"


def _samples(model: PreTrainedConfig, pairs: list[tuple[str, str]], prior: list[str]) -> str:
    reconstructions = "\n".join(f"- `{_code(a)}`\n  `{_code(b)}`" for a, b in pairs)
    sentences = "\n".join(f"- `{_code(text)}`" for text in prior)
    after = ", each after its condition" if model.conditional else ""
    if not model.latent_dim:
        one = "The sentence that it decodes greedily"
        return f"{f'Greedy sentences{after}' if after else one}:\n\n{sentences}"
    return f"""Test sentences, each followed by its greedy reconstruction:

{reconstructions}

Greedy sentences with z from the prior{after}:

{sentences}"""


def _code(text: str) -> str:
    """Text inside a code span."""
    return text.replace("`", "'").replace("\n", " ")
