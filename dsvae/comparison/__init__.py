"""The job `dsvae compare`: what runs left in their output directories, side by side."""
