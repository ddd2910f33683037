"""Tests of `benchmarks/trained/`."""
