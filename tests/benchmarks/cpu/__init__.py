"""Tests of `benchmarks/cpu/`."""
