"""Tests of `kernels/linear/`."""
