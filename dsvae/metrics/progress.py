"""A progress bar for the long parts of an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from dsvae.parallel.world import World

T = TypeVar("T")

DELAY = 10.0
"""Seconds before the bar appears."""


def progress(steps: Sequence[T], world: World, name: str) -> Iterator[T]:
    """Iterates over the steps with a progress bar on rank 0.

    A log file gets one line per minute instead of a redrawn bar.
    """
    interval = 0.5 if sys.stderr.isatty() else 60.0
    return iter(
        tqdm(
            steps,
            desc=name,
            unit="batch",
            delay=DELAY,
            mininterval=interval,
            maxinterval=interval,
            leave=False,
            dynamic_ncols=True,
            disable=not world.is_main,
        )
    )
