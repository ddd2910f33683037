"""Tests of `kernels/selection/`."""
