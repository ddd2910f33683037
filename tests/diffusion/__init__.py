"""Tests of freqformer/diffusion."""
