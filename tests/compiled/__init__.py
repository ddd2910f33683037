"""Tests of `compiled/`."""
