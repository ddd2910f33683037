"""Runs `python -m freqformer.export`; the code is in freqformer/command/export.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.export()
