"""Tests of `kernels/hopper/`."""
