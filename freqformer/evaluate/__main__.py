"""Measures a run's samples: `python -m freqformer.evaluate --help`.

The code is in freqformer/command/measure.py, with the other commands.
"""

from freqformer import entries

if __name__ == "__main__":
  entries.measure()
