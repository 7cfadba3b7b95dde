"""What a run tells: the console, metrics.jsonl and TensorBoard. Rank 0 alone reports.

Both phases share one axis of optimizer steps: phase 2 goes on counting where phase 1
ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from dsvae.config import RunConfig, flatten, to_tree
from dsvae.files import finite, write_text
from dsvae.metrics.catalog import BASELINE, MEANING, described
from dsvae.metrics.throughput import peak_flops
from dsvae.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# TensorBoard sorts groups of tags by name, and opens the first few. `main` comes first
# and has what one looks at; `valid` has everything else that an evaluation measures.
_MAIN = ("loss", "rec", "kl", "beta")
_MAIN_OF_EVALUATION = ("mi", "au")
_GAIN = "main/rec_shuffled_minus_rec"
_SPEED = ("tokens_per_s", "flops_per_s", "mfu", "peak_memory_gb")
_CONSTANT = ("samples", "iw_samples", "mi_cap", "sentences", "tokens", "words", "bytes")
"""What is the same in every evaluation: a chart of it is a straight line."""


class Reporter:
    """Writes to `output_dir` as rank 0; elsewhere every method does nothing."""

    def __init__(self, config: RunConfig, enabled: bool) -> None:
        self.enabled, self.config = enabled, config
        self.directory = RunDirectory(config.output_dir)
        self._bar: tqdm | None = None
        self._writer: SummaryWriter | None = None
        self._jsonl: TextIO | None = None
        self._kl_per_dim: list[tuple[int, list[float]]] = []
        """(step, KL of every dimension in nats) of the validations so far."""

    def open(self, first_step: int) -> None:
        """Starts writing at global step `first_step`; what a cut run wrote from there
        on is dropped, so no step comes twice."""
        if not self.enabled:
            return
        path = self.directory.metrics_jsonl
        self._kl_per_dim = [
            (row["step"], row["kl_per_dim"])
            for row in _truncate_jsonl(path, first_step)
            if row["split"] == "valid"
        ]
        self._jsonl = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(self.directory.tensorboard), purge_step=first_step)
        self._writer.add_custom_scalars(_layout(self.config.model.injection != "none"))

    def say(self, text: str) -> None:
        """A line on the console, beside the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def detail(self, text: str) -> None:
        """A line for those who ask for `verbose`."""
        if self.config.verbose:
            self.say(text)

    def start_phase(self, phase: int, steps: int, done: int) -> None:
        """A progress bar for a phase of `steps` optimizer steps of which `done` are
        done."""
        if self.enabled:
            # A log file gets a line a minute instead of thousands of redrawn bars.
            interval = 0.5 if sys.stderr.isatty() else 60.0
            self._bar = tqdm(
                total=steps,
                initial=done,
                desc=f"phase {phase}",
                unit="step",
                mininterval=interval,
                maxinterval=interval,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def advance(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def end_phase(self) -> None:
        """Closes the bar of a phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def scalars(
        self, step: int, phase: int, values: dict[str, float], kl_per_dim: list[float]
    ) -> None:
        """One logged training step: global `step`, named values (rec, kl and loss in
        nats per sentence, those of `Speed.read` among them)."""
        if not self.enabled:
            return
        self._record(
            {"step": step, "phase": phase, "split": "train", **values, "kl_per_dim": kl_per_dim}
        )
        assert self._writer is not None
        for name, value in values.items():
            group = "main" if name in _MAIN else "speed" if name in _SPEED else "other"
            self._writer.add_scalar(f"{group}/{name}", value, step)
        if self._bar is not None:
            self._bar.set_postfix_str(_postfix(values), refresh=False)

    def evaluation(self, step: int, phase: int, split: str, metrics: dict[str, Any]) -> None:
        """An evaluation at global `step`."""
        if not self.enabled:
            return
        self._record({"step": step, "phase": phase, "split": split, **metrics})
        assert self._writer is not None
        for name, value in _charted(metrics).items():
            main = split == "valid" and name in _MAIN_OF_EVALUATION
            self._writer.add_scalar(f"{'main' if main else split}/{name}", value, step)
        if split == "valid" and metrics["kl_per_dim"]:
            self._writer.add_scalar(_GAIN, metrics["rec_shuffled"] - metrics["rec"], step)
            self._kl_per_dim.append((step, metrics["kl_per_dim"]))
            self._writer.add_figure("valid/kl_per_dim", _kl_figure(self._kl_per_dim), step)

    def text(self, step: int, pairs: list[tuple[str, str]], prior: list[str]) -> None:
        """Reconstructions (original, reconstruction) and sentences from the prior; of a
        language model one greedy sentence."""
        if not self.enabled or not (pairs or prior):
            return
        assert self._writer is not None
        if pairs:
            rows = "\n".join(f"| {_cell(a)} | {_cell(b)} |" for a, b in pairs)
            self._writer.add_text(
                "reconstruction",
                f"| sentence | reconstruction of its mean |\n|---|---|\n{rows}",
                step,
            )
        self._writer.add_text("prior", "\n".join(f"- {_cell(text)}" for text in prior), step)
        self._record(
            {
                "step": step,
                "split": "text",
                "reconstruction": [list(pair) for pair in pairs],
                "prior": prior,
            }
        )

    def flush(self) -> None:
        """Puts on the disk what was reported so far: before a checkpoint, behind which
        nothing is reported again."""
        if self._jsonl is not None and self._writer is not None:
            os.fsync(self._jsonl.fileno())
            self._writer.flush()

    def close(self, final: dict[str, Any] | None) -> None:
        """Writes hparams with the final metrics, if there are any, and closes the
        files."""
        self.end_phase()
        if self._writer is not None:
            if final is not None:
                # The metrics are the scalars of the final evaluation, which are there
                # already.
                numbers = {f"test/{name}": value for name, value in _charted(final).items()}
                # Into this run's own event file: `SummaryWriter.add_hparams` would open
                # a second run beside it.
                for summary in hparams(_hyperparameters(self.config), numbers):
                    self._writer._get_file_writer().add_summary(summary)
            self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()
        self._writer = self._jsonl = None

    def _record(self, row: dict[str, Any]) -> None:
        assert self._jsonl is not None
        self._jsonl.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
        self._jsonl.flush()


OF_A_RUN = (
    "rec",
    "kl",
    "elbo",
    "entropy",
    "above_entropy",
    "ppl_token",
    "ppl_word",
    "bits_per_byte",
    "nll_iw",
    "iw_samples",
    "iw_ess",
    "mi",
    "mi_upper",
    "mi_cap",
    "marginal_kl",
    "au",
    "rec_shuffled",
    "rec_prior",
)
"""The metrics of a run with a latent that people are shown at its end."""


def result_table(title: str, metrics: dict[str, Any]) -> str:
    """The final metrics as lines for people: those of OF_A_RUN, of a language model its
    exact likelihood alone; then what must be known about them.

    Args:
        metrics: of `dsvae.metrics.evaluate`, or the same read back from metrics.json.
    """
    latent = metrics["kl_per_dim"] != []
    rows = described([(name, *MEANING[name]) for name in OF_A_RUN] if latent else BASELINE, metrics)
    lines = [f"{title} ({metrics['sentences']:,} sentences)"]
    lines += [f"  {row.name:<13}{row.value:>10} {row.unit:<14} {row.meaning}" for row in rows]
    lines += [f"warning: {warning}" for warning in metrics.get("warnings", [])]
    return "\n".join(lines)


def data_lines(report: dict[str, Any], ranks: int) -> str:
    """What a run trains on, as lines for people.

    Args:
        report: of `dsvae.data.tokenization.Prepared`.
    """
    splits: dict[str, dict[str, Any]] = report["splits"]
    parts = (
        f"{name} {part['sentences']:,}{' (held out)' if part['held_out'] else ''}"
        for name, part in splits.items()
    )
    blank, cut, unk, repeated = (
        sum(part[name] for part in splits.values())
        for name in ("skipped_blank", "truncated", "unk", "repeated")
    )
    return (
        f"data: {report['source']}; {ranks} rank{'s' if ranks > 1 else ''}\n"
        f"      sentences: {', '.join(parts)}; {splits['train']['tokens']:,} tokens to train on, "
        f"of {report['vocab_size']:,} pieces\n"
        f"      {blank:,} blank lines skipped, {cut:,} sentences truncated to "
        f"{report['max_tokens']} tokens, {unk:,} unknown tokens, {repeated:,} repeated sentences"
    )


def _postfix(values: dict[str, float]) -> str:
    """What stands behind the progress bar."""
    losses = " ".join(f"{name} {values[name]:.4g}" for name in _MAIN)
    flops = values["flops_per_s"]
    if "mfu" in values:
        work = f"MFU {values['mfu']:.0%}"
    else:
        work = f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP/s"
    speed = f"{values['tokens_per_s']:,.0f} tok/s {work} {values['peak_memory_gb']:.2f} GB"
    return f"{losses} | {speed}"


def _charted(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that have a chart of their own."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name not in _CONSTANT
    }


def _layout(latent: bool) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's CUSTOM SCALARS: what belongs together in one chart."""

    def lines(*tags: str) -> list[Any]:
        # TensorBoard takes every tag that begins like this regular expression
        return ["Multiline", [f"{tag}$" for tag in tags]]

    layout = {
        "training": {
            "rec, training and validation": lines("main/rec", "valid/rec"),
            "kl, training and validation": lines("main/kl", "valid/kl"),
            "loss": lines("main/loss"),
            "beta": lines("main/beta"),
        },
        "does z matter": {
            "rec by z: own, another's, prior's": lines(
                "valid/rec", "valid/rec_shuffled", "valid/rec_prior"
            ),
            "rec_shuffled - rec: what z saves": lines(_GAIN),
            "kl and mi": lines("valid/kl", "main/mi"),
            "active units": lines("main/au"),
        },
        "speed": {
            "tokens per second, all ranks": lines("speed/tokens_per_s"),
            "model FLOP/s, rank 0": lines("speed/flops_per_s"),
            "peak memory (GB), rank 0": lines("speed/peak_memory_gb"),
        },
    }
    if not latent:
        del layout["does z matter"]
    if peak_flops("bf16") is not None:
        layout["speed"]["MFU, rank 0"] = lines("speed/mfu")
    return layout


def _kl_figure(history: list[tuple[int, list[float]]]) -> Figure:
    """KL of every dimension (rows) at every validation (columns).

    The colours are those of fixed values on a logarithmic scale, so that images of
    several steps and runs compare: 0.01 nats is nothing, 10 is a lot.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    least, most = 0.01, 10.0
    steps, columns = zip(*history, strict=True)
    image = np.array(columns, dtype=float).T.clip(least, most)  # (Z, validations)
    figure = Figure(figsize=(5.0, 3.6), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(image, aspect="auto", norm=LogNorm(least, most), interpolation="nearest")
    labelled = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
    axes.set_xticks(labelled, [f"{steps[i]:,}" for i in labelled])
    axes.set_xlabel("step")
    axes.set_ylabel("dimension of z")
    figure.colorbar(shown, label="KL (nats)")
    return figure


def _hyperparameters(config: RunConfig) -> dict[str, int | float | str | bool]:
    """What one tunes, for TensorBoard's HPARAMS; config.yaml has everything."""
    found = {}
    for name, value in flatten(to_tree(config)).items():
        tuned = name in ("data.batch_size", "data.max_tokens", "seed")
        if value is not None and (tuned or name.startswith(("model.", "phase1.", "phase2."))):
            found[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return found


def _truncate_jsonl(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Keeps the rows before `first_step`, and returns them; a last row that was cut off
    goes too."""
    if not path.exists():
        return []
    kept, lines = [], []
    # Not splitlines(): it also splits at U+2028 and others, which JSON leaves as they
    # are. A cut may halve a character.
    for line in filter(None, path.read_bytes().decode(errors="replace").split("\n")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        # the final evaluation comes behind the last checkpoint
        if row["step"] < first_step and row["split"] != "test":
            kept.append(row)
            lines.append(line + "\n")
    write_text(path, "".join(lines))
    return kept


def _cell(text: str) -> str:
    """Text inside a Markdown table: nothing that would end the cell or be taken for
    markup."""
    for char in "\\|`*_<>[]":
        text = text.replace(char, "\\" + char)
    return text.replace("\n", " ")
