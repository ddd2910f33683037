"""Checks and encodes a data set: `python -m freqformer.data --help`.

The code is in freqformer/command/encode.py, with the other commands.
"""

from freqformer import entries

if __name__ == "__main__":
  entries.encode()
