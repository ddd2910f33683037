"""Tests of `kernels/core/`."""
