"""Tests of `benchmarks/gpu`."""
