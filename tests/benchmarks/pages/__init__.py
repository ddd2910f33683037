"""Tests of `benchmarks/pages/`."""
