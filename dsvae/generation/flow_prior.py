"""How z is drawn from the prior by flow matching that the phase `prior` has trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsvae.errors import UserError, nearest
from dsvae.generation.options import SolverKind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class FlowPrior:
    """The settings of a draw."""

    steps: int = 50
    """Steps from noise to z."""
    solver: SolverKind = "euler"
    """euler: one pass of the denoiser per step. heun: two, and a smaller error."""
    guidance: float = 1.0
    """How far the label and the condition are followed: 1 as in the data, more further."""
    label: str | None = None
    """The class of all sentences, by its name. None: any."""

    @staticmethod
    def of(
        source: str,
        steps: int | None,
        solver: SolverKind | None,
        guidance: float | None,
        label: str | None,
    ) -> FlowPrior | None:
        """Returns the settings of flags, or None if z has another source.

        Raises:
            UserError: settings without a flow, or that make no sense.
        """
        every = {"steps": steps, "solver": solver, "guidance": guidance, "label": label}
        given: dict[str, Any] = {name: each for name, each in every.items() if each is not None}
        if source != "flow":
            if given:
                name = next(iter(given))
                raise UserError(f"--{name} is for --source flow: give both, or leave it out")
            return None
        return FlowPrior(**given).checked()

    def checked(self) -> FlowPrior:
        """Returns itself; raises UserError for settings that make no sense."""
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}: give at least 1")
        if self.solver not in ("euler", "heun"):
            raise UserError(f"solver is {self.solver!r}, not one of euler, heun")
        return self

    def label_of(self, config: PreTrainedConfig) -> int | None:
        """Returns the number of the label in a model.

        Raises:
            UserError: the model has no such prior or class, or nothing to be guided by.
        """
        denoiser = config.denoiser
        if denoiser is None:
            raise UserError(
                "the model has no prior by flow matching: train one with dsvae/train.py "
                "--phase prior --model DIR"
            )
        if self.label is None:
            if self.guidance != 1 and not denoiser["conditional"]:
                raise UserError(
                    f"guidance {self.guidance:g} has nothing to follow: give a label, or guidance 1"
                )
            return None
        classes = denoiser["classes"]
        if self.label not in classes:
            if not classes:
                raise UserError(
                    f"label {self.label}: the prior knows no classes; train it with "
                    f"--data.label_column"
                )
            close = nearest(self.label, classes)
            hint = f"; did you mean {close}?" if close else f": it knows {', '.join(classes[:10])}"
            raise UserError(f"label {self.label} is not a class of the prior{hint}")
        return int(classes.index(self.label))
