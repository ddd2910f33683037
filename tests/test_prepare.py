"""The kernels around attention: plain forms against the operators they stand for, Hopper kernels against the plain forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.layout import TileLayout
from freqformer.rotary import angle_tables, rotate
from freqformer.spectral import SpectralBasis
from freqformer.tile_cells import tile_cells
from kernels import lift_mgpu, prepare_mgpu
from kernels import pallas_mgpu_parts as parts
from kernels.lift import lift
from kernels.prepare import prepare, unsupported

BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer's sizes; the grid decides whether tiles are alike."""

  grid: tuple
  tile: tuple
  block: int
  d: int
  b: int = 1
  h: int = 2

  @property
  def layout(self):
    return TileLayout(self.grid, self.tile, self.block)


CASES = {
  "alike": Case((4, 8, 16), (4, 4, 8), 128, 128),  # coarse rows of a tile are a multiple of 8: stored in place
  "ragged": Case((5, 6, 7), (3, 4, 5), 64, 64, b=2),  # eight kinds of tiles
  "ragged, big": Case((4, 6, 7), (4, 5, 6), 128, 64, h=3),
}


def _inputs(case, dtype=jnp.bfloat16, seed=0):
  """Arguments of `prepare`; padding rows hold large numbers."""
  layout, draw = case.layout, np.random.default_rng(seed)
  arrays, spectral = layout.arrays(), BASIS.fit(layout)
  front = -(-spectral.n_coarse // case.block) * case.block
  joint = draw.standard_normal((case.b, layout.n_buffer, 3, case.h, case.d))
  joint[:, ~arrays.valid] *= 1e3
  gains = tuple(jnp.asarray(draw.uniform(0.5, 2, case.d), jnp.float32) for _ in "qk")
  cells = tile_cells(spectral, front)
  tables = angle_tables(arrays.positions, case.d)
  return jnp.asarray(joint, dtype), gains, tables, arrays.kv_len, cells, spectral


def _close(got, want, tolerance):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  scale = np.sqrt(np.square(want).mean())
  assert np.abs(got - want).max() <= tolerance * scale, np.abs(got - want).max() / scale


@pytest.fixture(params=CASES, ids=str)
def case(request, monkeypatch):
  """Where there is one sample, a thread block walks over all heads; elsewhere over one."""
  case = CASES[request.param]
  if case.b == 1:
    monkeypatch.setattr(prepare_mgpu, "BLOCKS", 1)
    monkeypatch.setattr(lift_mgpu, "BLOCKS", 1)
  return case


def test_plain_form_is_the_layers_own_operators(case):
  """Norm by its formula, rotary, compression and pooling by the functions that the layer has for them, in float32."""
  joint, gains, tables, lengths, cells, spectral = _inputs(case, jnp.float32)
  arrays, front = case.layout.arrays(), cells.front
  got = prepare(joint, gains, tables, lengths, cells.cells(spectral.centres, case.d), pooled=True, implementation="plain")
  coarse = slice(0, spectral.n_coarse)
  for name, gain, pool, x in zip("qkv", (*gains, None), (*got[3:], None), jnp.unstack(joint, axis=2), strict=True):
    finish = lambda x, at, gain=gain: rotate(x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * gain, at)
    if gain is None:
      finish = lambda x, at: x
    found, want = getattr(got, name), finish(x, arrays.positions)
    _close(found[:, front:][:, arrays.valid], want[:, arrays.valid], 1e-4)
    _close(found[:, coarse], finish(spectral.compress(x), spectral.centres), 1e-4)
    assert not found[:, spectral.n_coarse : front].any()
    if pool is not None:
      means = [want[:, t * case.block :][:, :k].mean(1) for t, k in enumerate(lengths)]
      _close(pool, jnp.stack(means, 2), 1e-4)


def test_prepare_kernel(case):
  """Against the plain form in float32 from the same 16-bit inputs: one rounding apart."""
  joint, gains, tables, lengths, cells, spectral = _inputs(case)
  cells = cells.cells(spectral.centres, case.d)
  want = prepare(joint.astype(jnp.float32), gains, tables, lengths, cells, pooled=True, implementation="plain")
  with parts.interpreted():
    assert unsupported(joint, len(lengths), cells) is None
    got = jax.jit(lambda *a: prepare(*a, pooled=True))(joint, gains, tables, lengths, cells)
    alone = jax.jit(prepare)(joint, gains, tables, lengths)
  valid = np.concatenate([np.ones(cells.front, bool), case.layout.arrays().valid])
  for name in "qkv":
    found, right = np.asarray(getattr(got, name), np.float32), np.asarray(getattr(want, name))
    assert np.abs(found - right)[:, valid].max() <= 2**-8 * np.abs(right[:, valid]).max()
    assert np.isfinite(found).all() and np.array_equal(getattr(alone, name).astype(jnp.float32), found[:, cells.front :])
  for name in "qk":  # of the tokens as they were rounded
    tokens = getattr(got, name)[:, cells.front :].astype(jnp.float32)
    means = [tokens[:, t * case.block :][:, :k].mean(1) for t, k in enumerate(lengths)]
    _close(getattr(got, f"{name}_pool"), jnp.stack(means, 2), 1e-5)
  assert alone.q_pool is None


def test_lift_kernel(case):
  """Against spectral.lift in float32; heads without coarse rows are scaled only."""
  _, _, _, _, cells, spectral = _inputs(case)
  draw = np.random.default_rng(1)
  packed = jnp.asarray(draw.standard_normal((case.b, cells.front + case.layout.n_buffer, case.h, case.d)), jnp.bfloat16)
  low = jnp.asarray(draw.random((case.b, case.h)) < 0.5).at[:, 0].set(True).at[:, -1].set(False)
  weights = jnp.asarray(draw.uniform(0.5, 2, low.shape), jnp.float32)
  wide = packed.astype(jnp.float32)
  coarse = jnp.where(low[:, None, :, None], wide[:, : spectral.n_coarse], 0)
  want = (wide[:, cells.front :] + spectral.lift(coarse)) * weights[:, None, :, None]
  _close(lift(wide, weights, low, cells.expansion), want, 1e-5)
  with parts.interpreted():
    got = jax.jit(lift)(packed, weights, low, cells.expansion)
  valid = case.layout.arrays().valid
  _close(got[:, valid], want[:, valid], 2e-2)
  assert np.abs(np.asarray(got[:, valid] - want[:, valid])).max() <= 2**-8 * np.abs(np.asarray(want)).max()
