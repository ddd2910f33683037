"""Choosing key tiles: exact top-k of scores, and the attention mass of tiles."""
