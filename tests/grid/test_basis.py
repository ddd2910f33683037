"""Bands and compression against dense float64 operators from SciPy's DCT and block means.

Operators under test are read off by applying them to the identity, with NaN in every padding row.
"""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg

from freqformer.grid.basis import KINDS, SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import coarse_tokens
from freqformer.grid.transforms import rows_below

LAYOUTS = [
  TileLayout((1, 1, 1), (2, 4, 4), 32),
  TileLayout((3, 5, 7), (2, 4, 4), 32),  # ragged on every axis: all eight classes of tiles
  TileLayout((5, 6, 9), (2, 4, 4), 64),  # ... and padding in full tiles
  TileLayout((2, 11, 5), (2, 6, 5), 64),  # a prime axis, one ragged axis
  TileLayout((4, 8, 8), (2, 4, 4), 32),  # no padding at all
]
BASES = [
  SpectralBasis("block_dct", (0.5, 0.5, 0.3), (0.7, 0.5, 1.0)),
  SpectralBasis("dct", (0.5, 0.4, 0.3), (0.7, 0.6, 1.0)),
  SpectralBasis("haar", (0.5, 0.25, 0.5), (1.0, 0.5, 0.5)),
]
CASES = [pytest.param(b, l, id=f"{b.kind}-{l.grid}") for b, l in itertools.product(BASES, LAYOUTS)]
cases = pytest.mark.parametrize("basis, layout", CASES)
kinds = pytest.mark.parametrize("basis", BASES, ids=lambda b: b.kind)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11)


# ---- the oracle, in raster order -------------------------------------------------------


def _below(length, cut):
  return [i for i in range(length) if Fraction(i, length) < Fraction(str(cut))]


def _axis_blocks(basis, layout, axis):
  """Per block of an axis: (P_low, P_box, compress, centres)."""
  length = layout.grid[axis]
  low = basis.low[axis]
  mid = basis.mid[axis]
  step = layout.tile[axis] if basis.kind == "block_dct" else length
  for start in range(0, length, step):
    e = min(step, length - start)
    if basis.kind == "haar":

      def cells(cut, e=e):
        return np.arange(e)[None] * cut // 1 == np.arange(np.ceil(e * cut))[:, None]

      def means(cut, cells=cells):
        return cells(cut) / cells(cut).sum(1, keepdims=True)

      low_cells, mid_cells = cells(low).T @ means(low), cells(mid).T @ means(mid)
      yield low_cells, mid_cells, means(low), start + means(low) @ np.arange(e)
    else:
      dct = scipy.fft.dct(np.eye(e), norm="ortho", axis=0)
      rows, box = dct[_below(e, low)], dct[_below(e, mid)]
      compress = scipy.fft.idct(rows, norm="ortho", axis=0)
      k = len(rows)
      centres = start + (np.arange(k) + 0.5) * e / k - 0.5
      yield rows.T @ rows, box.T @ box, compress / compress.sum(1, keepdims=True), centres


@functools.cache
def _oracle(basis, layout):
  """(P_low, P_box `[n, n]`, compress `[n_coarse, n]`, centres `[n_coarse, 3]`), in token order."""
  axes = [list(_axis_blocks(basis, layout, axis)) for axis in range(3)]
  low, box, compress = (
    functools.reduce(
      np.kron, [scipy.linalg.block_diag(*(block[i] for block in blocks)) for blocks in axes]
    )
    for i in range(3)
  )
  centres = [[(c, tile) for tile, block in enumerate(blocks) for c in block[3]] for blocks in axes]
  cells = list(itertools.product(*centres))
  # The sort is stable: raster order inside a tile.
  order = sorted(range(len(cells)), key=lambda i: [tile for _, tile in cells[i]])
  return low, box, compress[order], np.array([[c for c, _ in cells[i]] for i in order])


# ---- the operators under test, in raster order -----------------------------------------


def _values(layout):
  """Values of two samples and heads, in raster order."""
  return np.random.default_rng(0).standard_normal((2, layout.n, 2, 3))


@functools.cache
def _results(basis, layout):
  """The code under test as such matrices, its lift `[n, n_coarse]`, and the band energies of
  `_values`; padding rows held NaN."""
  index = layout.arrays()
  tables = basis.fit(layout, np.float64)

  def buffer(x):
    """Tile order with NaN in padding rows."""
    return np.where(index.valid.reshape(-1, *(1 for _ in x.shape[2:])), x[:, index.gather], np.nan)

  @jax.jit
  def apply(tables, x, y, values):
    results = tables.project_low(x), tables.project_box(x), tables.compress(x), tables.lift(y)
    return [x[0] for x in results], tables.band_energy(values)

  eyes = buffer(np.eye(layout.n)[None]), np.eye(tables.n_coarse)[None]
  with jax.enable_x64(True):
    matrices, energy = apply(tables, *eyes, buffer(_values(layout)))
  low, box, compress, lift, energy = map(np.asarray, (*matrices, energy))
  for result in (low, box, lift):
    assert result.dtype == energy.dtype == np.float64
    np.testing.assert_array_equal(result[~index.valid], 0)
  return low[index.scatter], box[index.scatter], compress, lift[index.scatter], energy


def _dense(basis, layout):
  return _results(basis, layout)[:4]


@cases
def test_operators_equal_the_oracle(basis, layout):
  low, box, compress, lift = _dense(basis, layout)
  expected_low, expected_box, expected_compress, _ = _oracle(basis, layout)
  close(low, expected_low)
  close(box, expected_box)
  close(compress, expected_compress)
  close(lift @ compress, expected_low)


@cases
def test_cells_have_a_weight_and_a_place(basis, layout):
  tables = basis.fit(layout)
  _, _, compress, lift = _dense(basis, layout)
  centres = _oracle(basis, layout)[3]
  np.testing.assert_allclose(tables.centres, centres, atol=1e-6)
  # lift = U s and compress = U^T / s, so their ratio is s^2; the squares sum to n because U s = 1.
  np.testing.assert_allclose(compress * tables.cell_weight[:, None] ** 2, lift.T, atol=1e-6)
  np.testing.assert_allclose(np.square(tables.cell_weight).sum(), layout.n, rtol=1e-6)
  assert tables.cell_weight.shape == (tables.n_coarse,)
  assert tables.centres.shape == (tables.n_coarse, 3)
  assert tables.n_coarse == np.prod(tables.coarse_grid) == len(centres)


@cases
def test_band_energy_is_the_squared_norm_of_each_band(basis, layout):
  x = _values(layout)
  low, box, _, _ = _oracle(basis, layout)
  bands = np.stack([low, box - low, np.eye(layout.n) - box])
  expected = np.square(np.einsum("fnm,bmhd->fbnhd", bands, x)).sum(axis=(2, 4)).transpose(1, 2, 0)
  close(_results(basis, layout)[4], expected, atol=1e-9)


@kinds
def test_band_energy_of_a_constant_is_low_and_never_negative(basis):
  layout = LAYOUTS[2]
  x = np.full((1, layout.n_buffer, 1, 64), 3.0, np.float32)
  energy = np.asarray(jax.jit(lambda tables, x: tables.band_energy(x))(basis.fit(layout), x))[0, 0]
  total = layout.n * 64 * 9
  assert energy.min() >= 0
  np.testing.assert_allclose(energy, [total, 0, 0], atol=1e-5 * total)


@pytest.mark.parametrize("kind", KINDS)
def test_a_band_without_coefficients_has_no_energy(kind):
  """Its difference from the others would be rounding."""
  layout = LAYOUTS[2]
  tables = SpectralBasis(kind, low=(0.5,) * 3, mid=(1.0,) * 3).fit(layout)
  energy = np.asarray(tables.band_energy(layout.arrays().pack(_values(layout).astype(np.float32))))
  assert (energy[..., 2] == 0).all() and (energy[..., :2] > 0).all()


@kinds
def test_padding_rows_change_nothing(basis):
  layout = LAYOUTS[2]
  tables, valid = basis.fit(layout), layout.arrays().valid
  x = np.random.default_rng(2).standard_normal((1, layout.n_buffer, 2, 2)).astype(np.float32)
  dirty = np.where(valid[:, None, None], x, np.float32(np.nan))

  @jax.jit
  def results(tables, x):
    functions = tables.compress, tables.project_low, tables.project_box, tables.band_energy
    grad = jax.grad(lambda x: sum(jnp.sum(jnp.sin(f(x))) for f in functions))(x)
    return [f(x) for f in functions], grad

  clean, soiled = (jax.tree.leaves(results(tables, y)) for y in (x, dirty))
  for a, b in zip(clean, soiled, strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.all(np.isfinite(b)) and not np.any(b[:, ~valid]) and np.any(b[:, valid])


@kinds
def test_low_precision_only_rounds_the_result(basis):
  """Computed in float32: against float64 on that input, the error is the output's rounding."""
  dtype = jnp.bfloat16
  layout = LAYOUTS[2]
  tables, index = basis.fit(layout), layout.arrays()
  x = jnp.asarray(np.random.default_rng(3).standard_normal((1, layout.n_buffer, 3)), dtype)
  y = jnp.asarray(np.random.default_rng(4).standard_normal((1, tables.n_coarse, 3)), dtype)
  low, box, compress, lift = _dense(basis, layout)
  exact, coarse = (np.asarray(v[0], np.float64) for v in (x[:, index.scatter], y))

  @jax.jit
  def results(tables, x, y):
    return tables.compress(x), tables.lift(y), tables.project_low(x), tables.project_box(x)

  compressed, *buffers = (v[0] for v in results(tables, x, y))
  results = (compressed, *(v[index.scatter] for v in buffers))
  wanted = (compress @ exact, lift @ coarse, low @ exact, box @ exact)
  for result, expected in zip(results, wanted, strict=True):
    assert result.dtype == dtype
    error = np.abs(np.asarray(result, np.float64) - expected)
    rounding = 0.51 * float(jnp.finfo(dtype).eps) * np.abs(expected)
    np.testing.assert_array_less(error, rounding + 2e-6)
  assert jax.eval_shape(tables.band_energy, x[..., None]).dtype == jnp.float32


@kinds
def test_tables_are_float32_and_int32_also_with_x64(basis):
  tables = basis.fit(LAYOUTS[1])
  with jax.enable_x64(True):
    seen = {leaf.dtype.name for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, tables))}
    out = jax.eval_shape(lambda x: tables.compress(x), jnp.ones((1, LAYOUTS[1].n_buffer), "f4"))
  assert seen <= {"float32", "int32", "bool"} and "float32" in seen
  assert out.dtype == jnp.float32
  assert basis.fit(LAYOUTS[1]) is tables, "fitted once per basis and layout"


def _operations(layout, basis=BASES[0]):
  x = jax.ShapeDtypeStruct((1, layout.n_buffer, 4), jnp.float32)
  program = str(jax.make_jaxpr(lambda tables, x: tables.compress(x))(basis.fit(layout), x))
  return program.count("dot_general["), program.count("gather[")


def test_block_dct_is_one_matmul_per_class_of_tiles():
  assert _operations(LAYOUTS[4]) == (1, 0)  # nothing ragged: no gather
  assert _operations(LAYOUTS[3]) == (2, 1)
  assert _operations(LAYOUTS[1]) == (8, 1)


def test_block_dct_tables_stay_small_at_a_million_tokens():
  basis = SpectralBasis("block_dct", (0.5, 0.25, 0.25), (1.0, 0.5, 0.5))
  tables = basis.fit(TileLayout.fit((63, 127, 127), 128))
  matrices = sum(leaf.nbytes for leaf in jax.tree.leaves(tables.operators.classes))
  assert matrices < 2**20 and len(tables.operators.classes) <= 8


def test_rows_below_a_cut_survive_rounding():
  """25 * 0.28 is 7.000000000000001 in floating point; exact fractions decide."""
  cuts = (0.1, 0.28, 0.3, 0.56, 0.7, 1.0, 0.125, 0.35)
  for length, cut in itertools.product(range(1, 41), cuts):
    assert rows_below(length, cut) == len(_below(length, cut))


def test_haar_rows_are_orthonormal_and_nested_on_odd_lengths():
  """Both cuts slice one matrix: with mid at 1 it is whole, every coarser mid is its first rows."""

  def rows(layout, mid):
    basis = SpectralBasis("haar", (0.125, 1, 1), (mid, 1, 1))
    return basis.fit(layout, np.float64).operators.axes[0].analyse

  for length in range(1, 20):
    layout = TileLayout((length, 1, 1), (4, 1, 1), 4)
    whole = rows(layout, 1)
    close(whole @ whole.T, np.eye(length))
    for mid in (0.5, 0.25, 0.125):
      np.testing.assert_array_equal(rows(layout, mid), whole[: int(np.ceil(length * mid))])


@pytest.mark.parametrize(
  "kind, low, mid, message",
  [
    ("fft", (1, 1, 1), (1, 1, 1), "kind='fft'.*block_dct, dct, haar"),
    ("dct", (0, 1, 1), (1, 1, 1), "low=.*above 0 and at most 1"),
    ("dct", (1, 1, 1), (1, 1.5, 1), "mid=.*above 0 and at most 1"),
    ("dct", (0.5, 0.5), (1, 1, 1), "three cuts"),
    ("dct", (0.5, 0.5, 0.5), (1, 0.25, 1), "exceeds mid"),
    ("haar", (0.3, 0.5, 0.5), (1, 1, 1), "powers of 1/2"),
  ],
)
def test_a_wrong_basis_is_refused(kind, low, mid, message):
  with pytest.raises(ValueError, match=message):
    SpectralBasis(kind, low, mid)


@pytest.mark.parametrize(
  "name, shape, dtype, error, message",
  [
    ("compress", (1, 7), np.float32, ValueError, r"compress got shape \(1, 7\).*256"),
    ("lift", (1, 7), np.float32, ValueError, "lift got shape.*coarse_grid"),
    ("project_low", (1, 256), np.int32, TypeError, "int32.*floating"),
    ("band_energy", (1, 256, 4), np.float32, ValueError, r"\[b, n_buffer, h, d\]"),
  ],
)
def test_a_wrong_array_is_refused(name, shape, dtype, error, message):
  with pytest.raises(error, match=message):
    getattr(BASES[0].fit(LAYOUTS[4]), name)(np.zeros(shape, dtype))


def test_a_cut_that_floats_cannot_hold_is_rounded_alike_everywhere():
  """0.28 * 25 is 7.000000000000001 in floats."""
  basis = SpectralBasis("dct", (0.28, 1, 1), (1, 1, 1))
  layout = TileLayout((25, 1, 1), (4, 1, 1), 4)
  assert basis.fit(layout).n_coarse == coarse_tokens(basis, layout) == 7
