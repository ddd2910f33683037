"""Wan's transformer and autoencoder for a GPU, rehearsed on a CPU."""

import numpy as np
import pytest
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS

from benchmarks.gpu import wan
from benchmarks.gpu.device import Deadline
from benchmarks.pages.wan import decoding_flops


def test_goldens_are_near_and_other_weights_are_not(monkeypatch):
  row = wan.goldens()
  assert row["correct"] and 0 < row["error_float32"] < row["error_bfloat16"]
  right = wan.weights
  monkeypatch.setattr(wan, "weights", lambda s: {k: 1.02 * x for k, x in right(s).items()})
  assert not wan.goldens()["correct"]


def test_layers_in_sixteen_bits_are_held_to_float32(monkeypatch):
  forward = wan._forward
  found = []

  def keeping(*args):
    found.append(forward(*args))
    return found[-1]

  monkeypatch.setattr(wan, "_forward", keeping)
  row = wan.layers(wan.METHODS[1], rehearse=True)
  assert row["correct"] and 1e-3 < row["error_plain"] < 0.02
  exact, plain, kernels = found
  again = iter([exact, plain, 1.1 * kernels])
  monkeypatch.setattr(wan, "_forward", lambda *_: next(again))
  assert not wan.layers(wan.METHODS[1], rehearse=True)["correct"]


def test_the_layers_are_what_the_kernels_take():
  config = wan._FULL
  assert config.width // config.heads in HEAD_DIMS and wan._BLOCK in BLOCKS
  heads = sum(map(int, wan.METHODS[1].split("(")[2].strip(")").split(",")))
  assert heads == config.heads == wan._TINY.heads


def test_decoding_is_timed_and_its_work_counted():
  row = wan.decode(True, Deadline(60))
  assert row["correct"] and row["video"] == [5, 16, 16] and row["seconds"] > 0
  assert row["tflops"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
  assert 2e14 < decoding_flops((*wan._VIDEO, 16)) < 4e14 and np.prod(wan._VIDEO) == 131_040
