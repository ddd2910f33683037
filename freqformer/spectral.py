"""Frequency bands of functions on the token grid: compression to a coarse grid, projections, band energies.

Each axis of length L has an orthonormal analysis matrix A [L, L]; row i has frequency i / L (block_dct: of
its own block's length). With k rows below the low cut and m rows below the mid cut of each axis,

  P_low = A[:k]^T A[:k],   P_box = A[:m]^T A[:m]   (Kronecker products over t, y, x),
  P_mid = P_box - P_low,   P_high = I - P_box:     orthogonal, they sum to I, and Parseval holds.

Compression: U = A[:k]^T A_k, A_k the orthonormal *forward* DCT of the k coarse samples (haar: the identity).
U^T x is thus the inverse coarse transform of the low coefficients, and a coarse token has a place: its cell's
centre. With s = U^T 1 (about sqrt(n / n_coarse); the cell stands for s^2 tokens), compress(x) = U^T x / s
preserves means and lift(y) = U (s * y), so lift(compress(x)) = P_low x. Mathematics: docs/design.md; the
transforms and the cuts are our choice.

Everything works on tile-ordered buffers [b, n_buffer, ...] (layout.py). Padding rows are never read (they may
hold NaN) and come out as zero.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.layout import LayoutTables, TileLayout, Triple, check_rows

Kind = Literal["block_dct", "dct", "haar"]
Array = jax.Array | np.ndarray
_KINDS = ("block_dct", "dct", "haar")
_pytree = jax.tree_util.register_dataclass
_frozen = dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value: compare by identity


def _static():
  return dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class SpectralBasis:
  """Which transform, and where its bands end. Static config.

  Attributes:
    kind: "block_dct": DCT-II inside each tile's extent, one small matmul per tile; "dct": DCT-II of whole
      axes; "haar": dyadic block means.
    low: cut of the low band per axis (t, y, x), a fraction of the axis's rows: 0 < low <= mid.
    mid: cut of the mid band per axis, mid <= 1. haar takes only powers of 1/2.

  Raises:
    ValueError: an unknown kind, or cuts that are out of range, out of order, or not dyadic for haar.
  """

  kind: Kind
  low: tuple[float, float, float]
  mid: tuple[float, float, float]

  def __post_init__(self):
    if self.kind not in _KINDS:
      raise ValueError(f"kind={self.kind!r} is unknown: choose one of {', '.join(_KINDS)}")
    for name in ("low", "mid"):
      cuts = tuple(float(v) for v in getattr(self, name))
      object.__setattr__(self, name, cuts)
      if len(cuts) != 3 or not all(0 < v <= 1 for v in cuts):
        raise ValueError(f"{name}={cuts} is not allowed: give three cuts (t, y, x), each above 0 and at most 1")
      if self.kind == "haar" and not all(math.log2(v).is_integer() for v in cuts):
        raise ValueError(f"{name}={cuts} is not allowed for haar: use powers of 1/2 (1, 0.5, 0.25, ...)")
    if any(l > m for l, m in zip(self.low, self.mid, strict=True)):
      raise ValueError(f"low={self.low} exceeds mid={self.mid} on some axis: raise mid or lower low there")

  def fit(self, layout: TileLayout, dtype=np.float32) -> SpectralTables:
    """The operators of this basis on a layout: NumPy, computed once per (basis, layout, dtype)."""
    return _fit(self, layout, np.dtype(dtype))


# --- Operators: how matrices meet a buffer ------------------------------------------------------------


@_pytree
@_frozen
class Matrices:
  """Of one axis, or of one class of tiles: e tokens, k coarse cells, m >= k rows inside the box.

  Attributes:
    compress: U^T / s, [k, e].
    lift: U s, [e, k].
    analyse: orthonormal rows of the box, [m, e]; the first k are the low band.
  """

  compress: Array
  lift: Array
  analyse: Array

  @property
  def synthesise(self) -> Array:
    """[e, m], with synthesise @ analyse = P_box."""
    return self.analyse.T


@_pytree
@_frozen
class TileOperators:
  """Transforms that stay inside a tile: one matmul per class of equally shaped tiles, tile order kept.

  Attributes:
    classes: one entry per tile shape: one where no tile is ragged, at most eight.
    order: int32 [n_coarse], place in class order of each coarse token in tile order; None for a single class.
    inverse: int32 [n_coarse], the inverse permutation; None for a single class.
    layout: static.
  """

  classes: tuple[Matrices, ...]
  order: Array | None
  inverse: Array | None
  layout: TileLayout = _static()

  def reduce(self, x: jax.Array, name: str) -> list[jax.Array]:
    """[b, n_buffer, ...] -> per class [b, *its tiles (t, y, x), rows of matrix `name`, ...]."""
    return [_matmul("kr,btyxr...->btyxk...", getattr(m, name), part) for m, part in self._split(x)]

  def expand(self, coefficients: list[jax.Array], name: str) -> jax.Array:
    """Per class [b, *its tiles, columns of matrix `name`, ...] -> [b, n_buffer, ...], padding rows zero."""
    parts = []
    for m, part in zip(self.classes, coefficients, strict=True):
      part = _matmul("rk,btyxk...->btyxr...", getattr(m, name), part)
      padding = self.layout.block - part.shape[4]
      parts.append(jnp.pad(part, [(0, padding if axis == 4 else 0) for axis in range(part.ndim)]))
    for axis in (3, 2, 1):  # classes are in raster order of (t, y, x) halves: join x first
      halves = len(_halves(self.layout.lengths[axis - 1]))
      parts = [jnp.concatenate(parts[i : i + halves], axis) for i in range(0, len(parts), halves)]
    return parts[0].reshape(parts[0].shape[0], self.layout.n_buffer, *parts[0].shape[5:])

  def flatten(self, coefficients: list[jax.Array]) -> jax.Array:
    """Per class [b, *its tiles, k, ...] -> [b, n_coarse, ...], tile by tile without gaps."""
    parts = [c.reshape(c.shape[0], math.prod(c.shape[1:5]), *c.shape[5:]) for c in coefficients]
    if self.order is None:
      return parts[0]
    return jnp.take(jnp.concatenate(parts, axis=1), self.order, axis=1, mode="clip", unique_indices=True)

  def unflatten(self, y: jax.Array) -> list[jax.Array]:
    """The inverse of `flatten`."""
    if self.inverse is not None:
      y = jnp.take(y, self.inverse, axis=1, mode="clip", unique_indices=True)
    parts, start = [], 0
    for m, tiles in zip(self.classes, _class_slices(self.layout), strict=True):
      shape = (*(s.stop - s.start for s in tiles), m.lift.shape[1])
      stop = start + math.prod(shape)
      parts.append(y[:, start:stop].reshape(y.shape[0], *shape, *y.shape[2:]))
      start = stop
    return parts

  def band_energy(self, x: jax.Array) -> jax.Array:
    """[b, n_buffer, h, d] -> [b, h, 3]."""
    energy = 0.0
    for (m, part), box in zip(self._split(x), self.reduce(x, "analyse"), strict=True):
      k, box, total = m.compress.shape[0], _squares(box), _squares(part).sum(axis=4)  # box: [b, *tiles, m, h]
      low, mid = box[..., :k, :].sum(axis=4), box[..., k:, :].sum(axis=4)
      # Subtracted per tile, where the sums are short and their rounding small; it may still fall below zero.
      high = jnp.maximum(total - low - mid, 0)
      energy += jnp.stack([low, mid, high], axis=-1).sum(axis=(1, 2, 3))
    return energy

  def _split(self, x):
    """(matrices, [b, *tiles, e, ...]) of each class. Valid rows come first: a slice leaves padding unread."""
    x = x.reshape(x.shape[0], *self.layout.tile_grid, self.layout.block, *x.shape[2:])
    for m, tiles in zip(self.classes, _class_slices(self.layout), strict=True):
      yield m, x[:, *tiles, : m.compress.shape[1]]


@_pytree
@_frozen
class GridOperators:
  """Transforms of whole axes: unpack to the grid, one matmul per axis, pack again.

  Attributes:
    axes: matrices of the t, y and x axis.
    tables: the permutation between buffer and grid.
  """

  axes: tuple[Matrices, ...]
  tables: LayoutTables

  def reduce(self, x: jax.Array, name: str) -> jax.Array:
    """[b, n_buffer, ...] -> [b, t, y, x, ...] with the rows of matrix `name` per axis."""
    x = self.tables.unpack(x)
    return self._per_axis(x.reshape(x.shape[0], *self.tables.layout.grid, *x.shape[2:]), name)

  def expand(self, coefficients: jax.Array, name: str) -> jax.Array:
    """[b, t, y, x, ...] with columns of matrix `name` per axis -> [b, n_buffer, ...], padding rows zero."""
    x = self._per_axis(coefficients, name)
    return self.tables.pack(x.reshape(x.shape[0], self.tables.layout.n, *x.shape[4:]))

  def flatten(self, coefficients: jax.Array) -> jax.Array:
    """[b, kt, ky, kx, ...] -> [b, n_coarse, ...]."""
    return coefficients.reshape(coefficients.shape[0], math.prod(coefficients.shape[1:4]), *coefficients.shape[4:])

  def unflatten(self, y: jax.Array) -> jax.Array:
    """The inverse of `flatten`."""
    return y.reshape(y.shape[0], *(m.lift.shape[1] for m in self.axes), *y.shape[2:])

  def band_energy(self, x: jax.Array) -> jax.Array:
    """[b, n_buffer, h, d] -> [b, h, 3]."""
    total = _squares(self.tables.unpack(x)).sum(axis=1)
    box = _squares(self.reduce(x, "analyse"))  # [b, mt, my, mx, h]
    t, y, x = (m.compress.shape[0] for m in self.axes)
    # Mid is the box around the low corner, as three disjoint slabs: no difference of two nearly equal sums.
    slabs = (box[:, :t, :y, :x], box[:, t:], box[:, :t, y:], box[:, :t, :y, x:])
    low, *mid = (s.sum(axis=(1, 2, 3)) for s in slabs)
    return jnp.stack([low, sum(mid), jnp.maximum(total - low - sum(mid), 0)], axis=-1)

  def _per_axis(self, x, name):
    for i, m in enumerate(self.axes):
      source, target = "btyx", "btyx".replace("tyx"[i], "k")
      x = _matmul(f"k{'tyx'[i]},{source}...->{target}...", getattr(m, name), x)
    return x


# --- The tables ---------------------------------------------------------------------------------------


@_pytree
@_frozen
class SpectralTables:
  """A basis fitted to a layout. NumPy until passed to jit (as an argument, never closed over).

  Computes in float32 (float64 for float64 inputs) and returns the input's dtype. Differentiable.

  Attributes:
    operators: the matrices and how to apply them.
    cell_weight: s, [n_coarse]; the cell stands for s^2 tokens.
    centres: float32 [n_coarse, 3], position (t, y, x) of each coarse token.
    layout: static.
    basis: static.
    coarse_grid: static, coarse samples per axis. Coarse tokens are in its raster order for dct and haar, tile
      by tile (raster order inside a tile, no gaps) for block_dct.
  """

  operators: TileOperators | GridOperators
  cell_weight: Array
  centres: Array
  layout: TileLayout = _static()
  basis: SpectralBasis = _static()
  coarse_grid: Triple = _static()

  @property
  def n_coarse(self) -> int:
    """Coarse tokens."""
    return math.prod(self.coarse_grid)

  @property
  def ratio(self) -> float:
    """Tokens per coarse token."""
    return self.layout.n / self.n_coarse

  def compress(self, x: jax.Array) -> jax.Array:
    """U^T x / s: [b, n_buffer, ...] -> [b, n_coarse, ...]; a constant stays that constant."""
    self._check_buffer("compress", x)
    return self.operators.flatten(self.operators.reduce(x, "compress")).astype(x.dtype)

  def lift(self, y: jax.Array) -> jax.Array:
    """U (s * y): [b, n_coarse, ...] -> [b, n_buffer, ...]; lift(compress(x)) = P_low x."""
    check_rows("lift", y, self.n_coarse, f"the coarse tokens of coarse_grid={self.coarse_grid}")
    _check_floating("lift", y)
    return self.operators.expand(self.operators.unflatten(y), "lift").astype(y.dtype)

  def project_low(self, x: jax.Array) -> jax.Array:
    """P_low x: [b, n_buffer, ...] -> the same."""
    self._check_buffer("project_low", x)
    return self.operators.expand(self.operators.reduce(x, "compress"), "lift").astype(x.dtype)

  def project_box(self, x: jax.Array) -> jax.Array:
    """P_box x = (P_low + P_mid) x: [b, n_buffer, ...] -> the same."""
    self._check_buffer("project_box", x)
    return self.operators.expand(self.operators.reduce(x, "analyse"), "synthesise").astype(x.dtype)

  def band_energy(self, x: jax.Array) -> jax.Array:
    """Squared norms of P_low x, P_mid x and P_high x over tokens and channels, by Parseval.

    High is |x|^2 less the other two, clipped at zero: its rounding error is relative to |x|^2.

    Args:
      x: [b, n_buffer, h, d].

    Returns:
      float32 (float64 for float64 x) [b, h, 3], none negative, summing to |x|^2 of each head.
    """
    self._check_buffer("band_energy", x)
    if x.ndim != 4:
      raise ValueError(f"band_energy got shape {x.shape}, but takes [b, n_buffer, h, d]: split the heads first")
    return self.operators.band_energy(x)

  def _check_buffer(self, name, x):
    check_rows(name, x, self.layout.n_buffer, f"the buffer rows of {self.layout}")
    _check_floating(name, x)


def _check_floating(name, x):
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name} got dtype {x.dtype}, but takes real floating point: cast the input first")


def _matmul(subscripts, matrix, x):
  """Einsum in at least float32. HIGHEST: TF32 would leave 1e-3 of a constant in the high band."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(subscripts, matrix.astype(dtype), x.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _squares(x):
  """Squared norm over the last axis, in at least float32."""
  return jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(axis=-1)


def _halves(lengths):
  """Ranges of equally long tiles along an axis: all of them; or all but the last, and the ragged last."""
  full = lengths.count(lengths[0])
  return [slice(0, full), slice(full, len(lengths))][: 1 + (full < len(lengths))]


def _class_slices(layout):
  """Per class of equally shaped tiles its slices (t, y, x) of the tile grid."""
  return list(itertools.product(*map(_halves, layout.lengths)))


# --- Fitting: NumPy in float64 ------------------------------------------------------------------------


@_frozen
class _Block:
  """e tokens along an axis: analyse [m, e] by rising frequency, up = U [e, k], centres [k] from the start."""

  analyse: np.ndarray
  up: np.ndarray
  centres: np.ndarray


@functools.lru_cache(maxsize=8)
def _fit(basis: SpectralBasis, layout: TileLayout, dtype: np.dtype) -> SpectralTables:
  tiled = basis.kind == "block_dct"
  lengths = layout.lengths if tiled else tuple((l,) for l in layout.grid)
  cuts = zip(lengths, basis.low, basis.mid, strict=True)
  axes = [[_block(basis.kind, e, low, mid) for e in v] for v, low, mid in cuts]
  weight, centres, tile, ragged = zip(*map(_coarse_samples, axes), strict=True)
  by_tile, order, inverse = _coarse_order(tile, ragged)
  if tiled:
    shapes = [[blocks[half.start] for half in _halves(v)] for blocks, v in zip(axes, lengths, strict=True)]
    classes = tuple(_kron(blocks, dtype) for blocks in itertools.product(*shapes))
    permutations = (order, inverse) if len(classes) > 1 else (None, None)
    operators = TileOperators(classes, *permutations, layout)
  else:
    operators = GridOperators(tuple(_kron(blocks, dtype) for blocks in axes), layout.arrays())
  positions = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 3)
  tables = SpectralTables(
    operators=operators,
    cell_weight=math.prod(np.ix_(*weight)).reshape(-1)[by_tile].astype(dtype),
    centres=positions[by_tile].astype(np.float32),
    layout=layout,
    basis=basis,
    coarse_grid=tuple(map(len, weight)),
  )
  for leaf in jax.tree.leaves(tables):
    leaf.setflags(write=False)  # shared by every caller through the cache
  return tables


def _kron(blocks, dtype) -> Matrices:
  """Matrices of the box that is the product of one block per axis given; low rows of `analyse` first."""
  analyse = functools.reduce(np.kron, [b.analyse for b in blocks])
  low = functools.reduce(np.kron, [np.arange(len(b.analyse)) < b.up.shape[1] for b in blocks])
  up = functools.reduce(np.kron, [b.up for b in blocks])
  s = up.sum(axis=0)
  matrices = (up / s).T, up * s, np.concatenate([analyse[low], analyse[~low]])
  return Matrices(*(np.ascontiguousarray(m, dtype) for m in matrices))


def _coarse_samples(blocks):
  """Of each coarse sample along an axis: s, centre, its block's number, whether that block is ragged."""
  counts = [len(b.centres) for b in blocks]
  lengths = [len(b.up) for b in blocks]
  start = np.repeat(np.cumsum([0, *lengths[:-1]]), counts)
  weight = np.concatenate([b.up.sum(axis=0) for b in blocks])
  ragged = np.repeat(np.less(lengths, lengths[0]).astype(int), counts)
  return (
    weight,
    start + np.concatenate([b.centres for b in blocks]),
    np.repeat(range(len(blocks)), counts),
    ragged,
  )


def _coarse_order(tile, ragged):
  """Orders of the coarse tokens, each [n_coarse], from the block number and raggedness per axis.

  Returns:
    by_tile: raster index on the coarse grid of each coarse token, tile by tile.
    order: int32, place of each of these when tiles are sorted by class first.
    inverse: int32, the inverse of `order`.
  """
  tiles_y, tiles_x = tile[1][-1] + 1, tile[2][-1] + 1
  (t, y, x), (half_t, half_y, half_x) = np.ix_(*tile), np.ix_(*ragged)
  by_tile = np.argsort(((t * tiles_y + y) * tiles_x + x).reshape(-1), kind="stable")
  inverse = np.argsort(((half_t * 2 + half_y) * 2 + half_x).reshape(-1)[by_tile], kind="stable")
  return by_tile, np.argsort(inverse).astype(np.int32), inverse.astype(np.int32)


@functools.lru_cache(maxsize=256)
def _block(kind: Kind, length: int, low: float, mid: float) -> _Block:
  k, m = _rows_below(length, low), _rows_below(length, mid)
  if kind == "haar":
    rows = _haar(length, levels=round(-math.log2(low)))[:m]
    return _Block(rows, rows[:k].T, np.square(rows[:k]) @ np.arange(length))
  rows = _dct(length)[:m]
  return _Block(rows, rows[:k].T @ _dct(k), (np.arange(k) + 0.5) * length / k - 0.5)


def _rows_below(length: int, cut: float) -> int:
  """Rows i with i / length < cut, forgiving the rounding of length * cut (25 * 0.28 = 7.000000000000001)."""
  return max(1, math.ceil(length * cut - 1e-9))


def _dct(length: int) -> np.ndarray:
  """Orthonormal DCT-II, [length, length], rows by rising frequency."""
  i, j = np.ogrid[:length, :length]
  rows = np.sqrt(2 / length) * np.cos(np.pi * i * (2 * j + 1) / (2 * length))
  rows[0] = np.sqrt(1 / length)
  return rows


def _haar(length: int, levels: int) -> np.ndarray:
  """Haar transform of `levels` levels, [length, length]: scaling rows, then details from coarse to fine.

  An odd left-over sample passes on to the next level unpaired, so a pair may have supports of unequal size.
  Its weights sqrt(size) (unbalanced Haar transform, Fryzlewicz 2007) keep scaling rows constant on their
  support; the plain 1/sqrt(2) would put part of a constant into the details.
  """
  scaling, size, details = np.eye(length), np.ones(length), []
  for _ in range(levels):
    paired = len(size) // 2 * 2
    a, b = np.sqrt(size[:paired:2, None]), np.sqrt(size[1:paired:2, None])
    first, second, norm = scaling[:paired:2], scaling[1:paired:2], np.hypot(a, b)
    details.insert(0, (b * first - a * second) / norm)
    scaling = np.concatenate([(a * first + b * second) / norm, scaling[paired:]])
    size = np.concatenate([size[:paired:2] + size[1:paired:2], size[paired:]])
  return np.concatenate([scaling, *details])
