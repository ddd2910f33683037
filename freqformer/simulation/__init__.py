"""From counts to seconds: descriptions of GPUs and models, a roofline, its calibration, and what follows for whole models."""
