"""What is trained: the T5 VAE. Knows nothing of files, processes or DeepSpeed."""
