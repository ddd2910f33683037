"""`prepare` and `lift`: definitions against the spectral operators, kernels against definitions."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.around.lift import LIFT, lift
from freqformer.kernels.around.prepare import PREPARE, prepare, turn
from freqformer.kernels.block_sparse.api import ATTENTION
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper import interpret, launch
from freqformer.kernels.triton import interpret as triton_interpret
from jax.sharding import PartitionSpec as P

from freqformer.analysis.hlo_bytes import collectives
from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import angle_tables, rotate
from freqformer.grid.tile_matrices import tile_cells
from freqformer.methods.base import Cond
from freqformer.methods.dense import Dense
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.model.attention import AttentionDims, SpectralAttention
from tests.kernels.block_sparse.suite import relative_error, worst_error
from tools import offline

HOPPER = Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")
BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))
THETA = (20.0, 30.0, 40.0)  # of rotary, per axis


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer's sizes; the grid decides whether tiles are alike.

  Heads have all bands in turn, where something is filtered.
  """

  grid: tuple
  tile: tuple
  block: int
  d: int
  b: int = 1
  h: int = 2
  filtered: str = ""

  @property
  def layout(self):
    return TileLayout(self.grid, self.tile, self.block)

  @property
  def bands(self):
    return jnp.arange(self.b * self.h).reshape(self.b, self.h) % 3

  def angles(self, positions):
    """Returns rotary's tables at positions, as a layer makes them."""
    return angle_tables(positions, self.d, THETA)

  def in_band(self, x, spectral):
    """Returns tokens `x` in each head's band, by functions of the grid."""
    low, box = spectral.project_low(x), spectral.project_box(x)
    bands = self.bands[:, None, :, None]
    return jnp.select([bands == 1, bands == 2], [box - low, x - box], x)

  def means(self, x, lengths):
    """Returns means over each tile's valid rows, `[b, h, tiles, d]`."""
    return np.stack([x[:, t * self.block :][:, :k].mean(1) for t, k in enumerate(lengths)], 2)


CASES = {
  # Coarse rows of a tile are a multiple of 8: stored in place.
  "alike": Case((4, 8, 16), (4, 4, 8), 128, 128),
  # Eight kinds of tiles.
  "ragged": Case((5, 6, 7), (3, 4, 5), 64, 64, b=2, filtered="v"),
  "ragged, big": Case((4, 6, 7), (4, 5, 6), 128, 64, h=3, filtered="qkv"),
}


def _inputs(case, dtype=jnp.bfloat16, basis=BASIS):
  """Arguments of `prepare`; padding rows hold large numbers."""
  layout, draw = case.layout, np.random.default_rng(0)
  arrays, spectral = layout.arrays(), basis.fit(layout)
  front = -(-spectral.n_coarse // case.block) * case.block
  joint = draw.standard_normal((case.b, layout.n_buffer, 3, case.h, case.d))
  joint[:, ~arrays.valid] *= 1e3
  bias = jnp.asarray(draw.standard_normal((3, case.h, case.d)), jnp.float32)
  gains = tuple(jnp.asarray(draw.uniform(0.5, 2, case.d), jnp.float32) for _ in "qk")
  cells = tile_cells(spectral, front, filtered=True)
  tables = case.angles(arrays.positions)
  return jnp.asarray(joint, dtype), bias, gains, tables, arrays.kv_len, cells, spectral


# What each implementation's tokens are here. Triton's interpreter multiplies bfloat16 as float32.
DTYPES = {"hopper": jnp.bfloat16, "triton": jnp.float16}


@contextlib.contextmanager
def _interpreted(implementation, detect_races=False):
  """Runs an implementation's kernels in its interpreter; Hopper's may watch for races."""
  if implementation == "triton":
    with triton_interpret.interpreted():
      yield
  else:
    with interpret.interpreted(detect_races=detect_races):
      yield


def _gains_of_heads(case):
  """Returns gains of q and k, `[h, d]` each, for a norm over heads."""
  draw = np.random.default_rng(1)
  shape = (case.h, case.d)
  return tuple(jnp.asarray(draw.uniform(0.5, 2, shape), jnp.float32) for _ in "qk")


def _rightly_rounded(got, want, dtype=jnp.bfloat16):
  """Returns True if 99% of the numbers are the right ones as 16 bits round them.

  That needs matrices in two terms: with one, a fifth of what they make is rounded to a neighbour.
  """
  rounded = np.asarray(jnp.asarray(want).astype(dtype), np.float32)
  return (np.asarray(got, np.float32) == rounded).mean() > 0.99


def _assert_right(case, got, want, alone, front, n_coarse):
  """Compares a kernel's arrays with the definition's, and its tokens with those without cells."""
  arrays = case.layout.arrays()
  valid = np.concatenate([np.ones(front, bool), arrays.valid])
  dtype = got.q.dtype
  half = float(jnp.finfo(dtype).eps) / 2  # of the last bit
  for name in "qkv":
    found = np.asarray(getattr(got, name), np.float32)
    right = np.asarray(getattr(want, name))
    assert np.abs(found - right)[:, valid].max() <= half * np.abs(right[:, valid]).max()
    assert np.isfinite(found).all()
    for rows in (slice(0, n_coarse), valid):
      assert _rightly_rounded(found[:, rows], right[:, rows], dtype)
    tokens = np.asarray(getattr(alone, name), np.float32)
    # Without cells v is the projection as it is, padding rows included.
    assert name in "v" + case.filtered or np.array_equal(tokens, found[:, front:])
    if name in "qk":  # of the tokens as they were rounded, not filtered
      means = case.means(tokens, arrays.kv_len)
      assert worst_error(getattr(got, f"{name}_pool"), means) <= 1e-5


@pytest.fixture(params=CASES, ids=str)
def case(request, monkeypatch):
  """With one sample a thread block walks over all heads, otherwise over one."""
  case = CASES[request.param]
  if case.b == 1:
    monkeypatch.setattr(launch, "STREAMING_BLOCKS", 1)
  return case


def _refusal(op, *call):
  with pytest.raises(NotImplementedError) as error:
    op.choose(*call, implementation="hopper", target=HOPPER)
  return str(error.value)


@pytest.mark.parametrize(
  "name, kind", [*((name, "block_dct") for name in CASES), ("ragged", "dct"), ("ragged", "haar")]
)
def test_the_definition_is_the_spectral_operators(name, kind):
  """Norm and pooling by formula; rotary, compression, filters, lift by functions of the grid.

  Kernels refuse a transform of whole axes.
  """
  case = CASES[name]
  joint, bias, gains, angles, lengths, *_ = _inputs(case, jnp.float32)
  basis = BASIS
  if kind != "block_dct":
    basis = dataclasses.replace(BASIS, kind=kind, mid=(0.5, 1.0, 1.0))
  tables = FreqFormer(basis=basis, filter="qkv").tables(case.layout)
  spectral, cells = tables.spectral, tables.around(case.angles)
  arrays = case.layout.arrays()
  valid = np.concatenate([np.zeros(cells.front, bool), arrays.valid])
  operands = (joint, bias, gains, angles, lengths, cells, case.bands)
  got = prepare(*operands, pooled=True, filtered=case.filtered, implementation="xla")

  def finish(x, gain, at):
    if gain is None:
      return x
    return rotate(x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * gain, at, THETA)

  q_k_v = jnp.unstack(joint + bias, axis=2)
  for name, gain, pool, x in zip("qkv", (*gains, None), (*got[3:], None), q_k_v, strict=True):
    found = getattr(got, name)
    tokens = case.in_band(x, spectral) if name in case.filtered else x
    want = finish(tokens, gain, arrays.positions)[:, arrays.valid]
    assert worst_error(found[:, valid], want) <= 1e-4
    coarse = finish(spectral.compress(x), gain, spectral.centres)
    assert worst_error(found[:, : spectral.n_coarse], coarse) <= 1e-4
    assert not found[:, spectral.n_coarse : cells.front].any()
    if pool is not None:
      means = case.means(finish(x, gain, arrays.positions), lengths)
      assert worst_error(pool, means) <= 1e-4
  ones = jnp.ones(case.bands.shape)
  lifted = lift(got.v, ones, ones > 0, tables.expansion, "xla")
  assert (
    worst_error(lifted[:, arrays.valid], want + spectral.project_low(x)[:, arrays.valid]) <= 1e-4
  )
  if kind != "block_dct":
    assert "the transform leaves the tile" in _refusal(PREPARE, joint, lengths, cells)
    assert "the transform leaves the tile" in _refusal(LIFT, got.v, tables.expansion)


def test_a_norm_over_all_heads():
  """The definition has it for tokens and coarse tokens, and refuses it for filtered q and k."""
  case = CASES["ragged"]
  joint, bias, _, angles, lengths, *_ = _inputs(case, jnp.float32)
  tables = FreqFormer(basis=BASIS, filter="v").tables(case.layout)
  spectral, cells = tables.spectral, tables.around(case.angles)
  arrays = case.layout.arrays()
  gains = _gains_of_heads(case)
  operands = (joint, bias, gains, angles, lengths, cells, case.bands)
  got = prepare(*operands, filtered="v", over_heads=True)

  def finish(x, gain, at):
    square = jnp.square(x).mean((-2, -1), keepdims=True)
    return rotate(x / jnp.sqrt(square + 1e-6) * gain, at, THETA)

  for name, gain, x in zip("qk", gains, jnp.unstack(joint + bias, axis=2), strict=False):
    found = getattr(got, name)
    tokens = finish(x, gain, arrays.positions)[:, arrays.valid]
    assert worst_error(found[:, cells.front :][:, arrays.valid], tokens) <= 1e-4
    coarse = finish(spectral.compress(x), gain, spectral.centres)
    assert worst_error(found[:, : spectral.n_coarse], coarse) <= 1e-4
  with pytest.raises(ValueError, match="would mix bands"):
    prepare(*operands, filtered="qkv", over_heads=True)


def test_rows_ahead_of_the_tokens_are_left_alone():
  """Nothing else changes; with cells they would share a place."""
  joint, bias, gains, tables, lengths, cells, _ = _inputs(CASES["ragged"], jnp.float32)
  operands = (joint, bias, gains, tables, lengths)
  ahead = tuple(jnp.full((2, 3, 2, 64), i, jnp.float32) for i in range(3))
  alone = prepare(*operands, pooled=True)
  got = prepare(*operands, ahead=ahead, pooled=True)
  for i in range(3):
    assert (got[i][:, :3] == i).all()
    np.testing.assert_array_equal(got[i][:, 3:], alone[i])
  np.testing.assert_array_equal(got.q_pool, alone.q_pool)
  with pytest.raises(ValueError, match="give one"):
    prepare(*operands, cells, ahead=ahead)


def test_rotary_multiplies_complex_numbers():
  """Channels i and i + d / 2 as one number, times that of the angle's cosine and sine."""
  draw = np.random.default_rng(0)
  x, angles = draw.standard_normal((2, 5, 3, 8)), draw.uniform(0, 6, (5, 4))
  want = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
  tables = [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
  want = np.concatenate([want.real, want.imag], -1)
  assert worst_error(turn(jnp.asarray(x, jnp.float32), *tables), want) <= 1e-6


@pytest.mark.parametrize("implementation", DTYPES)
def test_prepare_kernel(case, implementation, capfd):
  """Against the definition in float32 from the same 16-bit inputs: one rounding apart.

  The first case watches for races of Hopper's.
  """
  dtype = DTYPES[implementation]
  joint, bias, gains, tables, lengths, cells, spectral = _inputs(case, dtype)
  coarse = cells.cells(case.angles(spectral.centres))
  operands = (bias, gains, tables, lengths, coarse, case.bands)
  wanted = functools.partial(prepare, pooled=True, filtered=case.filtered)
  definition = jax.jit(functools.partial(wanted, implementation="xla"))
  want = definition(joint.astype(jnp.float32), *operands)
  with _interpreted(implementation, detect_races=case == CASES["alike"]):
    assert PREPARE.choose(joint, lengths, coarse) == implementation
    got = jax.jit(wanted)(joint, *operands)
    alone = jax.jit(prepare)(joint, bias, gains, tables, lengths)
    jax.block_until_ready((got, alone))
  assert "RACE DETECTED" not in capfd.readouterr().out  # the detector prints and goes on
  _assert_right(case, got, want, alone, cells.front, spectral.n_coarse)
  assert alone.q_pool is None


# Coarse rows in place, and not; one sample with all heads in a thread block, and two.
CASES_OVER_HEADS = {
  "alike": dataclasses.replace(CASES["alike"], grid=(4, 4, 16), filtered="v"),
  "ragged": dataclasses.replace(CASES["ragged"], grid=(3, 6, 7), h=3),
  "ragged, big": dataclasses.replace(CASES["ragged, big"], d=128, h=2, filtered=""),
}


@pytest.mark.parametrize("case", CASES_OVER_HEADS.values(), ids=CASES_OVER_HEADS)
@pytest.mark.parametrize("implementation", DTYPES)
def test_prepare_kernel_over_all_heads(case, implementation, monkeypatch):
  """Against the definition in float32, with compression and without; gradients are its own.

  Heads differ in size, so that none is normed as it would be alone.
  """
  if case.b == 1:
    monkeypatch.setattr(launch, "STREAMING_BLOCKS", 1)
  dtype = DTYPES[implementation]
  joint, bias, _, tables, lengths, cells, spectral = _inputs(case, dtype)
  joint = joint * 2.0 ** jnp.arange(case.h, dtype=joint.dtype)[:, None]
  coarse = cells.cells(case.angles(spectral.centres))
  fixed = (tables, lengths, coarse, case.bands)
  trained = (joint, bias, _gains_of_heads(case))
  options = {"pooled": True, "filtered": case.filtered, "over_heads": True}
  draw = np.random.default_rng(2)
  valid = np.concatenate([np.ones(cells.front, bool), case.layout.arrays().valid])

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, joint, bias, gains, cotangents):
    def packed(*trained):
      found = prepare(*trained, *fixed, **options, implementation=implementation)
      return found[:3], found

    _, pull, found = jax.vjp(packed, joint, bias, gains, has_aux=True)
    return found, pull(cotangents)

  shape = (3, case.b, len(valid), case.h, case.d)
  cotangents = jnp.asarray(draw.standard_normal(shape) * valid[:, None, None], jnp.float32)
  cotangents = tuple(cotangents.astype(dtype))
  wide = joint.astype(jnp.float32)
  definition = jax.jit(functools.partial(prepare, **options, implementation="xla"))
  want = definition(wide, *trained[1:], *fixed)
  _, want_gradients = run("xla", *trained, cotangents)
  with _interpreted(implementation):
    assert PREPARE.choose(joint, lengths, coarse) == implementation
    got, gradients = run(implementation, *trained, cotangents)
    alone = jax.jit(functools.partial(prepare, over_heads=True))(*trained, tables, lengths)
    jax.block_until_ready((got, gradients, alone))
  _assert_right(case, got, want, alone, cells.front, spectral.n_coarse)
  for found, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
    limit = 4e-3 if found.dtype == dtype else 1e-5
    assert relative_error(found, right) <= limit


@pytest.mark.parametrize(
  ("implementation", "call"), [("hopper", "mosaic_gpu"), ("triton", "triton_kernel_call")]
)
def test_devices_that_share_heads_exchange_sums_of_squares(implementation, call):
  """Compiled for two absent GPUs: each norms its heads by what all of them sum to."""
  n = 1024
  h = 4
  d = 128
  spec = jax.ShapeDtypeStruct

  def run(joint, bias, gains, tables, lengths):
    options = dict(over_heads=True, implementation=implementation)
    return prepare(joint, bias, gains, tables, lengths, **options)

  found = offline.compile_for(
    run,
    spec((1, n, 3, h, d), jnp.bfloat16),
    spec((3, h, d), jnp.float32),
    (spec((h, d), jnp.float32),) * 2,
    (spec((n, d // 2), jnp.float32),) * 2,
    spec((n // 128,), jnp.int32),
    devices={"heads": 2},
    shardings=(P(None, None, None, "heads"), P(None, "heads"), P("heads"), P(), P()),
  )
  text = found.compiled.as_text()
  assert text.count(f'custom_call_target="{call}') == 1
  moved = collectives(text)
  # Of q and k in float32; an exchange that starts and ends apart counts operand and result.
  assert moved == {"all-reduce": (1, 2 * (2 * n * 4))}


def test_lift_kernel(case, capfd):
  """Against spectral.lift in float32; heads without coarse rows are scaled only."""
  *_, cells, spectral = _inputs(case)
  draw = np.random.default_rng(1)
  shape = (case.b, cells.front + case.layout.n_buffer, case.h, case.d)
  packed = jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)
  low = jnp.asarray(draw.random((case.b, case.h)) < 0.5).at[:, 0].set(True).at[:, -1].set(False)
  weights = jnp.asarray(draw.uniform(0.5, 2, low.shape), jnp.float32)
  wide = packed.astype(jnp.float32)
  coarse = jnp.where(low[:, None, :, None], wide[:, : spectral.n_coarse], 0)
  want = (wide[:, cells.front :] + spectral.lift(coarse)) * weights[:, None, :, None]
  assert worst_error(lift(wide, weights, low, cells.expansion), want) <= 1e-5
  with interpret.interpreted(detect_races=case == CASES["alike"]):
    got = jax.block_until_ready(jax.jit(lift)(packed, weights, low, cells.expansion))
  assert "RACE DETECTED" not in capfd.readouterr().out
  valid = case.layout.arrays().valid
  got, want = np.asarray(got[:, valid], np.float32), np.asarray(want[:, valid])
  assert _rightly_rounded(got, want)
  assert worst_error(got, want) <= 2e-2
  assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()


def _layer(case, method, dtype, over_heads):
  """Valid rows of the output and gradients, of a layer whose gains and biases are not trivial."""
  layout, width = case.layout, case.h * case.d
  dims = AttentionDims(width, case.h, 8, over_heads=over_heads)
  graphdef, params = nnx.split(SpectralAttention(dims, method, layout, nnx.Rngs(0), dtype=dtype))
  draw = np.random.default_rng(3)

  def shift(x):
    if x.ndim == 1 or x.shape == (case.h, case.d):
      return x + draw.uniform(0, 0.5, x.shape).astype(x.dtype)
    return x

  params = jax.tree.map(shift, params)
  shape = (2, case.b, layout.n_buffer, width)
  x, weigh = jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)
  arrays, tables = layout.arrays(), method.tables(layout)

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def loss(params, x):
    cond = Cond(jnp.full(case.b, 0.5), jnp.ones((case.b, 8)))
    out = nnx.merge(graphdef, params)(x, cond, arrays, tables, {})[0]
    out = jnp.where(arrays.valid[:, None], out, 0)
    return (out * weigh).astype(jnp.float32).sum(), out

  (_, out), grads = jax.jit(loss)(params, x.astype(dtype))
  return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((out, grads))]


METHODS = {
  "dense": Dense(),
  "freqformer": FreqFormer(
    basis=BASIS, allocation=(1, 1, 0), mid_tiles=2, low_shared=True, filter="qkv"
  ),
  "octaves": Octaves(levels=2, window=(1, 1, 1), basis="haar"),
}


@pytest.mark.parametrize("implementation", DTYPES)
@pytest.mark.parametrize(
  "method, over_heads",
  [(METHODS["freqformer"], False), (METHODS["octaves"], False), (METHODS["dense"], True)],
  ids=["freqformer", "octaves", "dense, over heads"],
)
def test_layer_with_and_without_kernels(method, over_heads, implementation, monkeypatch):
  """Output and every gradient err at most 1.5 times as much as XLA's 16-bit layer.

  XLA's attention runs in all.
  """
  case = dataclasses.replace(CASES["ragged"], grid=(5, 4, 7), b=1)

  def refuse(patch, op, names):
    for name in names:
      patch.setattr(op.module(name), "unsupported", lambda *_: "not asked for")

  refuse(monkeypatch, ATTENTION, DTYPES)
  module, calls = PREPARE.module(implementation), []
  forward = module.forward

  def counted(*operands, **settings):
    calls.append((operands, settings))
    return forward(*operands, **settings)

  monkeypatch.setattr(module, "forward", counted)
  with monkeypatch.context() as patch:
    refuse(patch, PREPARE, DTYPES)
    right, plain = (_layer(case, method, x, over_heads) for x in (jnp.float32, jnp.bfloat16))
  assert not calls
  refuse(monkeypatch, PREPARE, set(DTYPES) - {implementation})
  with _interpreted(implementation):
    found = _layer(case, method, jnp.bfloat16, over_heads)
  (((*_, cells, _, ahead, _), settings),) = calls
  assert settings["filtered"] == getattr(method, "filter", "").replace("none", "")
  assert settings["over_heads"] == over_heads
  assert (cells is None and ahead is None) == isinstance(method, Dense)
  for f, p, r in zip(found, plain, right, strict=True):
    assert np.linalg.norm(f - r) <= 1.5 * np.linalg.norm(p - r) + 1e-3 * np.linalg.norm(r)


def test_lift_reads_64_rows_from_a_multiple_of_8_on():
  case = dataclasses.replace(CASES["ragged"], tile=(4, 4, 4))
  *_, cells, _ = _inputs(case, basis=SpectralBasis("block_dct", (1,) * 3, (1,) * 3))
  packed = jnp.zeros((1, cells.front + 64 * 8, 1, 64), jnp.bfloat16)
  words = "hopper: a tile has 64 coarse tokens, it takes at most 57"
  assert _refusal(LIFT, packed, cells.expansion).endswith(words)
