"""Tests of `command/`."""
