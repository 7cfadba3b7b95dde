"""Runs that differ only in their seed as one: the mean and the deviation of each
metric."""

from __future__ import annotations

import os
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dsvae.reports.runs import RunSummary

SEED = "seed"


@dataclass(frozen=True)
class Groups:
    """Runs, some of which stand for several."""

    runs: list[RunSummary]
    """Each group at the place of its first run. Its metrics are means over its runs, and
    its setting `seed` lists their seeds. `sd.NAME` is the sample standard deviation of a
    metric; standard errors over sentences are left out. A metric that one of the runs
    lacks is left out, too."""
    members: dict[str, list[RunSummary]]
    """Name of each of `runs` -> the runs that it stands for."""
    warnings: list[str]
    """Seeds that occur twice in a group."""


def by_seed(runs: list[RunSummary]) -> Groups:
    """Groups finished runs. The others, and runs whose settings cannot be read, stay
    alone."""
    groups: dict[Any, list[RunSummary]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(_key(run) or place, []).append(run)
    names = [_name(members) for members in groups.values()]
    alone = Counter(names)
    found: dict[str, list[RunSummary]] = {}
    merged, warnings = [], []
    for name, members in zip(names, groups.values(), strict=True):
        if len(members) == 1:
            merged.append(members[0])
        else:
            # Another group has the same name if the seed comes first in it.
            name = name if name and alone[name] == 1 else f"{members[0].name} and others"
            merged.append(_merged(name, members))
            counts = Counter(run.settings[SEED] for run in members)
            if twice := [str(seed) for seed, count in counts.items() if count > 1]:
                warnings.append(
                    f"{name}: several runs of seed {', '.join(twice)}; the deviation is too small"
                )
        found[merged[-1].name] = members
    return Groups(merged, found, warnings)


def _key(run: RunSummary) -> str | None:
    """Returns a key that is equal for runs of one group; None for a run that stays
    alone."""
    if run.split != "test" or SEED not in run.settings:
        return None
    settings = {name: value for name, value in run.settings.items() if name != SEED}
    return repr(sorted(settings.items()))


def _name(members: list[RunSummary]) -> str:
    """Returns what the names of runs have in common: `a` of a_s0 and a_s1, `b` of
    b/seed0 and b/seed1. Empty if they have nothing in common."""
    if len(members) == 1:
        return members[0].name
    common = os.path.commonprefix([run.name for run in members])
    if any(run.name[len(common) :][:1].isdigit() for run in members):
        common = common.rstrip("0123456789")  # the prefix ends within a number
    return re.sub(r"[-_./ ](s|seed)?[-_=./ ]*$", "", common)


def _merged(name: str, members: list[RunSummary]) -> RunSummary:
    first = members[0]
    settings = first.settings | {SEED: ", ".join(str(run.settings[SEED]) for run in members)}
    metrics: dict[str, float] = {}
    for metric in first.metrics:
        values = [run.metrics[metric] for run in members if metric in run.metrics]
        if len(values) == len(members) and not metric.startswith("se."):
            mean = statistics.fmean(values)
            # Counts that are the same in all runs stay whole numbers.
            metrics[metric] = values[0] if len(set(values)) == 1 else mean
            metrics[f"sd.{metric}"] = statistics.stdev(values)
    return RunSummary(
        directory=first.directory,
        name=name,
        state=f"{len(members)} finished",
        config=first.config,
        settings=settings,
        split=first.split,
        phase=first.phase,
        latent=first.latent,
        metrics=metrics,
        tokenizer=first.tokenizer,
    )
