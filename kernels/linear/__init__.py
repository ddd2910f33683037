"""Linear attention over segments of rows: the op, one file per backend."""
