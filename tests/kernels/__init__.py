"""Tests of `kernels/`."""
