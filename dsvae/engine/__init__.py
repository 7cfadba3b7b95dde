"""DeepSpeed: one engine a phase, its configuration, its checkpoints and its weights."""
