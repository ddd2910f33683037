"""The token grid: tiles, frequency bands, positions. NumPy, no parameters."""
