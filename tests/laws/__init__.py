"""Tests of `laws/`."""
