"""A progress bar for what takes long in an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from dsvae.parallel.world import World

T = TypeVar("T")

DELAY = 10.0
"""Seconds that something takes before it has a bar."""


def progress(steps: Sequence[T], world: World, name: str) -> Iterator[T]:
    """The steps, one after the other, with a bar on rank 0 while they are taken.

    A log file gets a line per minute instead of a redrawn bar.
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
