"""Samples from a checkpoint, or validates it: `python eval.py --workdir=runs/demo`.

The code is in freqformer/command/eval.py, so that an installed package has it as well.
"""

from freqformer import entries

if __name__ == "__main__":
  entries.evaluate()
