"""What a run says on the console of its data, its phases and its end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dsvae.config import RunConfig, phase_name
from dsvae.data.order import Mixture
from dsvae.engine.engine import PhaseEngine
from dsvae.phases import Phase
from dsvae.reports.table import result_table
from dsvae.run_directory import RunDirectory

_SHOWN_LABELS = 10


def data_text(report: dict[str, Any], ranks: int) -> str:
    """Says what a run trains on, with a warning if it is measured on the same
    sentences."""
    splits: dict[str, dict[str, Any]] = report["splits"]
    sizes = (
        f"{name} {part['sentences']:,}{' (held out)' if part['held_out'] else ''}"
        for name, part in splits.items()
    )
    blank, cut, unk, repeated = (
        sum(part[name] for part in splits.values())
        for name in ("skipped_blank", "truncated", "unk", "repeated")
    )
    lines = [
        f"data: {report['source']}; {ranks} rank{'s' if ranks > 1 else ''}",
        f"      sentences: {', '.join(sizes)}; {splits['train']['tokens']:,} tokens to train on, "
        f"of {report['vocab_size']:,} pieces",
        f"      {blank:,} blank lines skipped, {cut:,} sentences truncated to "
        f"{report['max_tokens']} tokens, {unk:,} unknown tokens, {repeated:,} repeated sentences",
        *_columns_lines(report),
    ]
    if dropped := splits["train"].get("dropped"):
        lines.append(
            f"      {dropped:,} training sentences dropped that are also validation or test "
            f"sentences"
        )
    for name in ("valid", "test"):
        if copies := splits.get(name, {}).get("in_train"):
            lines.append(
                f"warning: {copies} of the {splits[name]['sentences']} {name} sentences are also "
                f"training sentences; --data.deduplicate drops those from training"
            )
    return "\n".join(lines)


def mixture_text(files: list[dict[str, Any]], mixture: Mixture, config: RunConfig) -> str:
    """Says of each training file of a mixture, in a line: its sentences, its share of
    the steps, and how often each phase goes through it.

    Args:
        files: their names and numbers of sentences, from the report on the data.
    """
    steps = {1: config.phase1.steps, 2: config.phase2.steps, 3: config.prior.steps}
    lines = []
    for file, share in zip(files, mixture.shares, strict=True):
        epochs = " and ".join(
            f"{n * config.data.batch_size * share / file['sentences']:.3g} in {phase_name(phase)}"
            for phase, n in steps.items()
            if phase in config.phases
        )
        lines.append(
            f"      {file['name']}: {file['sentences']:,} sentences, {share:.4g} of every step, "
            f"epochs: {epochs}"
        )
    return "\n".join(lines)


def _columns_lines(report: dict[str, Any]) -> list[str]:
    """Writes one line on conditions, labels and tags, if there are any."""
    parts = report["splits"].values()
    figures: Counter[str] = Counter()
    for part in parts:
        figures.update({name: value for name, value in part.items() if isinstance(value, int)})
    said = []
    if "conditions_truncated" in figures:
        said.append(f"{figures['conditions_truncated']:,} conditions truncated")
    if labels := report.get("labels"):
        names = f"{len(labels)} labels"
        if len(labels) <= _SHOWN_LABELS:
            names = f"labels: {', '.join(labels)}"
        said.append(f"{figures['labelled']:,} records with a label ({names})")
    if tags := report.get("tags"):
        said.append(
            f"{figures['tagged']:,} records with tags ({len(tags)} different, "
            f"{figures['tags_truncated']:,} truncated)"
        )
    if not said:
        return []
    return [f"      of {figures['sentences']:,} records: {'; '.join(said)}"]


def phase_text(phase: Phase, engine: PhaseEngine, ds_config: Path) -> str:
    """Says what a phase trains with; `ds_config` is its resolved configuration."""
    line = (
        f"{phase_name(phase.number)}: {phase.steps:,} steps of {phase.config.data.batch_size} "
        f"sentences, ZeRO {engine.zero_stage}, {engine.precision}; its ds_config is {ds_config}"
    )
    if engine.precision != "fp16":
        return line
    return (
        "warning: T5 was trained in bf16 and overflows easily in fp16; prefer bf16 if the "
        f"GPU has it\n{line}"
    )


def finished_text(config: RunConfig) -> str:
    """Writes the results of a finished run, and where everything is."""
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
