"""The job `dsvae evaluate`: a finished model measured on text, as a table,
metrics.json, report.html and the projector."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvae.evaluation.job import evaluate_model

__all__ = ["evaluate_model"]


def __getattr__(name: str) -> Any:
    """Imports torch and deepspeed only for who evaluates, and not for who wants a
    figure."""
    if name == "evaluate_model":
        from dsvae.evaluation.job import evaluate_model

        return evaluate_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
