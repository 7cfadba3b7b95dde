"""What a model is worth: likelihood, information in the latent, and what the decoder
does with it."""
