"""The model card of an exported model, with what was measured. Its text is in
card.md.jinja."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dsvae.config import RunConfig, phase_name
from dsvae.data.sources import source_of
from dsvae.files import write_text
from dsvae.modeling.families import make_family
from dsvae.phases import Phase
from dsvae.reports.table import result_table
from dsvae.reports.templates import render


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
        pairs, prior: text samples from `dsvae.metrics.reconstruction.samples`.
    """
    trained = " and ".join(phase_name(phase) for phase in config.phases)
    table = result_table("test", metrics)
    _write(path, config, model, trained, metrics=metrics, table=table, pairs=pairs, prior=prior)


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
    steps = Phase(phase, config, 0).steps
    trained = f"step {step} of {steps} of {phase_name(phase)}, a checkpoint"
    measured = "not measured at this step"
    if valid is not None:
        names = {1: "rec {:.2f} nats per sentence", 2: "rec + kl {:.2f} nats per sentence"}
        measured = names.get(phase, "flow_loss {:.4f}").format(valid)
    _write(path, config, model, trained, metrics=None, measured=measured)


def _write(
    path: Path, config: RunConfig, model: PreTrainedConfig, trained: str, **values: Any
) -> None:
    values |= {"source": source_of(config.data).description, "family": make_family(model)}
    values["version"] = version("dsvae")
    write_text(path, render("card.md.jinja", config=config, model=model, trained=trained, **values))
