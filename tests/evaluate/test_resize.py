"""Runs at other sizes: shapes, positions, decoded videos; sizes that cannot be."""

import numpy as np
import pytest
from flax import nnx

from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.evaluate.resize import parse_size, resized, video_shape
from freqformer.evaluate.restore import Run
from freqformer.model.dit import VideoDiT
from freqformer.train.experiment import experiment
from tests.command.process import ROOT, TINY


def run_of(config):
  """A run without parameters, trained at 6 frames of 24 x 32 pixels: 3 x 3 x 4 tokens."""
  exp = experiment(config)
  shape = exp.latent_shape
  model = nnx.eval_shape(lambda: VideoDiT(exp.model, shape, 2, nnx.Rngs(0)))
  mean = np.arange(shape[-1], dtype=float)
  record = {
    "class_names": ["a", "b"],
    "latent_shape": shape,
    "statistics": {"mean": mean.tolist(), "std": (1 + mean).tolist()},
  }
  return Run(model, None, exp, record)


def tiny(**model):
  config = read_config(TINY)
  config.model.attention.method = "dense"
  config.model.update(model)
  return config


def test_everything_follows_the_size():
  run = run_of(tiny())
  assert resized(run) is run and resized(run, 6, (24, 32)) is run
  other = resized(run, frames=8, size=(48, 32))
  assert video_shape(other) == (8, 48, 32) and other.latent_shape == (4, 6, 4, 3)
  videos = other.decode(np.zeros((2, *other.latent_shape), np.float32))
  assert videos.shape == (2, 8, 48, 32, 3)
  assert run.latent_shape == (3, 3, 4, 3)
  theta = run.model.config.rope_theta
  assert other.model.config.rope_theta == theta
  scaled = resized(run, frames=8, size=(48, 32), rope="ntk").model
  assert scaled.config.rope_theta[1] > theta[1] and scaled.config.rope_theta[2] == theta[2]
  assert scaled.runs[0].attention.theta == scaled.config.rope_theta


def test_fields_have_sizes_of_tokens():
  run = run_of(read_config(ROOT / "configs" / "fields.py"))
  other = resized(run, frames=4, size=(64, 256))
  assert other.latent_shape == (4, 8, 32, 4) and video_shape(other) == (4, 64, 256)
  assert other.decode(np.zeros((1, 4, 8, 32, 4), np.float32)).shape == (1, 4, 64, 256, 3)


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(frames=7), "frames=7 must be a multiple of 2.*; 6 and 8 are"),
    (dict(frames=0), "frames=0 must be a multiple of 2.*; 2 is the smallest"),
    (dict(size=(24, 33)), "cols=33 must be a multiple of 8.*; 32 and 40 are"),
    (dict(size=(24,)), "must be .rows, cols. in pixels"),
    (dict(frames=8, rope="yarn"), "rope='yarn' is unknown; known: ntk, trained"),
  ],
)
def test_sizes_that_cannot_be(wrong, message):
  with pytest.raises(ConfigError, match=message):
    resized(run_of(tiny()), **wrong)


def test_a_grid_that_the_method_cannot_serve():
  config = tiny()
  config.model.attention.update(method="adaspa", adaspa=dict(sparsity=0.7))
  with pytest.raises(ConfigError, match="next larger size that it serves is frames=6, size=24x24"):
    resized(run_of(config), frames=2, size=(8, 8))


@pytest.mark.parametrize("text", ["96", "96x", "96x-4", "axb", "96x96x3"])
def test_sizes_are_rows_times_columns(text):
  assert parse_size("96x128") == (96, 128)
  with pytest.raises(ConfigError, match="must be ROWSxCOLS in pixels"):
    parse_size(text)
