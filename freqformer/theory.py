"""Runs `python -m freqformer.theory`; the code is in freqformer/analysis/theory.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.theory()
