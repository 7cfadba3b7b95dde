"""The job `dsvae evaluate`: a finished model measured on text, as a table, metrics.json, report.html and the projector."""

from dsvae.evaluation.job import evaluate_model

__all__ = ["evaluate_model"]
