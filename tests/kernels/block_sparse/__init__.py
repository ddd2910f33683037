"""Tests of `kernels/block_sparse/`."""
