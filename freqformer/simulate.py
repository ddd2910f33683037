"""Runs `python -m freqformer.simulate`; the code is in freqformer/simulation/command.py."""

from freqformer import entries

if __name__ == "__main__":
  entries.simulate()
