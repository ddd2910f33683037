"""Checkpoints: exact round trip, and refusals that name the leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.checkpoint import Checkpoints, flatten
from freqformer.config import ConfigError
from freqformer.dit import VideoDiT
from freqformer.resume import check_same_data
from freqformer.training import init_state
from tests.test_training import MODEL, SHAPE, TRAIN


def state_of(width=24):
  config = MODEL if width == 24 else dataclasses.replace(MODEL, width=width)
  return init_state(nnx.state(VideoDiT(config, SHAPE, 2, nnx.Rngs(0))), TRAIN, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  state = state_of()
  checkpoints = Checkpoints(workdir)
  checkpoints.save(5, state, {"iterator": "x", "latent_shape": SHAPE})
  checkpoints.save(9, state, {"iterator": "y", "latent_shape": SHAPE})
  return workdir, state, checkpoints


def test_round_trip(saved):
  workdir, state, _ = saved
  again = Checkpoints(workdir, create=False)
  assert again.latest() == 9 and again.steps() == [5, 9]
  restored = again.restore(jax.eval_shape(lambda: state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
  record = again.record(5)
  assert record["iterator"] == "x" and record["step"] == 5 and record["versions"]["jax"] == jax.__version__


def test_another_shape_lists_the_leaves(saved):
  with pytest.raises(ConfigError, match="leaves that differ:\n  ema/embed/bias: \\(24,\\) in the checkpoint, .*\\(48,\\)"):
    saved[2].restore(state_of(48))
  with pytest.raises(ConfigError, match="extra: missing in the checkpoint"):
    saved[2].restore({"extra": jnp.zeros(2), "params": saved[1].params})


def test_part_of_a_checkpoint(saved):
  _, state, checkpoints = saved
  part = checkpoints.restore({"ema": state.ema}, ignore_extra=True)
  for a, b in zip(jax.tree.leaves(part["ema"]), jax.tree.leaves(state.ema), strict=True):
    np.testing.assert_array_equal(a, b)
  assert all(name.startswith("ema/") for name in flatten(part))


def test_missing_checkpoints_say_what_to_do(tmp_path, saved):
  with pytest.raises(ConfigError, match="train first"):
    Checkpoints(tmp_path / "nothing", create=False)
  with pytest.raises(ConfigError, match="there are \\[5, 9\\]"):
    saved[2].record(7)


RECORD = {
  "latent_shape": [2, 4, 4, 3],
  "class_names": ["A", "B"],
  "statistics": {"mean": [0.0, 1.0, 2.0], "std": [1.0, 1.0, 1.0]},
}


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(latent_shape=[2, 4, 4, 8]), "trained on latents \\(2, 4, 4, 3\\), the cache holds \\(2, 4, 4, 8\\)"),
    (dict(statistics={"mean": [0.0, 1.5, 2.0], "std": [1.0, 1.0, 1.0]}), "latent statistics differ .*mean: by up to 0.5"),
    (dict(class_names=["B", "A"]), "class map differs .*0: A -> B"),
  ],
)
def test_other_data_are_refused(change, message):
  check_same_data(RECORD, dict(RECORD))
  with pytest.raises(ConfigError, match=message):
    check_same_data(RECORD, {**RECORD, **change})
