"""Softmax attention over listed tiles: the table, the op, one file per backend and pass."""
