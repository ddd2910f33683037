"""Tests of `kernels/around/`."""
