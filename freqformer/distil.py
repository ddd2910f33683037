"""Runs `python -m freqformer.distil`; the code is in freqformer/command/distil.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.distil()
