"""dsvae: turns a pretrained T5 into a variational autoencoder of sentences by finetuning, on DeepSpeed."""

from dsvae.modeling.posterior import Gaussian
from dsvae.modeling.t5_vae import T5VAE, T5VAEConfig, T5VAEOutput

__all__ = ["Gaussian", "T5VAE", "T5VAEConfig", "T5VAEOutput"]
