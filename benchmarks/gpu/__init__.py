"""Figures measured on a GPU, and the slot that runs them in few minutes."""
