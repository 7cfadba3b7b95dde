"""DeepSpeed: one engine per phase, its configuration, its checkpoints and
its weights."""
