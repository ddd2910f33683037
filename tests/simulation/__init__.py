"""Tests of `simulation/`."""
