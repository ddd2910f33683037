"""The memory-bound passes before and after attention in FreqFormer's layer."""
