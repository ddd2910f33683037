"""Figures of models that were trained for them."""
