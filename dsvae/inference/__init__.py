"""The one way from texts to latents and from latents to texts, for metrics, generation
and priors."""
