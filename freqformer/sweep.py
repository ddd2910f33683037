"""Runs `python -m freqformer.sweep`; the code is in freqformer/command/sweep.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.sweep()
