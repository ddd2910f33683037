"""Trains a model: `python train.py --config=configs/demo.py`.

The loop is in freqformer/train/run.py, so that an installed package has it as well.
"""

from freqformer import entries

if __name__ == "__main__":
  entries.train()
