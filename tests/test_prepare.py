"""The kernels around attention: plain forms against the operators they stand for, Hopper kernels against the plain forms."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer import attention as attention_layer
from freqformer.attention import AttentionDims, SpectralAttention
from freqformer.layout import TileLayout
from freqformer.methods.base import Cond
from freqformer.methods.dense import Dense
from freqformer.methods.freqformer import FreqFormer
from freqformer.rotary import angle_tables, rotate
from freqformer.spectral import SpectralBasis
from freqformer.tile_cells import tile_cells
from kernels import attention as attention_entry
from kernels import lift_mgpu, prepare_mgpu
from kernels import pallas_mgpu_parts as parts
from kernels.lift import lift
from kernels.lift import unsupported as lift_unsupported
from kernels.prepare import prepare, unsupported
from kernels.target import Target

HOPPER = Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")
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


def _inputs(case, dtype=jnp.bfloat16, seed=0, basis=BASIS):
  """Arguments of `prepare`; padding rows hold large numbers."""
  layout, draw = case.layout, np.random.default_rng(seed)
  arrays, spectral = layout.arrays(), basis.fit(layout)
  front = -(-spectral.n_coarse // case.block) * case.block
  joint = draw.standard_normal((case.b, layout.n_buffer, 3, case.h, case.d))
  joint[:, ~arrays.valid] *= 1e3
  bias = jnp.asarray(draw.standard_normal((3, case.h, case.d)), jnp.float32)
  gains = tuple(jnp.asarray(draw.uniform(0.5, 2, case.d), jnp.float32) for _ in "qk")
  cells = tile_cells(spectral, front)
  tables = angle_tables(arrays.positions, case.d)
  return jnp.asarray(joint, dtype), bias, gains, tables, arrays.kv_len, cells, spectral


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
  joint, bias, gains, tables, lengths, cells, spectral = _inputs(case, jnp.float32)
  arrays, front = case.layout.arrays(), cells.front
  got = prepare(joint, bias, gains, tables, lengths, cells.cells(spectral.centres, case.d), pooled=True, implementation="plain")
  coarse = slice(0, spectral.n_coarse)
  for name, gain, pool, x in zip("qkv", (*gains, None), (*got[3:], None), jnp.unstack(joint + bias, axis=2), strict=True):
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
  """Against the plain form in float32 from the same 16-bit inputs: one rounding apart. The first case watches for races."""
  joint, bias, gains, tables, lengths, cells, spectral = _inputs(case)
  cells = cells.cells(spectral.centres, case.d)
  want = prepare(joint.astype(jnp.float32), bias, gains, tables, lengths, cells, pooled=True, implementation="plain")
  with parts.interpreted(detect_races=case == CASES["alike"]):
    assert unsupported(joint, len(lengths), cells) is None
    got = jax.jit(lambda *a: prepare(*a, pooled=True))(joint, bias, gains, tables, lengths, cells)
    alone = jax.jit(prepare)(joint, bias, gains, tables, lengths)
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
  *_, cells, spectral = _inputs(case)
  draw = np.random.default_rng(1)
  packed = jnp.asarray(draw.standard_normal((case.b, cells.front + case.layout.n_buffer, case.h, case.d)), jnp.bfloat16)
  low = jnp.asarray(draw.random((case.b, case.h)) < 0.5).at[:, 0].set(True).at[:, -1].set(False)
  weights = jnp.asarray(draw.uniform(0.5, 2, low.shape), jnp.float32)
  wide = packed.astype(jnp.float32)
  coarse = jnp.where(low[:, None, :, None], wide[:, : spectral.n_coarse], 0)
  want = (wide[:, cells.front :] + spectral.lift(coarse)) * weights[:, None, :, None]
  _close(lift(wide, weights, low, cells.expansion), want, 1e-5)
  with parts.interpreted(detect_races=case == CASES["alike"]):
    got = jax.jit(lift)(packed, weights, low, cells.expansion)
  valid = case.layout.arrays().valid
  _close(got[:, valid], want[:, valid], 2e-2)
  assert np.abs(np.asarray(got[:, valid] - want[:, valid])).max() <= 2**-8 * np.abs(np.asarray(want)).max()


def _layer(case, method, implementation=None):
  """Loss, output and gradients of a layer in bfloat16 whose gains are not one and biases not zero; valid rows count."""
  layout = case.layout
  width = case.h * case.d
  build = lambda: SpectralAttention(
    AttentionDims(width, case.h, 8), method, layout, nnx.Rngs(0), dtype=jnp.bfloat16, implementation=implementation
  )
  graphdef, params = nnx.split(build())
  draw = np.random.default_rng(3)
  params = jax.tree.map(lambda x: x + draw.uniform(0, 0.5, x.shape).astype(x.dtype) if x.ndim == 1 else x, params)
  x, weigh = (jnp.asarray(draw.standard_normal((case.b, layout.n_buffer, width)), jnp.bfloat16) for _ in range(2))
  valid = jnp.asarray(layout.arrays().valid)[:, None]
  tables = method.tables(layout)

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def loss(params, x):
    cond = Cond(jnp.full(case.b, 0.5), jnp.ones((case.b, 8)))
    out = nnx.merge(graphdef, params)(x, cond, layout.arrays(), tables, {})[0]
    return jnp.where(valid, out * weigh, 0).astype(jnp.float32).sum(), out

  return jax.jit(loss)(params, x), valid


METHODS = {
  "dense": Dense(),
  "freqformer": FreqFormer(basis=BASIS, allocation=(1, 1, 0), mid_tiles=2, low_shared=True),
  "filtered": FreqFormer(basis=BASIS, allocation=(1, 0, 1), mid_tiles=2, filter="v"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_layer_with_and_without_kernels(method, monkeypatch):
  """Output and every gradient, to what 16 bits allow; XLA's attention runs in both."""
  case = dataclasses.replace(CASES["ragged"], grid=(5, 4, 7), b=1)
  monkeypatch.setattr(attention_entry, "BACKENDS", ("xla",))
  with parts.interpreted():
    (_, got), got_grads = _layer(case, method)[0]
    called = []
    monkeypatch.setattr(attention_layer, "unsupported", lambda *a: called.append(a) or "told so")
    ((_, want), want_grads), valid = _layer(case, method)
  assert called
  _close(jnp.where(valid, got, 0), jnp.where(valid, want, 0), 0.1)
  for g, w in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
    assert float(jnp.linalg.norm((g - w).astype(jnp.float32))) <= 2e-2 * float(jnp.linalg.norm(w.astype(jnp.float32)))


def test_refusals():
  """Every reason at once; a named kernel is not replaced."""
  case = dataclasses.replace(CASES["ragged"], block=72, d=80)
  joint, bias, gains, tables, lengths, _, _ = _inputs(case, jnp.float32)
  assert re.search("compute capability 9.0.*float32.*head_dim is 80.*72 rows", unsupported(joint, len(lengths)))
  assert unsupported(jnp.zeros((1, 128, 3, 1, 64), jnp.bfloat16), 1, None, HOPPER) is None
  with pytest.raises(NotImplementedError, match="head_dim is 80"):
    prepare(joint, bias, gains, tables, lengths, implementation="pallas_mgpu")
  *_, cells, spectral = _inputs(
    dataclasses.replace(CASES["ragged"], tile=(4, 4, 4)), basis=SpectralBasis("block_dct", *[(1,) * 3] * 2)
  )
  reason = lift_unsupported(jnp.zeros((1, 1024, 1, 64), jnp.bfloat16), cells.expansion, HOPPER)
  assert reason == "a tile has 64 coarse tokens, it takes at most 57"
