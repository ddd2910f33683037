"""Measured properties of trained models."""
