"""Tests of `benchmarks/gpu/`."""
