"""Samples from a checkpoint: `python eval.py --workdir=runs/demo`.

The code is in freqformer/command/eval.py, so that an installed package has it as well.
"""

from freqformer import entries

if __name__ == "__main__":
  entries.evaluate()
