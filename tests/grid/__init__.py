"""Tests of `grid/`."""
