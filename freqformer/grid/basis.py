"""Frequency bands of functions on the token grid: compression, projections and band energies.

Each axis has an orthonormal analysis matrix A; row i has frequency i / length. With k rows below
the low cut and m below the mid cut, P_low = A[:k]^T A[:k], P_mid = A[:m]^T A[:m] - P_low, P_high =
I - both (Kronecker over t, y, x). U = A[:k]^T A_k, A_k the forward DCT of k samples (haar: I); with
s = U^T 1, compress(x) = U^T x / s preserves means, lift(y) = U (s * y), lift(compress(x)) = P_low x
(docs/design.md). Padding rows are never read (they may hold NaN) and come out as zero.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np

from freqformer.grid.layout import TileLayout, Triple, check_rows
from freqformer.grid.operators import (
  Array,
  GridOperators,
  Matrices,
  TileOperators,
  check_floating,
  halves,
)
from freqformer.grid.transforms import Kind, block

# choice: the transforms and the form of their cuts; arXiv 2604.22808 names neither.
KINDS = ("block_haar", "block_dct", "dct", "haar")
# Tokens along an axis that is transformed whole: its square matrix is 0.5 GB in float64.
_LONGEST_AXIS = 8_192


@dataclasses.dataclass(frozen=True)
class SpectralBasis:
  """A transform and the ends of its bands. Static config.

  Attributes:
    kind: "dct": DCT-II of whole axes; "haar": dyadic block means; "block_dct", "block_haar": the
      same inside each tile, one small matmul per tile.
    low, mid: cuts of the bands per axis (t, y, x), fractions of its rows: 0 < low <= mid <= 1.
      Means take only powers of 1/2.

  Raises:
    ValueError: an unknown kind, or cuts out of range, out of order, or not dyadic for haar.
  """

  kind: Kind
  low: tuple[float, float, float]
  mid: tuple[float, float, float]

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"kind={self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
    for name in ("low", "mid"):
      cuts = tuple(float(v) for v in getattr(self, name))
      object.__setattr__(self, name, cuts)
      if len(cuts) != 3 or not all(0 < v <= 1 for v in cuts):
        raise ValueError(
          f"{name}={cuts} is not allowed: give three cuts (t, y, x), each above 0 and at most 1"
        )
      if "haar" in self.kind and not all(math.log2(v).is_integer() for v in cuts):
        raise ValueError(
          f"{name}={cuts} is not allowed for {self.kind}: use powers of 1/2 (1, 0.5, 0.25, ...)"
        )
    if any(l > m for l, m in zip(self.low, self.mid, strict=True)):
      raise ValueError(
        f"low={self.low} exceeds mid={self.mid} on some axis: raise mid or lower low there"
      )

  @property
  def tiled(self) -> bool:
    """True if the transform stays inside a tile."""
    return self.kind.startswith("block_")

  def fit(self, layout: TileLayout, dtype=np.float32) -> SpectralTables:
    """Returns this basis's operators on a layout, in NumPy, computed once per set of arguments."""
    return _fit(self, layout, np.dtype(dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value
class SpectralTables:
  """A basis fitted to a layout. NumPy until passed to jit (as an argument, never closed over).

  Computes in float32 (float64 for float64 inputs) and returns the input's dtype. Differentiable.

  Attributes:
    operators: the matrices and how to apply them.
    cell_weight: s, `[n_coarse]`; the cell stands for s^2 tokens.
    centres: float32 `[n_coarse, 3]`, position (t, y, x) of each coarse token.
    layout: what the basis was fitted to; static.
    coarse_grid: coarse samples per axis; static. Coarse tokens are in its raster order for dct and
      haar, tile by tile (raster order inside a tile, no gaps) for block_dct and block_haar.
  """

  operators: TileOperators | GridOperators
  cell_weight: Array
  centres: Array
  layout: TileLayout = dataclasses.field(metadata={"static": True})
  coarse_grid: Triple = dataclasses.field(metadata={"static": True})

  @property
  def n_coarse(self) -> int:
    """Coarse tokens."""
    return math.prod(self.coarse_grid)

  @jax.named_scope("compress")
  def compress(self, x: jax.Array) -> jax.Array:
    """U^T x / s: `[b, n_buffer, ...]` -> `[b, n_coarse, ...]`; a constant stays that constant."""
    self._check_buffer("compress", x)
    return self.operators.flatten(self.operators.reduce(x, "compress")).astype(x.dtype)

  @jax.named_scope("lift")
  def lift(self, y: jax.Array) -> jax.Array:
    """U (s * y): `[b, n_coarse, ...]` -> `[b, n_buffer, ...]`; lift(compress(x)) = P_low x."""
    check_rows("lift", y, self.n_coarse, f"the coarse tokens of coarse_grid={self.coarse_grid}")
    check_floating("lift", y)
    return self.operators.expand(self.operators.unflatten(y), "lift").astype(y.dtype)

  @jax.named_scope("filter")
  def project_low(self, x: jax.Array) -> jax.Array:
    """P_low x of `[b, n_buffer, ...]`."""
    self._check_buffer("project_low", x)
    return self.operators.expand(self.operators.reduce(x, "compress"), "lift").astype(x.dtype)

  @jax.named_scope("filter")
  def project_box(self, x: jax.Array) -> jax.Array:
    """P_box x = (P_low + P_mid) x of `[b, n_buffer, ...]`."""
    self._check_buffer("project_box", x)
    return self.operators.expand(self.operators.reduce(x, "analyse"), "synthesise").astype(x.dtype)

  def band_energy(self, x: jax.Array) -> jax.Array:
    """Returns |P_low x|^2, |P_mid x|^2 and |P_high x|^2 by Parseval, float32 (float64) `[b, h, 3]`.

    None is negative; they sum to |x|^2 of each head of `[b, n_buffer, h, d]`. High is |x|^2 less
    the other two, clipped at zero: its rounding error is relative to |x|^2.
    """
    self._check_buffer("band_energy", x)
    if x.ndim != 4:
      raise ValueError(
        f"band_energy got shape {x.shape}, but takes [b, n_buffer, h, d]: split the heads first"
      )
    return self.operators.band_energy(x)

  def _check_buffer(self, name, x):
    check_rows(name, x, self.layout.n_buffer, f"the buffer rows of {self.layout}")
    check_floating(name, x)


@functools.lru_cache(maxsize=8)
def _fit(basis: SpectralBasis, layout: TileLayout, dtype: np.dtype) -> SpectralTables:
  tiled = basis.tiled
  kind = basis.kind.removeprefix("block_")
  if not tiled and max(layout.grid) > _LONGEST_AXIS:
    raise ValueError(
      f"{kind} takes matrices as long as the axes of {layout.grid}: choose block_{kind} above "
      f"{_LONGEST_AXIS}"
    )
  lengths = layout.lengths if tiled else tuple((l,) for l in layout.grid)
  cuts = zip(lengths, basis.low, basis.mid, strict=True)
  axes = [[block(kind, e, low, mid) for e in v] for v, low, mid in cuts]
  weight, centres, tile, ragged = zip(*map(_coarse_samples, axes), strict=True)
  by_tile, order, inverse = _coarse_order(tile, ragged)
  if tiled:
    shapes = [
      [blocks[half.start] for half in halves(v)] for blocks, v in zip(axes, lengths, strict=True)
    ]
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
    coarse_grid=tuple(map(len, weight)),
  )
  for leaf in jax.tree.leaves(tables):
    leaf.setflags(write=False)  # shared by every caller through the cache
  return tables


def _kron(blocks, dtype) -> Matrices:
  """Matrices of the product of one block per axis; the low rows of `analyse` come first."""
  analyse = functools.reduce(np.kron, [b.analyse for b in blocks])
  low = functools.reduce(np.kron, [np.arange(len(b.analyse)) < b.up.shape[1] for b in blocks])
  up = functools.reduce(np.kron, [b.up for b in blocks])
  s = up.sum(axis=0)
  matrices = (up / s).T, up * s, np.concatenate([analyse[low], analyse[~low]])
  return Matrices(*(np.ascontiguousarray(m, dtype) for m in matrices))


def _coarse_samples(blocks):
  """Returns s, centre, block and the block's raggedness of an axis's coarse samples."""
  counts = [len(b.centres) for b in blocks]
  lengths = [len(b.up) for b in blocks]
  start = np.repeat(np.cumsum([0, *lengths[:-1]]), counts)
  weight = np.concatenate([b.up.sum(axis=0) for b in blocks])
  ragged = np.repeat(np.less(lengths, lengths[0]).astype(int), counts)
  centres = start + np.concatenate([b.centres for b in blocks])
  return weight, centres, np.repeat(range(len(blocks)), counts), ragged


def _coarse_order(tile, ragged):
  """Orders coarse tokens: raster index by tile; int32 places in order of class, and inverse."""
  tiles_y = tile[1][-1] + 1
  tiles_x = tile[2][-1] + 1
  t, y, x = np.ix_(*tile)
  half_t, half_y, half_x = np.ix_(*ragged)
  by_tile = np.argsort(((t * tiles_y + y) * tiles_x + x).reshape(-1), kind="stable")
  inverse = np.argsort(((half_t * 2 + half_y) * 2 + half_x).reshape(-1)[by_tile], kind="stable")
  return by_tile, np.argsort(inverse).astype(np.int32), inverse.astype(np.int32)
