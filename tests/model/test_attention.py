"""The initial gain of the query norm; the distance from dense attention."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from freqformer.command.files import read_config
from freqformer.cost import DENSE
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Cond
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.model.architectures import model_config
from freqformer.model.attention import AttentionDims, SpectralAttention, starting_gain
from freqformer.tables.dense import dense
from freqformer.train.experiment import experiment

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("keys, head_dim", [(144, 16), (1152, 16), (32_760, 64), (1024, 128)])
def test_one_key_can_hold_half_of_the_mass(keys, head_dim):
  """Measured: one key along the query among random ones; gains of 1 are not from the rule."""
  gain = starting_gain(keys, head_dim)
  draw = np.random.default_rng(0).standard_normal((keys, head_dim))
  draw *= np.sqrt(head_dim / np.square(draw).sum(-1, keepdims=True))
  query = np.full(head_dim, gain)
  others = np.exp(draw @ query / np.sqrt(head_dim)).sum()
  best = np.exp(gain * np.sqrt(head_dim))
  share = best / (best + others)
  assert share > 0.45
  assert gain == 1 or share < 0.65


def test_gains_where_the_rule_has_no_root_or_would_be_below_the_norm_s_start():
  assert starting_gain(100_000, 16) == 4.0
  assert starting_gain(8, 64) == starting_gain(0.5, 64) == 1.0


def test_the_gain_follows_the_lists_of_the_method():
  sizes = dict(size="custom", width=32, depth=2, heads=2, patch=(1, 1, 1))
  shape = (8, 12, 12, 1)

  def gain(**attention):
    model = model_config({**sizes, "attention": {"block": 64, "tile": (4, 4, 4), **attention}})
    return model.resolved(shape).attention.qk_gain

  window = "sliding_tile(window=(1, 3, 3), unit=tiles)"
  assert gain(method="dense") == starting_gain(1152, 16)
  assert gain(method=window) == starting_gain(9 * 64, 16)
  assert gain(layers=((0, 1, window), (1, None, "dense"))) == gain(method="dense")
  assert gain(method=window, qk_gain=1.25) == 1.25


def test_the_demo_has_the_figures_of_the_design_page():
  exp = experiment(read_config(ROOT / "configs" / "comparison.py"))
  assert np.round(exp.model.rope_theta).tolist() == [26, 21, 21]
  assert round(exp.model.attention.qk_gain, 2) == 1.67
  assert round(starting_gain(1152, 16), 2) == 2.62
  assert starting_gain(2980, 16) < starting_gain(2981, 16) == 4
  assert starting_gain(49_000, 128) == 1 < starting_gain(50_000, 128)


def test_the_distance_from_dense_attention_is_of_its_output_and_moves_the_method_alone():
  """The last projection of the layer does nothing, so that what is compared comes out."""
  layout = TileLayout((2, 3, 4), (1, 2, 4), 8)  # the lower tiles hold four tokens
  method = SlidingTile((1, 1, 1))
  layer = SpectralAttention(
    AttentionDims(8, 2, 8), method, layout, nnx.Rngs(0), implementation="reference"
  )
  layer.out.kernel[...] = jnp.eye(8)
  graphdef, params = nnx.split(layer)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, layout.n_buffer, 8)), jnp.float32)
  cond = Cond(jnp.full(2, 0.5), jnp.zeros((2, 8)), teacher=dense(layout))
  arrays = layout.arrays()

  def run(params, cond, table):
    out, _, aux = nnx.merge(graphdef, params)(x, cond, arrays, table, {})
    return out[:, arrays.valid], aux["distance"]

  own = method.tables(layout)
  dense_cond = dataclasses.replace(cond, phase=DENSE)
  wanted, none = run(params, dense_cond, cond.teacher)
  np.testing.assert_array_equal(none, 0)

  def by_hand(params):
    out, _ = run(params, cond, own)
    return jnp.sum((out - wanted) ** 2, (1, 2)) / jnp.sum(wanted**2, (1, 2))

  def measured(params):
    return run(params, cond, own)[1]

  assert by_hand(params).min() > 0.1
  np.testing.assert_allclose(measured(params), by_hand(params), rtol=1e-5)
  # `wanted` is a constant there.
  found, expected = (jax.jacrev(distance)(params) for distance in (measured, by_hand))
  norm = float(optax.tree.norm(expected.qkv))
  assert norm > 1e-2
  close = functools.partial(np.testing.assert_allclose, atol=1e-5 * norm)
  jax.tree.map(close, found.qkv, expected.qkv)
