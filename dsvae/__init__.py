"""dsvae: turns a pretrained T5 into a variational autoencoder of sentences by
finetuning, on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvae.modeling.families import Gaussian
    from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig, T5VAEOutput

__all__ = ["Gaussian", "T5VAE", "T5VAEConfig", "T5VAEOutput"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: `dsvae --help` need not wait
    for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsvae.modeling import families, t5_vae

    return getattr(families if name == "Gaussian" else t5_vae, name)
