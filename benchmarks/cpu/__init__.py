"""Figures measured on this machine's CPU."""
