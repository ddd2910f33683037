"""A training step, and a run of them with its checkpoints and metrics."""
