"""Samples from a checkpoint: `python eval.py --workdir=runs/demo`. See freqformer/command/eval.py."""

from freqformer.command import entries

if __name__ == "__main__":
  entries.evaluate()
