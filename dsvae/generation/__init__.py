"""Sentences from latents and latents from sentences: what a trained model is used for.

from dsvae.generation import SentenceVAE

vae = SentenceVAE.from_pretrained(DIR)
vae.interpolate("the food was cold .", "i love this place !", steps=5)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvae.generation.sentence_vae import SentenceVAE

__all__ = ["SentenceVAE"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only for who asks for the class, and not for the
    command line's help."""
    if name == "SentenceVAE":
        from dsvae.generation.sentence_vae import SentenceVAE

        return SentenceVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
