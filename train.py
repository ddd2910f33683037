"""Trains a model: `python train.py --config=configs/demo.py`. The loop is freqformer/command/train.py."""

from freqformer.command import entries

if __name__ == "__main__":
  entries.train()
