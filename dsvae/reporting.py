"""What a run tells: the console, metrics.jsonl and TensorBoard. Rank 0 alone reports.

Both phases share one axis of optimizer steps: phase 2 goes on counting where phase 1
ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from dsvae.config import RunConfig, flatten, to_tree
from dsvae.files import finite, write_text
from dsvae.metrics.meanings import BASELINE, MEANING, described


class Reporter:
    """Writes to `output_dir` as rank 0; elsewhere every method does nothing."""

    def __init__(self, output_dir: Path, enabled: bool) -> None:
        self.enabled, self.directory = enabled, output_dir
        self._bar: tqdm | None = None
        self._writer: SummaryWriter | None = None
        self._jsonl: TextIO | None = None

    def open(self, first_step: int) -> None:
        """Starts writing at global step `first_step`; what a cut run wrote from there
        on is dropped, so no step comes twice."""
        if not self.enabled:
            return
        path = self.directory / "metrics.jsonl"
        _truncate_jsonl(path, first_step)
        self._jsonl = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=first_step)

    def say(self, text: str) -> None:
        """A line on the console, beside the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

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
        """One logged training step: global `step`, named values (units as in the
        design: nats per sentence)."""
        if not self.enabled:
            return
        self._record(
            {"step": step, "phase": phase, "split": "train", **values, "kl_per_dim": kl_per_dim}
        )
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._per_dim("train", kl_per_dim, step)
        if self._bar is not None:
            shown = ("loss", "rec", "kl", "beta", "tokens_per_s")
            self._bar.set_postfix_str(
                " ".join(f"{_SHORT.get(n, n)} {values[n]:.4g}" for n in shown), refresh=False
            )

    def evaluation(self, step: int, phase: int, split: str, metrics: dict[str, Any]) -> None:
        """An evaluation at global `step`."""
        if not self.enabled:
            return
        self._record({"step": step, "phase": phase, "split": split, **metrics})
        assert self._writer is not None
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{split}/{name}", value, step)
        self._per_dim(split, metrics["kl_per_dim"], step)

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

    def close(self, config: RunConfig, final: dict[str, Any] | None) -> None:
        """Writes hparams with the final metrics, if there are any, and closes the
        files."""
        self.end_phase()
        if self._writer is not None:
            if final is not None:
                plain = {
                    k: v if isinstance(v, (int, float, str, bool)) else str(v)
                    for k, v in flatten(to_tree(config)).items()
                }
                # The metrics are the scalars of the final evaluation, which are there
                # already.
                numbers = {f"test/{k}": v for k, v in final.items() if isinstance(v, (int, float))}
                # Into this run's own event file: `SummaryWriter.add_hparams` would open
                # a second run beside it.
                for summary in hparams(plain, numbers):
                    self._writer._get_file_writer().add_summary(summary)
            self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()
        self._writer = self._jsonl = None

    def _per_dim(self, split: str, kl_per_dim: list[float], step: int) -> None:
        assert self._writer is not None
        for dim, value in enumerate(kl_per_dim):
            self._writer.add_scalar(f"kl_per_dim_{split}/{dim:03d}", value, step)

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
    "mi",
    "mi_cap",
    "au",
    "rec_shuffled",
    "rec_prior",
)
"""The metrics of a run with a latent that people are shown at its end."""


def result_table(title: str, metrics: dict[str, Any]) -> str:
    """The final metrics as lines for people: those of OF_A_RUN, of a language model its
    exact likelihood alone.

    Args:
        metrics: of `dsvae.metrics.evaluate`, or the same read back from metrics.json.
    """
    latent = metrics["kl_per_dim"] != []
    rows = described([(name, *MEANING[name]) for name in OF_A_RUN] if latent else BASELINE, metrics)
    lines = [f"{title} ({metrics['sentences']:,} sentences)"]
    lines += [f"  {row.name:<13}{row.value:>10} {row.unit:<14} {row.meaning}" for row in rows]
    return "\n".join(lines)


_SHORT = {"tokens_per_s": "tok/s"}


def _truncate_jsonl(path: Path, first_step: int) -> None:
    """Keeps the rows before `first_step`; a last row that was cut off goes too."""
    if not path.exists():
        return
    kept = []
    # Not splitlines(): it also splits at U+2028 and others, which JSON leaves as they
    # are. A cut may halve a character.
    for line in filter(None, path.read_bytes().decode(errors="replace").split("\n")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        # the final evaluation comes behind the last checkpoint
        if row["step"] < first_step and row["split"] != "test":
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _cell(text: str) -> str:
    """Text inside a Markdown table: nothing that would end the cell or be taken for
    markup."""
    for char in "\\|`*_<>[]":
        text = text.replace(char, "\\" + char)
    return text.replace("\n", " ")
