"""What a run says on the console of its data, its phases and its end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from dsvae.config import RunConfig
from dsvae.data.prepared import Prepared
from dsvae.engine.engine import PhaseEngine
from dsvae.phases import Phase
from dsvae.reports.table import result_table
from dsvae.reports.training_log import data_lines
from dsvae.run_directory import RunDirectory

_SHOWN_LABELS = 10


def data_text(data: Prepared, ranks: int) -> str:
    """What a run trains on, with a warning where it is measured on what it trains on."""
    lines = [data_lines(data.report, ranks), *_columns_lines(data)]
    for split in ("valid", "test"):
        if copies := data.report["splits"][split]["in_train"]:
            lines.append(
                f"warning: {copies} of the {len(data.splits[split])} {split} sentences are also "
                f"training sentences"
            )
    return "\n".join(lines)


def _columns_lines(data: Prepared) -> list[str]:
    """One line on conditions, labels and tags, where there are any."""
    parts = data.report["splits"].values()
    figures: Counter[str] = Counter()
    for part in parts:
        figures.update({name: value for name, value in part.items() if isinstance(value, int)})
    said = []
    if "conditions_truncated" in figures:
        said.append(f"{figures['conditions_truncated']:,} conditions truncated")
    if data.labels:
        names = f"{len(data.labels)} labels"
        if len(data.labels) <= _SHOWN_LABELS:
            names = f"labels: {', '.join(data.labels)}"
        said.append(f"{figures['labelled']:,} records with a label ({names})")
    if data.tags:
        said.append(
            f"{figures['tagged']:,} records with tags ({len(data.tags)} different, "
            f"{figures['tags_truncated']:,} truncated)"
        )
    if not said:
        return []
    return [f"      of {figures['sentences']:,} records: {'; '.join(said)}"]


def phase_text(phase: Phase, engine: PhaseEngine, ds_config: Path) -> str:
    """What a phase trains with. `ds_config` is the file with its resolved
    configuration."""
    line = (
        f"phase {phase.number}: {phase.steps:,} steps of {phase.config.data.batch_size} sentences, "
        f"ZeRO {engine.zero_stage}, {engine.precision}; its ds_config is {ds_config}"
    )
    if engine.precision != "fp16":
        return line
    return (
        "warning: T5 was trained in bf16 and overflows easily in fp16; prefer bf16 where the "
        f"GPU has it\n{line}"
    )


def finished_text(config: RunConfig) -> str:
    """The results of a finished run, and where everything is."""
    directory = RunDirectory(config.output_dir)
    if config.phase == "1":
        return (
            f"phase 1 is finished: its weights are in {directory.phase1_model}; go on with "
            f"--phase 2"
        )
    metrics = json.loads(directory.metrics.read_text(encoding="utf-8"))["test"]
    return (
        f"{result_table('test', metrics)}\n"
        f"model       {directory.model}  (T5VAE.from_pretrained; its README.md is the model "
        f"card)\n"
        f"metrics     {directory.metrics}, {directory.metrics_jsonl}\n"
        f"TensorBoard tensorboard --logdir {directory.tensorboard}"
    )
