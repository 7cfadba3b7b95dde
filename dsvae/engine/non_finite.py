"""Steps that were skipped because the loss or a gradient was not finite. A few are
tolerated; many in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from dsvae.config import phase_name
from dsvae.data.batches import Step
from dsvae.engine.engine import PhaseEngine, StepSums
from dsvae.errors import EXIT_NON_FINITE, RunStopped
from dsvae.files import finite, write_text
from dsvae.parallel.world import World
from dsvae.run_directory import RunDirectory


@dataclass
class SkippedSteps:
    """Counts the skipped steps in a row of one phase."""

    limit: int
    """How many in a row end the run."""
    directory: RunDirectory
    """Where the last of their batches is saved."""
    phase: int
    decode: Callable[[list[int]], str]
    """Turns token ids into a sentence."""
    say: Callable[[str], None]
    """Gets lines for the console."""
    in_a_row: int = 0

    def count(
        self, engine: PhaseEngine, world: World, index: int, step: Step, sums: StepSums
    ) -> None:
        """Counts optimizer step `index`. Collective.

        Raises:
            RunStopped: on every rank: the limit is reached.
        """
        if not sums.skipped:
            self.in_a_row = 0
            return
        means = sums.means(world)
        if engine.precision == "fp16" and means.finite:
            return  # the loss scale is still too high, and gradients overflowed
        self.in_a_row += 1
        where = f"{phase_name(self.phase)}, step {index + 1}"
        self.say(
            f"warning: {where} is skipped on all ranks: its loss or gradients are not finite "
            f"({means.main})"
        )
        if self.in_a_row < self.limit:
            return
        path = self.directory.non_finite(self.phase, index + 1)
        rows = [row for part in world.gather(engine.inspect(index, step)) for row in part]

        def write() -> None:
            lines = [
                json.dumps(finite(row | {"text": self.decode(row["labels"])}), ensure_ascii=False)
                for row in rows
            ]
            write_text(path, "".join(line + "\n" for line in lines))

        world.run_on_rank0(write)
        raise RunStopped(
            EXIT_NON_FINITE,
            f"error: {where}: loss or gradients of {self.in_a_row} steps in a row were not "
            f"finite; the last batch is in {path}; lower the learning rate or clip gradients, in "
            f"a new output_dir",
        )
