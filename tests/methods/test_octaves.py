"""Octaves against a plain float64 form of what its docstring says, and its own properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.grid.pyramid import cell_widths, level_layouts
from freqformer.grid.rotary import level_theta, rotate
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.methods.parts.router import RouterConfig
from tests.methods.layers import (
  BASIS,
  DIMS,
  RAGGED,
  THETA,
  aux_of,
  heads_of,
  layer_of,
  run,
  tokens,
  where,
)

BIAS = np.random.default_rng(3).standard_normal((DIMS.heads, 3)).astype(np.float32)
FLAT = dataclasses.replace(Octaves().router, prior_slope=0.0)
METHOD = Octaves(window=(1, 3, 1), threshold=0.0, router=FLAT)


def drawn(method=METHOD):
  """A layer whose weights of levels differ by head, gains by level and head; its bias is not 0."""
  layer = layer_of(method)
  bias = layer.qkv.bias
  bias[...] = 0.5 * jax.random.normal(jax.random.key(5), bias[...].shape)
  module = layer.method
  module.router.bias[...] = jnp.asarray(BIAS)
  keys = jax.random.split(jax.random.key(4), 2)
  for gain, key in zip((module.q_gain, module.k_gain), keys, strict=True):
    gain[...] = 1 + 0.5 * jax.random.normal(key, gain[...].shape)
  return layer


# ---- the plain form ------------------------------------------------------------------------------


def means(x, layout):
  """Means over pairs of neighbours inside each tile along every axis, `[b, t, y, x, ...]`."""
  for axis, lengths in enumerate(layout.lengths, 1):
    starts = np.cumsum([0, *lengths[:-1]])
    pieces = [
      np.take(x, range(start + i, min(start + i + 2, start + length)), axis).mean(axis)
      for start, length in zip(starts, lengths, strict=True)
      for i in range(0, length, 2)
    ]
    x = np.stack(pieces, axis)
  return x


def centres(lengths):
  """Places of an axis's cells."""
  starts = np.cumsum([0, *lengths[:-1]])
  return [
    start + np.arange(i, min(i + 2, length)).mean()
    for start, length in zip(starts, lengths, strict=True)
    for i in range(0, length, 2)
  ]


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def plain(layer, x, weights):
  """Output of heads before the out projection, `[b, n, h, d]`; weights `[h, levels]`."""
  method = layer.config
  layouts = level_layouts(RAGGED, method.levels, method.basis, method.factor)
  flat = np.asarray(layer.qkv(RAGGED.arrays().unpack(x)), np.float64)
  d = DIMS.head_dim
  raw = flat.reshape(len(x), *RAGGED.grid, 3, DIMS.heads, d)
  outs = []
  for level, layout in enumerate(layouts):
    if level:
      raw = means(raw, layouts[level - 1])
    q, k, v = np.moveaxis(raw, 4, 0).reshape(3, len(x), layout.n, DIMS.heads, d)
    cells = np.stack(np.unravel_index(np.arange(layout.n), layout.grid), -1)
    theta = level_theta(THETA, cell_widths(layouts)[level], d)
    finished = []
    modules = (layer.method.q_gain, layer.method.k_gain)
    for y, norm, gain in zip((q, k), (layer.q_norm, layer.k_norm), modules, strict=True):
      y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])
      if level:
        y = y * np.asarray(gain[...])[level - 1, :, None]
      finished.append(np.asarray(rotate(jnp.asarray(y, jnp.float32), cells, theta), np.float64))
    q, k = finished
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d)
    if level < method.levels - 1:
      tile = cells // np.array(layout.tile)
      far = np.abs(tile[:, None] - tile[None]) > np.array(method.window) // 2
      scores = np.where(far.any(-1), -np.inf, scores)
    outs.append(np.einsum("bhqk,bkhd->bqhd", softmax(scores), v))
  total = 0
  for level in reversed(range(method.levels)):
    layout = layouts[level]
    own = outs[level] * weights[:, level, None]
    if level < method.levels - 1:
      total = total.reshape(len(x), *layouts[level + 1].grid, DIMS.heads, d)
      for axis, lengths in enumerate(layout.lengths):
        places = np.arange(layout.grid[axis])
        matrix = np.array(
          [np.interp(places, centres(lengths), e) for e in np.eye(total.shape[1 + axis])]
        )
        total = np.moveaxis(np.tensordot(total, matrix, (1 + axis, 0)), -1, 1 + axis)
      total = total.reshape(own.shape)
    total = total + own
  return total


def test_equals_the_plain_form():
  layer = drawn()
  x = tokens()
  want = plain(layer, x, softmax(BIAS.astype(np.float64)))
  np.testing.assert_allclose(heads_of(layer, x), want, atol=2e-5)


def test_a_level_below_the_threshold_is_left_out():
  """The weights that stay sum to one, the lists of the others are empty, the output follows."""
  probs = softmax(BIAS)
  threshold = float(np.sort(probs.reshape(-1))[6] + 1e-4)
  layer = drawn(dataclasses.replace(METHOD, threshold=threshold))
  x = tokens()
  kept = np.where(probs >= threshold, probs, 0)
  assert (kept == 0).sum() == 7
  want = plain(layer, x, kept / kept.sum(-1, keepdims=True))
  np.testing.assert_allclose(heads_of(layer, x), want, atol=2e-5)
  aux = run(layer, x)[1]
  soft = aux_of(layer, x, where(soft_evaluation=True))
  counts = aux_of(layer, x, where(want_masks=True))["mask"].kv_counts
  assert counts.shape[:2] == (2, DIMS.heads)
  np.testing.assert_array_equal(aux["kept"][0], kept > 0)
  assert aux["density"].mean() < soft["density"].mean()
  np.testing.assert_allclose(aux["expected_density"], aux["density"], rtol=1e-5)
  pairs = layer.config.pairs(RAGGED, DIMS.heads, (kept > 0).mean(0)).pairs
  np.testing.assert_allclose(pairs, aux["density"][0].sum() * RAGGED.n**2, rtol=1e-5)


def test_the_end_of_training_leaves_out_what_evaluation_does():
  """From `threshold_from` on weights and lists are those of evaluation; before, all levels run."""
  layer = drawn(dataclasses.replace(METHOD, threshold=0.3, threshold_from=0.5))
  x = tokens()
  probs = softmax(BIAS)
  kept = (probs >= 0.3) | (probs == probs.max(-1, keepdims=True))
  assert not kept.all()
  as_run = heads_of(layer, x)
  late = where(train=True, progress=0.5)
  np.testing.assert_allclose(heads_of(layer, x, late), as_run, atol=2e-6)
  early = where(train=True, progress=0.49)
  np.testing.assert_allclose(heads_of(layer, x, early), plain(layer, x, probs), atol=2e-5)
  # What evaluation will run is said and priced from the beginning.
  np.testing.assert_array_equal(aux_of(layer, x, early)["kept"][0], kept)
  gradient, aux = router_gradient(layer, x)  # at progress 1
  np.testing.assert_array_equal(aux["density"], run(layer, x)[1]["density"])
  size = np.abs(gradient) / np.abs(gradient).max()
  several = kept.sum(-1) > 1
  assert size[~kept].max() < 1e-5 and size[kept & several[:, None]].min() > 1e-3


@pytest.mark.parametrize("mode", ["soft", "straight_through", "gates"])
def test_levels_run_up_to_their_t(mode):
  """Above `until` a level has weight 0 and empty lists, in training, evaluation and with all on."""
  router = dataclasses.replace(FLAT, mode=mode)
  layer = drawn(dataclasses.replace(METHOD, until=(0.3, 0.7, 1.0), router=router))
  x = tokens()
  opened = np.array([[True, True, True], [False, False, True]])[:, None]  # t = .3, .9
  raised = np.where(opened, BIAS.astype(np.float64), -np.inf)
  weights = {
    "soft": softmax(raised),
    "straight_through": np.eye(3)[raised.argmax(-1)],
    "gates": 1 / (1 + np.exp(-raised)),
  }[mode]
  plain_layer = drawn(METHOD)
  want = [plain(plain_layer, x[i : i + 1], weights[i])[0] for i in range(2)]
  coarsest = METHOD.pairs(RAGGED, 1, (0, 0, 1)).pairs / RAGGED.n**2
  every = METHOD.pairs(RAGGED, 1).pairs / RAGGED.n**2
  for how in ({}, dict(train=True)):
    np.testing.assert_allclose(heads_of(layer, x, where(**how)), want, atol=2e-5)
    aux = aux_of(layer, x, where(**how))
    assert not (np.asarray(aux["kept"]) & ~opened).any()
    np.testing.assert_allclose(aux["density"][1], coarsest, rtol=1e-5)
  soft = aux_of(layer, x, where(soft_evaluation=True))
  np.testing.assert_array_equal(np.asarray(soft["probs"]) > 0, np.broadcast_to(opened, (2, 6, 3)))
  np.testing.assert_allclose(np.mean(soft["density"], 1), [every, coarsest], rtol=1e-5)
  gradient, _ = router_gradient(layer, x)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_some_samples_of_training_run_every_level():
  """Which ones their t tells, whatever the layer; evaluation keeps to `until`, on request not."""
  layer = drawn(dataclasses.replace(METHOD, until=(0.7, 1.0, 1.0), until_share=0.25))
  x = tokens(b=64)
  times = np.random.default_rng(0).uniform(0.6, 1, 64)
  high = times.astype(np.float32) > 0.7

  def finest(**how):
    return np.asarray(aux_of(layer, x, where(times, **how))["kept"])[:, 0, 0]

  trained = finest(train=True)
  assert trained[~high].all() and 0.6 < trained[high].mean() < 0.9
  np.testing.assert_array_equal(finest(train=True, rng=jax.random.key(1)), trained)
  np.testing.assert_array_equal(finest(), ~high)
  assert finest(soft_evaluation=True).all()


def test_levels_are_counted_by_the_share_of_t_in_which_they_run():
  """Until t = .3 and .6 of all t even in t: the mean of what runs at .15, .45 and .8."""
  method = dataclasses.replace(METHOD, until=(0.3, 0.6, 1.0))
  found = [method.pairs(RAGGED, 6, shares).pairs for shares in ((1, 1, 1), (0, 1, 1), (0, 0, 1))]
  np.testing.assert_allclose(method.pairs(RAGGED, 6).pairs, np.dot([0.3, 0.3, 0.4], found))
  either = dataclasses.replace(method, until_share=0.5)
  assert either.trains_all_branches and not method.trains_all_branches
  assert either.pairs(RAGGED, 6) == method.pairs(RAGGED, 6)  # of evaluation


def test_no_level_is_left_out_unless_asked():
  layer = drawn(Octaves(window=(1, 3, 1), router=FLAT))
  layer.method.router.bias[...] = 20 * jnp.asarray(BIAS)  # most weights are next to nothing
  x = tokens()
  aux = run(layer, x)[1]
  assert aux["probs"].min() < 1e-3 and aux["kept"].all()
  soft = aux_of(layer, x, where(soft_evaluation=True))
  np.testing.assert_array_equal(aux["density"], soft["density"])


def test_the_largest_weight_stays_whatever_the_threshold():
  layer = drawn(dataclasses.replace(METHOD, threshold=0.99))
  np.testing.assert_array_equal(aux_of(layer, tokens())["kept"].sum(-1), 1)


def test_straight_through_runs_one_level_and_has_the_gradient_of_all():
  mode = dataclasses.replace(METHOD.router, mode="straight_through")
  layer = drawn(dataclasses.replace(METHOD, router=mode))
  x = tokens()
  hot = np.eye(3)[BIAS.argmax(-1)]
  np.testing.assert_allclose(heads_of(layer, x), plain(layer, x, hot), atol=2e-5)
  gradient, aux = router_gradient(layer, x)
  assert (np.abs(gradient) > 1e-6).all()
  assert run(layer, x)[1]["density"].mean() < 0.5 * aux["density"].mean()


def router_gradient(layer, x):
  """Gradient of the training loss by the router's bias, `[h, levels]`, and the layer's aux."""
  method = layer.config
  args = (where(train=True), RAGGED.arrays(), method.tables(RAGGED), {})

  @nnx.jit
  def gradient(layer):
    def loss(layer):
      out, _, aux = layer(x, *args)
      return aux["loss"] if method.router.penalty else (out**2).sum(), aux

    return nnx.grad(loss, has_aux=True)(layer)

  found, aux = gradient(layer)
  return np.asarray(found["method"]["router"]["bias"][...]), aux


@pytest.mark.parametrize("budget, acts", [(0.05, True), (0.9, False)])
def test_the_budget_takes_weight_from_dear_levels(budget, acts):
  router = dataclasses.replace(METHOD.router, penalty=1.0, budget=budget)
  gradient, _ = router_gradient(drawn(dataclasses.replace(METHOD, router=router)), tokens())
  assert np.abs(gradient).max() > 0 if acts else np.abs(gradient).max() == 0
  if acts:
    assert (gradient[:, 0] > 0).all() and (gradient[:, 2] < 0).all()


def test_mid_tiles_find_a_far_match():
  """A key that answers a far query is read through the lists of level 0."""
  layer = layer_of(Octaves(levels=2, window=(1, 1, 1), mid_tiles=1, threshold=0.0))
  mask = aux_of(layer, tokens(), where(want_masks=True))["mask"]
  window = layer_of(Octaves(levels=2, window=(1, 1, 1), threshold=0.0))
  static = aux_of(window, tokens(), where(want_masks=True))["mask"]
  tiles = RAGGED.tiles
  counts = np.asarray(mask.kv_counts)[..., -tiles:]
  np.testing.assert_array_equal(counts, 2)
  own = np.arange(tiles) + mask.kv_tiles - tiles
  assert (np.asarray(mask.kv_indices)[..., -tiles:, :2] == own[:, None]).any(-1).all()
  assert np.asarray(static.kv_counts)[..., -tiles:].max() == 1


def test_weights_begin_fine_at_little_noise_and_coarse_at_much():
  router = dataclasses.replace(METHOD.router, prior_slope=6.0)
  probs = aux_of(layer_of(dataclasses.replace(METHOD, router=router)), tokens())["probs"]
  # Times are 0.3 and 0.9: logits differ by 6 (t - 1/2) from the finest level to the coarsest.
  for sample, rise in zip(probs, (-1.2, 2.4), strict=True):
    want = softmax(np.array([-rise / 2, 0, rise / 2]))
    np.testing.assert_allclose(sample, np.broadcast_to(want, (DIMS.heads, 3)), rtol=1e-5)


def test_gates_do_not_compete():
  router = dataclasses.replace(METHOD.router, mode="gates")
  layer = drawn(dataclasses.replace(METHOD, router=router))
  x = tokens()
  want = plain(layer, x, 1 / (1 + np.exp(-BIAS.astype(np.float64))))
  np.testing.assert_allclose(heads_of(layer, x), want, atol=2e-5)


def test_statistics_of_content_reach_the_weights():
  router = dataclasses.replace(METHOD.router, statistics=True)
  layer = layer_of(dataclasses.replace(METHOD, router=router))
  out = layer.method.router.out.kernel
  out[...] = 0.01 * jnp.asarray(np.random.default_rng(0).standard_normal(out[...].shape))
  x = tokens()
  smooth = RAGGED.arrays().pack(jnp.broadcast_to(x[:, :1], (2, RAGGED.n, DIMS.width)))
  probs = [aux_of(layer, y)["probs"] for y in (x, smooth)]
  assert np.abs(np.asarray(probs[0] - probs[1])).max() > 0.01


@pytest.mark.parametrize(
  "fields, says",
  [
    (dict(levels=0), "levels=0"),
    (dict(basis="fft"), "block_haar"),
    (dict(lift="cubic"), "linear"),
    (dict(threshold=1.0), "threshold=1"),
    (dict(threshold_from=0.5), "threshold_from=0.5 leaves out nothing with threshold=0"),
    (dict(threshold=0.1, threshold_from=1.5), "threshold_from=1.5 must be"),
    (
      dict(until=(0.7, 1.0)),
      r"until=\(0.7, 1.0\) must be empty or have a t for each of .*levels=3",
    ),
    (dict(until=(0.7, 1.0, 0.9)), "with 1 for the coarsest"),
    (dict(until=(0.7, 1.1, 1.0)), "until"),
    (dict(until_share=0.5), "until_share=0.5 is of samples that keep to until, which is empty"),
    (dict(router=RouterConfig(prior=(1, 1))), "share for each of"),
    (dict(router=RouterConfig(prior=(), mode="sampled")), "straight_through"),
    (dict(router=RouterConfig(prior=(), mode="random")), "straight_through"),
  ],
)
def test_refuses_fields(fields, says):
  with pytest.raises(ValueError, match=says):
    Octaves(**fields)


def test_refuses_grids_and_budgets():
  with pytest.raises(ConfigError, match=r"levels=8.*choose at most 5"):
    layer_of(Octaves(levels=8))
  router = dataclasses.replace(METHOD.router, penalty=0.1, budget=1e-4)
  banded = FreqFormer(basis=BASIS, window=(1, 3, 1), router=RouterConfig(budget=1e-4))
  for method in (dataclasses.replace(METHOD, router=router), banded):
    with pytest.raises(ConfigError, match="budget=0.0001 cannot be kept.*penalty=0"):
      method.check_training(RAGGED, DIMS.heads)
  with pytest.raises(ConfigError, match="3 shares of heads"):
    METHOD.pairs(RAGGED, 6, (1, 1))
