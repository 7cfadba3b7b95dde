"""Uses of a trained model: sentences from latents, and latents from sentences.

from dsvae.generation import SentenceVAE

vae = SentenceVAE.from_pretrained(DIR)
vae.interpolate("the food was cold .", "i love this place !", steps=5)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvae.generation.sentence_vae import SentenceVAE

__all__ = ["SentenceVAE"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when the class is needed, and not for the
    help of the command line."""
    if name == "SentenceVAE":
        from dsvae.generation.sentence_vae import SentenceVAE

        return SentenceVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
