"""Block-sparse attention for any device: one table (`block_mask`), one entry point (`attention`), one file per backend."""
