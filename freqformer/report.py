"""Runs `python -m freqformer.report`; the code is in freqformer/command/report.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.report()
