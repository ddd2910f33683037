"""Runs `python -m freqformer.pans`; the code is in freqformer/command/pans.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.pans()
