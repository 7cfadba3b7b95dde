"""The model card of an exported model, with what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsvae.config import RunConfig
from dsvae.reports.table import result_table

USE = """## Use

```python
from dsvae import T5VAE
from transformers import AutoTokenizer

model, tokenizer = T5VAE.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
batch = tokenizer(["a sentence to encode"], return_tensors="pt", padding=True)
z = model.encode(batch.input_ids, batch.attention_mask).mean
print(tokenizer.batch_decode(model.generate(latent=z, max_new_tokens=40), skip_special_tokens=True))
```

```bash
dsvae evaluate DIR --test_file test.txt    # metrics with standard errors; report.html
dsvae sample DIR -n 20
dsvae reconstruct DIR sentences.txt
dsvae interpolate DIR "one sentence" "another" --steps 8
```
"""

USE_OF_A_LANGUAGE_MODEL = """## Use

```python
import torch
from dsvae import T5VAE
from transformers import AutoTokenizer

model, tokenizer = T5VAE.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
ids = tokenizer("a sentence to score", return_tensors="pt").input_ids
logits = model(labels=ids, latent=torch.zeros(1, 0)).logits
log_p = logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
sampled = model.generate(latent=torch.zeros(4, 0), do_sample=True, max_new_tokens=40)
print(log_p.item(), tokenizer.batch_decode(sampled, skip_special_tokens=True))
```

```bash
dsvae evaluate DIR --test_file test.txt          # its perplexity, with standard errors; report.html
```
"""


def write_card(
    path: Path,
    config: RunConfig,
    metrics: dict[str, Any],
    pairs: list[tuple[str, str]],
    prior: list[str],
) -> None:
    """Writes the model card (README.md with the hub's metadata) of a finished run;
    `pairs` and `prior` are text samples from `dsvae.metrics.text`."""
    phases = {"all": "phase 1 and phase 2", "1": "phase 1", "2": "phase 2"}[config.phase]
    draws = f" {metrics['samples']} sample(s) of z," if _has_latent(config) else ""
    path.write_text(
        f"""{_head(config, phases)}

## Measured

By dsvae {version("dsvae")} at the end of training: means per sentence,{draws}
computed in {metrics["precision"]}.

```
{result_table("test", metrics)}
```

{_use(config)}
## Samples

{_samples(config, pairs, prior)}
""",
        encoding="utf-8",
    )


def write_checkpoint_card(
    path: Path, config: RunConfig, phase: int, step: int, valid: float | None
) -> None:
    """Writes the model card of a checkpoint's model.

    Args:
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
        f"""{_head(config, trained)}
- validation text: {value}

{_use(config)}""",
        encoding="utf-8",
    )


def _head(config: RunConfig, trained: str) -> str:
    """The metadata for the hub, and what the model is."""
    base = config.model.name or "a new T5 from its configuration"
    data = config.data.train_file or config.data.dataset or "dsvae's built-in corpus"
    tag, title = "variational-autoencoder", "A sentence VAE"
    about = f"""A T5 as a variational autoencoder of sentences, finetuned with dsvae
{version("dsvae")} after Park & Lee 2021
(*Finetuning Pretrained Transformers into Variational Autoencoders*)."""
    latent = (
        f"latent dimensions {config.model.latent_dim}, pooling {config.model.pooling}, "
        f"injection\n  {config.model.injection}"
    )
    if not _has_latent(config):
        tag, title, latent = "text-generation", "A language model", "no latent (injection none)"
        about = f"""The decoder of a T5 alone, trained as a language model with dsvae
{version("dsvae")}: the baseline for the perplexities of a sentence VAE."""
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
- trained: {trained}; {latent}"""


def _has_latent(config: RunConfig) -> bool:
    return config.model.injection != "none"


def _use(config: RunConfig) -> str:
    return USE if _has_latent(config) else USE_OF_A_LANGUAGE_MODEL


def _samples(config: RunConfig, pairs: list[tuple[str, str]], prior: list[str]) -> str:
    reconstructions = "\n".join(f"- `{_code(a)}`\n  `{_code(b)}`" for a, b in pairs)
    sentences = "\n".join(f"- `{_code(text)}`" for text in prior)
    if not _has_latent(config):
        return f"The sentence that it decodes greedily:\n\n{sentences}"
    return f"""Test sentences, each followed by the greedy reconstruction from its posterior mean:

{reconstructions}

Greedy sentences with z from the prior:

{sentences}"""


def _code(text: str) -> str:
    """Text inside a code span."""
    return text.replace("`", "'").replace("\n", " ")
