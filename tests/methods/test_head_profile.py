"""Heads dealt by measurement: planted heads are recognised, the choice stays and is shared."""

import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import from_tiles

from freqformer.config import ConfigError
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Dims
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.head_profile import (
  ProfileConfig,
  dense_rows,
  most_faithful,
  relative_errors,
  rows_of,
  sample_rows,
)
from freqformer.methods.spatial_temporal import SpatialTemporal
from tests.methods.layers import BASIS, RAGGED, step

LAYOUT = TileLayout((8, 8, 16), (2, 4, 4), 32)  # 4 x 2 x 4 tiles
D = 16


def hot(number, gain=6.0):
  """`[n] -> [n, D]`: equal numbers match, others do not."""
  return gain * np.eye(D, dtype=np.float32)[number % D]


def run(method, qkv, *args, **fields):
  """A step on q, k, v `[b, n, h, D]` in raster order."""
  arrays = LAYOUT.arrays()
  return step(
    method, [arrays.pack(jnp.asarray(x, jnp.float32)) for x in qkv], LAYOUT, *args, **fields
  )


# ---- the measurement -------------------------------------------------------------------


def test_sampled_rows_are_rows_of_attention():
  rng = np.random.default_rng(0)
  arrays = RAGGED.arrays()
  rows = sample_rows(RAGGED, 20)
  assert len(rows) == 20 and arrays.valid[rows].all() and (np.diff(rows) > 0).all()
  q, k, v = jnp.asarray(rng.standard_normal((3, 2, RAGGED.n_buffer, 3, 8)), jnp.float32)
  v = jnp.where(arrays.valid[:, None, None], v, jnp.nan)  # padding may hold anything
  tiles = rng.random((RAGGED.tiles, RAGGED.tiles)) < 0.4
  np.fill_diagonal(tiles, True)
  sparse = from_tiles(tiles, arrays.kv_len, 32, 32)
  listed = np.repeat(rows_of(sparse, rows), 32, axis=-1)
  outs = dense_rows(q[:, rows], k, v, arrays.valid, [listed])
  full = from_tiles(np.ones_like(tiles), arrays.kv_len, 32, 32)
  clean = jnp.nan_to_num(v)
  for mask, out in zip((full, sparse), outs, strict=True):
    np.testing.assert_allclose(out, attention(q, k, clean, mask)[0][:, rows], atol=1e-5)
  want = jnp.square(outs[1] - outs[0]).sum((1, 3)) / jnp.square(outs[0]).sum((1, 3))
  np.testing.assert_allclose(relative_errors(outs[1:], outs[0])[..., 0], want, rtol=1e-5)


def test_the_cheapest_of_the_faithful_is_chosen():
  errors = jnp.array([[[0.10, 0.11, 0.2], [0.3, 0.1, 0.1], [0.2, 0.1, 0.12]]])
  costs = jnp.array([3.0, 2.0, 1.0])
  assert most_faithful(errors, costs).tolist() == [[0, 2, 1]]
  assert most_faithful(errors, costs, slack=0.15).tolist() == [[1, 2, 1]]
  assert most_faithful(errors, costs, slack=9.0).tolist() == [[2, 2, 2]]


def test_phases():
  profile = ProfileConfig(warmup=0.3, every=3)
  after = ["profile", "run", "run", "profile", "run", "run", "profile"]
  assert [profile.phase(i, 10) for i in range(10)] == ["warmup"] * 3 + after
  assert [ProfileConfig(warmup=0.0).phase(i, 3) for i in range(3)] == ["profile", "run", "run"]
  with pytest.raises(ConfigError, match="makes 3 of 3 sampling steps dense"):
    ProfileConfig(warmup=0.9).check_run(3)
  with pytest.raises(ConfigError, match="makes 5 of 5"):
    FreqFormer(allocation="measured", profile=ProfileConfig(warmup=0.95)).check_run(5)
  FreqFormer().check_run(1)


# ---- planted heads ---------------------------------------------------------------------


def planted():
  """q, k, v `[1, n, 2, D]`: head 0 looks within its frames, head 1 at its place in all frames."""
  t, y, x = np.unravel_index(np.arange(LAYOUT.n), LAYOUT.grid)
  frame, place = t // 2, (y // 4) * 4 + x // 4
  q = np.stack([hot(frame), hot(place)], 1)[None]
  return q, q, np.random.default_rng(0).standard_normal(q.shape)


def test_spatial_and_temporal_heads_are_told_apart():
  method = SpatialTemporal(frames=0, places=0, sink=0)
  state = method.init_state(1, Dims(2, D, 4), LAYOUT)
  out, state, aux = run(method, planted(), "profile", state)
  assert state["choice"].tolist() == aux["choice"].tolist() == [[0, 1]]
  np.testing.assert_allclose(aux["density"], [[1 / 4, 1 / 8]])
  swapped = [x[:, :, ::-1] for x in planted()]
  _, kept, _ = run(method, swapped, "run", state)
  assert kept["choice"].tolist() == [[0, 1]]  # what was measured stays until it is measured again
  _, anew, _ = run(method, swapped, "profile", state)
  assert anew["choice"].tolist() == [[1, 0]]
  both = [np.concatenate([a, b]) for a, b in zip(planted(), swapped, strict=True)]
  choice = run(method, both, "profile", {}, guided=True)[2]["choice"]
  assert choice.tolist() == [[0, 1]] * 2  # the conditional half's
  assert run(method, both, "profile", {})[2]["choice"].tolist() == [[0, 1], [1, 0]]


def test_bands_are_given_to_the_heads_they_serve():
  """Low serves even attention, the window tokens alike in one half, top-k four far tiles."""
  t, y, x = np.unravel_index(np.arange(LAYOUT.n), LAYOUT.grid)
  four = (t // 2) * 2 + y // 4
  half = t // 4
  parity = (t % 2) * 4 + (y % 2) * 2 + x % 2

  def like(place):
    return hot(place) + hot(8 + parity)  # parity is what compression blurs

  keys = np.stack([np.zeros((LAYOUT.n, D)), like(half), like(four)], 1)
  queries = np.stack([keys[:, 0], keys[:, 1], like((four + 4) % 8)], 1)
  v = np.random.default_rng(1).standard_normal((LAYOUT.n, 3, D))
  # Five of the 16 tiles of a half are too few; three of the four frames of tiles hold either half.
  method = FreqFormer(basis=BASIS, allocation="measured", mid_tiles=5, window=(3, 2, 4))
  _, _, aux = run(method, (queries[None], keys[None], v[None]), "profile", {})
  assert aux["choice"].tolist() == [[0, 2, 1]]
  errors = aux["band_errors"][0]
  assert max(errors[0, 0], errors[2, 1]) < 1e-4 and errors[1, 2] < 0.1 < errors[1, 1]
