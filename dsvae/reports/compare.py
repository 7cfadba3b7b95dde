"""Runs against each other: where their settings differ, which numbers may be compared,
and in what order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvae.config import field_types
from dsvae.errors import UserError, nearest
from dsvae.metrics import catalog
from dsvae.metrics.catalog import NATS
from dsvae.reports.runs import USE, Run, read_runs

SHOWN = (
    "rec",
    "kl",
    "elbo",
    "nll_iw",
    "iw_ess",
    "ppl_token",
    "bits_per_byte",
    "mi",
    "mi_upper",
    "au",
    USE,
)
"""The metrics of the table; the files hold all."""
BETTER = {
    "rec": "lower",
    "elbo": "higher",
    "nll_iw": "lower",
    "ppl_token": "lower",
    "ppl_word": "lower",
    "bits_per_byte": "lower",
    "mi": "higher",
    "au": "higher",
    "rec_shuffled": "higher",
    "exact_match": "higher",
    "token_accuracy": "higher",
    "bleu": "higher",
    "chrf": "higher",
    USE: "higher",
}
"""Which direction is better. kl has none of its own: it is what z says, and what it
costs."""
MEANING = catalog.MEANING | {
    USE: (NATS, "what another sentence's z costs: near 0 the decoder does not use z")
}
"""Metric -> unit, meaning."""
_COUNTS = ("sentences", "words", "bytes")


@dataclass(frozen=True)
class Comparison:
    """What `dsvae compare` shows."""

    runs: list[Run]
    """In the order of the table."""
    settings: list[str]
    """Dotted names of the settings in which the runs differ."""
    metrics: list[str]
    """All that any run has: those of SHOWN first, standard errors last."""
    text: dict[str, str]
    """Run -> letter of the text that it was measured on; empty where nothing tells two
    texts apart."""
    tokenizer: dict[str, str]
    """Run -> letter of its tokenizer; empty where all have the same."""
    warnings: list[str]
    """What may not be compared, and what each run's evaluation says of its numbers."""


def compare_runs(directories: Sequence[Path], sort_by: str | None = None) -> Comparison:
    """Reads runs and sets them side by side.

    Args:
        sort_by: `run`, `state`, a setting that differs, or a metric; None: the order
            given.

    Raises:
        UserError: `sort_by` names none of them.
    """
    runs = read_runs(directories)
    settings = _differing(runs)
    metrics = _metrics(runs)
    if sort_by is not None:
        runs = _sorted(runs, sort_by, settings, metrics)
    text, about_text = _texts(runs)
    tokenizer, about_tokenizers = _tokenizers(runs)
    of_runs = [f"{run.name}: {warning}" for run in runs for warning in run.warnings]
    return Comparison(
        runs, settings, metrics, text, tokenizer, about_text + about_tokenizers + of_runs
    )


def _differing(runs: list[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs that read them, in the
    order of the configuration."""
    known = [run.settings for run in runs if run.settings]
    fields = field_types()

    def values(name: str) -> list[Any]:
        # A field that a run does not read says nothing; a key of model.t5 or of the
        # ds_config that is not given is a default.
        return [settings.get(name) for settings in known if name in settings or name not in fields]

    names = dict.fromkeys(name for settings in known for name in settings)
    return [name for name in names if any(value != values(name)[0] for value in values(name))]


def _metrics(runs: list[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    order = {name: place for place, name in enumerate(SHOWN)}
    return sorted(names, key=lambda name: (name.startswith("se."), order.get(name, len(order))))


def _sorted(runs: list[Run], name: str, settings: list[str], metrics: list[str]) -> list[Run]:
    if name in metrics:
        sign = -1 if BETTER.get(name) == "higher" else 1
        # A validation value is no final one: the two do not stand in one order.
        return sorted(
            runs,
            key=lambda run: (
                name not in run.metrics,
                run.split != "test",
                sign * run.metrics.get(name, 0.0),
            ),
        )
    if name in settings:
        return sorted(runs, key=lambda run: _any_order(run.settings.get(name)))
    if name in ("run", "state"):
        return sorted(runs, key=lambda run: run.name if name == "run" else run.state)
    known = ["run", "state", *settings, *metrics]
    close = nearest(name, known)
    hint = (
        f"did you mean {close}?"
        if close
        else f"give one of {', '.join(n for n in known if not n.startswith('se.'))}"
    )
    raise UserError(
        f"--sort_by {name}: neither a metric of these runs nor a setting in which they differ; "
        f"{hint}"
    )


def _any_order(value: Any) -> tuple[Any, ...]:
    """Numbers, then text, then what is not set."""
    if isinstance(value, (bool, int, float)):
        return (0, value, "")
    return (2, 0, "") if value is None else (1, 0, str(value))


def _texts(runs: list[Run]) -> tuple[dict[str, str], list[str]]:
    """Letters by the text that was measured, where there is more than one of a split,
    and a warning for each such split."""

    def same(a: Run, b: Run) -> bool:
        sources = a.source(), b.source()
        # Equal numbers of sentences, words and bytes are the same text, unless the
        # settings say that it cannot be.
        return (
            a.split == b.split
            and all(a.metrics.get(name) == b.metrics.get(name) for name in _COUNTS)
            and (None in sources or sources[0] == sources[1])
        )

    groups = _groups([run for run in runs if run.split], same)
    warnings = []
    for split, what in (("test", "test"), ("valid", "validation")):
        letters = [letter for letter, members in groups.items() if members[0].split == split]
        if len(letters) > 1:
            told = "; ".join(f"{letter}: {_about(groups[letter][0])}" for letter in letters)
            warnings.append(
                f"not the same {what} sentences ({told}): likelihoods, mi and au compare only "
                f"within one letter of the column "
                "text; dsvae evaluate --test_file measures models on the same sentences"
            )
    return (_letters(groups) if warnings else {}), warnings


def _about(run: Run) -> str:
    counts = ", ".join(f"{run.metrics[name]:,} {name}" for name in _COUNTS if name in run.metrics)
    source = run.source()
    return counts + (f", {source}" if source else "")


def _tokenizers(runs: list[Run]) -> tuple[dict[str, str], list[str]]:
    """Letters by tokenizer, where there is more than one, and the warning that goes
    with them."""
    groups = _groups(
        [run for run in runs if run.tokenizer and run.split],
        lambda a, b: a.tokenizer == b.tokenizer,
    )
    if len(groups) < 2:
        unknown = [run.name for run in runs if run.split and not run.tokenizer]
        if unknown and len(runs) > 1:
            return {}, [
                f"no tokenizer to read in {', '.join(unknown)}: ppl_token compares only where "
                f"the tokenizers are the same"
            ]
        return {}, []
    told = "; ".join(
        f"{letter}: {', '.join(run.name for run in members)}" for letter, members in groups.items()
    )
    return _letters(groups), [
        f"not the same tokenizer ({told}): ppl_token compares only within one letter of the "
        f"column tokenizer; "
        "bits_per_byte, ppl_word and, on the same sentences, nats per sentence compare between them"
    ]


def _groups(runs: list[Run], same: Callable[[Run, Run], bool]) -> dict[str, list[Run]]:
    """Runs by letters A, B, ..., Z, A1, ...: each with the first group whose first run
    is the `same`."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if same(group[0], run)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return {
        f"{chr(65 + index % 26)}{index // 26 or ''}": group for index, group in enumerate(groups)
    }


def _letters(groups: dict[str, list[Run]]) -> dict[str, str]:
    return {run.name: letter for letter, members in groups.items() for run in members}
