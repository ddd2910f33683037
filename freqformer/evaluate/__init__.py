"""From a checkpoint to judged samples."""
