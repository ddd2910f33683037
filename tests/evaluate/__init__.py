"""Tests of `evaluate/`."""
