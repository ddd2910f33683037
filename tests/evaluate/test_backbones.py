"""A backbone has weights, or says which file it lacks and where that is from."""

import contextlib
import sys
import types

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.evaluate import motion_net
from freqformer.evaluate.backbones import backbone

VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 24, 3), np.uint8)


def test_ours_needs_nothing():
  ours = backbone("motionnet")
  assert ours.features(VIDEOS).shape == (2, motion_net.FEATURES)
  assert ours.hash == motion_net.weights_hash() and len(ours.hash) == 12
  with pytest.raises(ConfigError, match="goes with --backbone=i3d"):
    backbone("motionnet", "x.npz")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
  with pytest.raises(ConfigError, match="did you mean 'i3d'.*--features=samples.npy,real.npy"):
    backbone("i3dd")
  with pytest.raises(ConfigError, match="no I3D weights at .*/x.pt: bring i3d_torchscript.pt"):
    backbone("i3d", str(tmp_path / "x.pt"))
  (tmp_path / "x.pt").write_bytes(b"weights")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ConfigError, match="needs torch, which is not installed"):
    backbone("i3d", str(tmp_path / "x.pt"))


def test_i3d_is_called_as_its_protocol_says(monkeypatch, tmp_path):
  """On a stand-in for torch, which is not installed here."""
  calls = []

  class Tensor:
    def __init__(self, array):
      self.array = array

    def float(self):
      return Tensor(self.array.astype(np.float32))

    def numpy(self):
      return self.array

  def network(x, **call):
    calls.append((x.array, call))
    return Tensor(np.zeros((len(x.array), 400), np.float32))

  def load(path):
    return types.SimpleNamespace(eval=lambda: network)

  torch = types.SimpleNamespace(
    from_numpy=Tensor, no_grad=contextlib.nullcontext, jit=types.SimpleNamespace(load=load)
  )
  monkeypatch.setitem(sys.modules, "torch", torch)
  (tmp_path / "x.pt").write_bytes(b"weights")
  i3d = backbone("i3d", str(tmp_path / "x.pt"))
  assert i3d.name == "i3d" and i3d.features(VIDEOS).shape == (2, 400)
  ((given, call),) = calls
  np.testing.assert_array_equal(given, VIDEOS.transpose(0, 4, 1, 2, 3))
  assert given.dtype == np.float32 and given.max() > 200
  assert call == dict(rescale=True, resize=True, return_features=True)
  with pytest.raises(ConfigError, match="needs 10 frames, the videos have 9"):
    i3d.features(VIDEOS[:, :9])
