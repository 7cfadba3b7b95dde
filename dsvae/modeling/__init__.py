"""What is trained: the T5 VAE. Knows nothing of processes or DeepSpeed; files are read
in origin.py alone."""
