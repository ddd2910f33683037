"""Tests of `benchmarks/compiled/`."""
