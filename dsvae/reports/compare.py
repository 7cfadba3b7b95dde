"""Several runs side by side: the settings in which they differ, and which of their
numbers are comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsvae.config import field_types
from dsvae.errors import UserError, nearest
from dsvae.metrics import catalog
from dsvae.reports.groups import by_seed
from dsvae.reports.runs import RunSummary, read_runs

T = TypeVar("T")

_COUNTS = ("sentences", "words", "bytes")
_SPREAD = ("se.", "sd.")


@dataclass(frozen=True)
class Comparison:
    """The content of `dsvae compare`."""

    runs: list[RunSummary]
    """In the order of the table; with `group`, a `RunSummary` may stand for several."""
    settings: list[str]
    """Dotted names of the settings in which the runs differ."""
    metrics: list[str]
    """All metrics of any run: columns of the table first, standard errors and deviations
    last."""
    text: dict[str, str]
    """Name of a run -> letter of the text that it was measured on; empty if all are the
    same."""
    tokenizer: dict[str, str]
    """Name of a run -> letter of its tokenizer; empty if all are the same."""
    warnings: list[str]
    """What is not comparable, and the warnings of each run's own evaluation."""


def compare_runs(
    directories: Sequence[Path], sort_by: str | None = None, group: bool = False
) -> Comparison:
    """Reads runs and compares them.

    Args:
        group: finished runs that differ only in their seed become one (see
            `dsvae.reports.groups`).
        sort_by: `run`, `state`, a setting that differs, or a metric; UserError for any
            other name. None: the order given.
    """
    runs = read_runs(directories)
    settings = _differing(runs)
    text, about_text = _texts(runs)
    tokenizer, about_tokenizers = _tokenizers(runs)
    warnings = about_text + about_tokenizers
    of_runs = [f"{run.name}: {warning}" for run in runs for warning in run.warnings]
    if group:
        groups = by_seed(runs)
        text, tokenizer = (
            {
                name: ", ".join(sorted({letters[run.name] for run in members}))
                for name, members in groups.members.items()
                if all(run.name in letters for run in members)
            }
            for letters in (text, tokenizer)
        )
        runs = groups.runs
        warnings += groups.warnings
    metrics = _metrics(runs)
    if sort_by is not None:
        runs = _sorted(runs, sort_by, settings, metrics)
    return Comparison(runs, settings, metrics, text, tokenizer, warnings + of_runs)


def _differing(runs: list[RunSummary]) -> list[str]:
    """Returns the names of the settings that differ between the runs that use them, in
    their order."""
    known = [run.settings for run in runs if run.settings]
    fields = field_types()

    def values(name: str) -> list[Any]:
        # A field that a run does not use is ignored. A missing key of model.t5 or of the
        # ds_config stands for its default.
        return [settings.get(name) for settings in known if name in settings or name not in fields]

    names = dict.fromkeys(name for settings in known for name in settings)
    return [name for name in names if any(value != values(name)[0] for value in values(name))]


def _metrics(runs: list[RunSummary]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    columns = [metric.name for metric in catalog.METRICS if catalog.COLUMN in metric.places]
    order = {name: place for place, name in enumerate(columns)}
    return sorted(names, key=lambda name: (name.startswith(_SPREAD), order.get(name, len(order))))


def _sorted(
    runs: list[RunSummary], name: str, settings: list[str], metrics: list[str]
) -> list[RunSummary]:
    known = ["run", "state", *settings, *metrics]
    if name not in known:
        close = nearest(name, known)
        names = ", ".join(n for n in known if not n.startswith(_SPREAD))
        raise UserError(
            f"--sort_by {name}: neither a metric of these runs nor a setting in which they "
            f"differ; {f'did you mean {close}?' if close else f'give one of {names}'}"
        )
    sign = -1 if catalog.entry(name).better == "higher" else 1

    def order(run: RunSummary) -> tuple[Any, ...]:
        if name in metrics:
            # Validation values come after final ones, since the two are not comparable.
            signed = sign * run.metrics.get(name, 0.0)
            return (name not in run.metrics, run.split != "test", signed)
        value = {"run": run.name, "state": run.state, **run.settings}.get(name)
        # numbers first, then text, then what is not set
        if isinstance(value, (bool, int, float)):
            return (0, value)
        return (2,) if value is None else (1, str(value))

    return sorted(runs, key=order)


def _texts(runs: list[RunSummary]) -> tuple[dict[str, str], list[str]]:
    """Returns letters of the measured texts if a split has several, and a warning per
    split."""

    def same(a: RunSummary, b: RunSummary) -> bool:
        sources = a.source(), b.source()
        # Texts with equal numbers of sentences, words and bytes are the same, unless the
        # settings rule it out.
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
            texts = "; ".join(f"{letter}: {_about(groups[letter][0])}" for letter in letters)
            warnings.append(
                f"not the same {what} sentences ({texts}): likelihoods, mi and au compare only "
                "within one letter of the column text; dsvae evaluate --test_file measures models "
                "on the same sentences"
            )
    return (_letters(groups) if warnings else {}), warnings


def _about(run: RunSummary) -> str:
    counts = ", ".join(f"{run.metrics[name]:,} {name}" for name in _COUNTS if name in run.metrics)
    source = run.source()
    return counts + (f", {source}" if source else "")


def _tokenizers(runs: list[RunSummary]) -> tuple[dict[str, str], list[str]]:
    """Returns letters of the tokenizers if there are several, and a warning about
    them."""
    measured = [run for run in runs if run.split]
    unknown = [run.name for run in measured if not run.tokenizer]
    groups = _groups(
        [run for run in measured if run.tokenizer], lambda a, b: a.tokenizer == b.tokenizer
    )
    if len(groups) < 2:
        return {}, [
            f"no tokenizer to read in {', '.join(unknown)}: ppl_token compares only between runs "
            "with the same tokenizer"
        ] * (bool(unknown) and len(runs) > 1)
    members = "; ".join(f"{key}: {', '.join(r.name for r in each)}" for key, each in groups.items())
    return _letters(groups), [
        f"not the same tokenizer ({members}): ppl_token compares only within one letter "
        "of the column tokenizer; bits_per_byte, ppl_word and, on the same sentences, nats per "
        "sentence compare between them"
    ]


def _groups(
    runs: list[RunSummary], same: Callable[[RunSummary, RunSummary], bool]
) -> dict[str, list[RunSummary]]:
    """Returns letter A, B, ..., Z, A1, ... -> the runs that are the `same`."""
    return {
        f"{chr(65 + index % 26)}{index // 26 or ''}": group
        for index, group in enumerate(grouped(runs, same))
    }


def grouped(items: Iterable[T], same: Callable[[T, T], bool]) -> list[list[T]]:
    """Puts the items in groups; each joins the first group whose first item is the
    `same`."""
    groups: list[list[T]] = []
    for item in items:
        for group in groups:
            if same(group[0], item):
                group.append(item)
                break
        else:
            groups.append([item])
    return groups


def _letters(groups: dict[str, list[RunSummary]]) -> dict[str, str]:
    return {run.name: letter for letter, members in groups.items() for run in members}
