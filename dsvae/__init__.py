"""dsvae: turns a pretrained T5 into a variational autoencoder of sentences by
finetuning, on DeepSpeed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvae.generation.fitted_prior import load_prior
    from dsvae.generation.sentence_vae import SentenceVAE
    from dsvae.modeling.families import Gaussian
    from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig, T5VAEOutput
    from dsvae.reports.evaluation import evaluate_model

    __version__: str

__all__ = [
    "Gaussian",
    "SentenceVAE",
    "T5VAE",
    "T5VAEConfig",
    "T5VAEOutput",
    "__version__",
    "evaluate_model",
    "load_prior",
]

_MODULES = {
    "Gaussian": "modeling.families",
    "SentenceVAE": "generation.sentence_vae",
    "T5VAE": "modeling.t5_vae",
    "T5VAEConfig": "modeling.t5_vae",
    "T5VAEOutput": "modeling.t5_vae",
    "evaluate_model": "reports.evaluation",
    "load_prior": "generation.fitted_prior",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for: `dsvae --help` need not wait for
    torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("dsvae")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"dsvae.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
