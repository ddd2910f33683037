"""Runs `python -m freqformer.report`; the code is in freqformer/pages/run.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.report()
