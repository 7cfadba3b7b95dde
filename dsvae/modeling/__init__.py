"""What is trained: the T5 VAE. Knows nothing of processes or DeepSpeed; only
weight_source.py reads files."""
