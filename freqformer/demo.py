"""Runs `python -m freqformer.demo`; the code is in freqformer/command/demo.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.demo()
