"""From the joint projection to attention in one pass: QK-norm, rotary, compression, packing, means.

`forward` below defines `prepare` in plain JAX and gives its gradients. On GPUs a kernel
(`hopper_prepare.py`, `triton_prepare.py`) reads the projection once and writes q, k and v once. A
norm over all heads of a token needs what no part of the kernel sees: XLA reads q and k once before.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from freqformer.kernels.core.cotangents import no_gradient
from freqformer.kernels.core.op import Op, Split

# What the Hopper kernels take.
HEAD_DIMS = (64, 128)
BLOCKS = (64, 128)  # rows of a tile
MAX_CELLS = 64  # coarse tokens of a tile: rows of one product; Triton's takes as many
EPS = 1e-6  # of the norm; flax's default


class Prepared(NamedTuple):
  """Packed q, k, v `[b, front + n, h, d]`, tokens last, and means of q and k by tile.

  Attributes:
    q, k: normed and rotated.
    v: as projected.
    q_pool, k_pool: float32 `[b, h, tiles, d]`, means over each tile's valid rows of the tokens as
      they were rounded, or None. No gradient flows through them.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  q_pool: jax.Array | None = None
  k_pool: jax.Array | None = None


def _gain_dims(gains) -> str:
  """Returns the dimensions of gains by which devices share them, which `[d]` has none of."""
  return "h" if gains[0].ndim == 2 else "."


PREPARE = Op(
  name="prepare",
  implementations={
    "hopper": "around.hopper_prepare_call",
    "triton": "around.triton_prepare_call",
    "xla": "around.prepare",
  },
  forward=Split(
    ("b..h.", ".h.", _gain_dims, ".", ".", ".", "bh", "b.h.", "b"),
    Prepared("b.h.", "b.h.", "b.h.", "bh..", "bh.."),
  ),
  opaque=("hopper", "triton"),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
  """Compresses by tile: coarse token j of tile t is row j of its matrix times the tile's rows.

  Attributes:
    matrices: float32 `[classes, cells, block]`; padding columns and rows that a class lacks are 0,
      other rows sum to one.
    classes: int32 `[tiles]`, the matrix of each tile.
    rows: int32 `[n_coarse]`, `tile * cells + j` of each coarse token; None if all tiles are alike
      and that is its own number.
    cos, sin: float32 `[n_coarse, d / 2]`, rotary at the cells' centres.
    front: static; rows of the results before the tokens, at least n_coarse; the spare ones are 0.
    filters: float32 `[classes, bands, block, block]`, projections of a tile's rows; constants and
      padding become zero. Or None.
  """

  matrices: jax.Array
  classes: jax.Array
  rows: jax.Array | None
  cos: jax.Array
  sin: jax.Array
  front: int = dataclasses.field(metadata={"static": True})
  filters: jax.Array | None = None

  @property
  def per_tile(self) -> int:
    """Coarse tokens of the largest class."""
    return self.matrices.shape[1]

  @property
  def can_filter(self) -> bool:
    """True if there are filters."""
    return self.filters is not None

  def compress(self, x: jax.Array) -> jax.Array:
    """Returns coarse tokens `[b, n_coarse, ...]`, at least float32, of `[b, n, ...]`."""
    coarse = self._by_tile(self.matrices, x)
    return coarse if self.rows is None else coarse[:, self.rows]

  def filter(self, x: jax.Array, bands: jax.Array) -> jax.Array:
    """Returns each head's tokens in the band `bands - 1`, at least float32."""
    count = self.filters.shape[1]
    each = [self._by_tile(self.filters[:, i], x) for i in range(count)]
    return jnp.select([(bands == i + 1)[:, None, :, None] for i in range(count)], each)

  def _by_tile(self, matrices, x):
    b, _, *rest = x.shape
    x = jax.lax.optimization_barrier(x)  # widened inside the product, not once for all readers
    tiles = x.reshape(b, len(self.classes), -1, *rest)
    return multiply_tiles(matrices, self.classes, tiles)


def multiply_tiles(matrices: jax.Array, classes: jax.Array, tiles: jax.Array) -> jax.Array:
  """Multiplies each tile's rows by its class's matrix, in at least float32.

  TF32 would not leave a constant one.

  Args:
    matrices: `[classes, rows, k]`.
    classes: int32 `[tiles]`, the matrix of each tile.
    tiles: `[b, tiles, k, ...]`.

  Returns:
    `[b, tiles * rows, ...]`.
  """
  b, _, _, *rest = tiles.shape
  dtype = jnp.promote_types(tiles.dtype, jnp.float32)
  alike = matrices.shape[0] == 1
  matrices = matrices[0] if alike else jnp.asarray(matrices)[classes]
  product = "rk,btk...->btr..." if alike else "trk,btk...->btr..."
  y = jnp.einsum(product, matrices.astype(dtype), tiles.astype(dtype), precision="highest")
  return y.reshape(b, -1, *rest)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs of channels by angles (RoPE, arXiv 2104.09864).

  Args:
    x: `[..., n, h, d]`; channel i is paired with i + d / 2.
    cos, sin: `[n, d / 2]`.
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  first, second = jnp.split(x.astype(dtype), 2, axis=-1)
  cos, sin = cos[:, None], sin[:, None]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return turned.astype(x.dtype)


def norm_and_turn(
  x: jax.Array, gain: jax.Array, tables: tuple[jax.Array, jax.Array], over_heads: bool = False
) -> jax.Array:
  """Norms tokens (RMS, `EPS`), rotates them (`turn`), and rounds once.

  Args:
    x: `[..., n, h, d]`.
    gain: `[d]` or `[h, d]`.
    tables: cos and sin of the angles, `[n, d / 2]` each.
    over_heads: norm all heads of a token together instead of each alone.
  """
  axes = (-2, -1) if over_heads else -1
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # The barrier keeps XLA from writing the normed array in float32 before it is rotated.
  inverse = jax.lax.optimization_barrier(
    jax.lax.rsqrt(jnp.square(wide).mean(axes, keepdims=True) + EPS)
  )
  return turn(wide * (inverse * gain.astype(wide.dtype)), *tables).astype(x.dtype)


def prepare(
  joint: jax.Array,
  bias: jax.Array,
  gains: tuple[jax.Array, jax.Array],
  tables: tuple[jax.Array, jax.Array],
  lengths: jax.Array,
  cells: Any = None,
  bands: jax.Array | None = None,
  ahead: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  *,
  filtered: str = "",
  pooled: bool = False,
  over_heads: bool = False,
  implementation: str | None = None,
) -> Prepared:
  """Adds the projection's bias to q, k and v, norms and rotates q and k, and packs.

  Args:
    joint: `[b, n, 3, h, d]`, the projection's product, in tiles of equally many rows; padding rows
      hold anything finite.
    bias: `[3, h, d]`, of the projection.
    gains: of the norms of q and k, `[d]` each, or `[h, d]` if `over_heads`.
    tables: cos and sin of every row's angles, float32 `[n, d / 2]`.
    lengths: int32 `[tiles]`, valid rows of each tile; they come first.
    cells: compression: `Cells`, or another value with its `compress`, `filter`, `cos`, `sin`,
      `front`, `per_tile` (None if the transform leaves the tile) and `can_filter`. None: tokens
      only, `front` is 0.
    bands: int32 `[b, h]`, 1 plus the filter (of `cells`) that a head's tokens go through before the
      norm, 0 for none.
    ahead: finished rows of q, k and v that come before the tokens, `[b, front, h, d]` each; only
      without cells.
    filtered: what goes through it: "", "v" or "qkv"; never coarse tokens and means.
    pooled: whether the means of q and k are asked for.
    over_heads: norm all heads of a row together instead of each alone.
    implementation: of `PREPARE.implementations`; None: the first that supports the call.

  Raises:
    ValueError: if filters or bands are missing for `filtered`, if there are both cells and rows
      ahead, if q and k are filtered before a norm over heads, which would mix bands, or the
      implementation is unknown.
    NotImplementedError: if the named implementation does not support the call, with the reasons.
  """
  can_filter = bands is not None and cells is not None and cells.can_filter
  if filtered not in ("", "v", "qkv") or (filtered and not can_filter):
    raise ValueError(
      f'{filtered=} must be "", "v" or "qkv"; the latter two need bands and cells with filters.'
    )
  if ahead is not None and cells is not None:
    raise ValueError("cells and rows ahead of the tokens would lie in the same place: give one.")
  if over_heads and filtered == "qkv":
    raise ValueError('a norm over heads would mix bands: filter "v" alone.')
  name = PREPARE.choose(joint, lengths, cells, implementation=implementation)
  bands = bands if filtered else None
  inverses = None
  if over_heads and PREPARE.module(name) is not PREPARE.definition:
    # Here, where every head is there: devices that share them run the op on their own.
    inverses = _inverses(*jax.lax.stop_gradient((joint, bias, cells)))
  operands = (joint, bias, tuple(gains), tuple(tables), lengths, cells, bands, ahead, inverses)
  options = dict(filtered=filtered, pooled=pooled, over_heads=over_heads)
  found = PREPARE.run_as_defined(name, operands, **options)
  if found.v is None:  # v stays what it is; XLA leaves it out where nobody reads it
    found = found._replace(v=_biased(joint[:, :, 2], bias[2]).astype(joint.dtype))
  return found


# ---- the definition ------------------------------------------------------------------------------


@jax.named_scope("prepare")
def _inverses(joint, bias, cells):
  """Returns what a norm over heads multiplies q and k by, for the kernel, which sees few heads.

  They are float32 `[b, 2, n]` of the tokens, and `[b, 2, n_coarse]` of coarse ones or None. One
  pass reads q and k; compression reads the projection once more.
  """

  def of(q_and_k):
    square = jnp.square(_biased(q_and_k, bias[:2])).mean((-2, -1))
    return jnp.moveaxis(jax.lax.rsqrt(square + EPS), -1, 1)

  # All three arrays are compressed where they are: of two there would be a copy.
  return of(joint[:, :, :2]), None if cells is None else of(cells.compress(joint)[:, :, :2])


@jax.named_scope("prepare")
def forward(
  joint,
  bias,
  gains,
  tables,
  lengths,
  cells,
  bands,
  ahead,
  inverses,
  *,
  filtered,
  pooled,
  over_heads,
) -> Prepared:
  """Computes in float32 (or wider) and rounds once. v is there if something comes before it.

  Inverses are for kernels: the definition's own norm has a gradient.
  """
  del inverses
  # Not three slices, whose gradients would be three arrays of the projection's size.
  q, k, v = jnp.unstack(joint, axis=2)
  one = functools.partial(_one, tables=tables, cells=cells, bands=bands, over_heads=over_heads)
  first = ahead or (None,) * 3
  of_q, of_k, of_v = first if cells is None else _compressed(joint, cells)
  q, tokens_of_q = one(q, bias[0], gains[0], of_q, filtered="q" in filtered)
  k, tokens_of_k = one(k, bias[1], gains[1], of_k, filtered="k" in filtered)
  v = None if of_v is None else one(v, bias[2], None, of_v, filtered="v" in filtered)[0]
  if not pooled:
    return Prepared(q, k, v)
  return Prepared(q, k, v, _means(tokens_of_q(), lengths), _means(tokens_of_k(), lengths))


def _compressed(joint, cells):
  """Returns the coarse tokens of q, k and v: one product reads all three where they are.

  3 and h are not merged: devices that share the heads would have to gather them.
  """
  return jnp.unstack(cells.compress(joint), axis=2)


def _one(x, bias, gain, first, *, tables, cells, bands, filtered, over_heads):
  """Returns a packed array of `x` `[b, n, h, d]`, and a function for its unfiltered tokens.

  `first`: its coarse tokens, not finished; without cells, finished rows; or None.
  """

  def finish(wide, tables):
    # Of a wide array: `norm_and_turn` rounds to its input's type, which is wide here.
    if gain is not None:
      wide = norm_and_turn(wide, gain, tables, over_heads)
    return wide.astype(x.dtype)

  wide = _biased(x, bias)
  if filtered:  # constants vanish in a band, and with them the bias
    wide = jnp.where((bands > 0)[:, None, :, None], cells.filter(x, bands), wide)
  packed = finish(wide, tables)
  front = 0
  if cells is not None:
    # Compression keeps constants: the bias may come after it.
    first = finish(_biased(first, bias), (cells.cos, cells.sin))
    front = cells.front
    filler = jnp.zeros((x.shape[0], front - first.shape[1], *x.shape[2:]), x.dtype)
    packed = jnp.concatenate([first, filler, packed], 1)
  elif first is not None:
    front = first.shape[1]
    packed = jnp.concatenate([first, packed], 1)

  def tokens():
    if filtered:
      return finish(_biased(x, bias), tables)
    # The barrier has them read from the packed array: XLA would norm and rotate once more.
    return jax.lax.optimization_barrier(jax.lax.stop_gradient(packed))[:, front:]

  return packed, tokens


def _biased(x, bias):
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return x.astype(wide) + bias.astype(wide)


def _means(x, lengths):
  """Returns means over each tile's valid rows, float32 `[b, h, tiles, d]`."""
  b, _, h, d = x.shape
  lengths = jnp.asarray(lengths)
  x = jax.lax.stop_gradient(x).reshape(b, len(lengths), -1, h, d)
  valid = (jnp.arange(x.shape[2]) < lengths[:, None])[..., None, None]
  x = jnp.where(valid, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
  return (x.sum(2) / lengths[:, None, None]).transpose(0, 2, 1, 3)


def backward(operands, cotangents: Prepared, *, filtered, pooled, over_heads):
  """Returns the cotangents, array by array: together, all float32 intermediates would be alive."""
  del pooled  # no gradient flows through the means
  joint, bias, gains, tables, lengths, cells, bands, ahead, inverses = operands
  found = []
  d_ahead = []
  for i, x in enumerate(jnp.unstack(joint, axis=2)):
    cotangent = cotangents[i]
    if cotangent is None:  # of v, which is not there if nothing comes before it, and has no gain
      found.append((jnp.zeros_like(x), jnp.zeros_like(bias[i]), None))
      continue
    if found:
      found[-1], cotangent = jax.lax.optimization_barrier((found[-1], cotangent))
    if ahead is not None:
      front = ahead[i].shape[1]
      d_ahead.append(cotangent[:, :front])
      cotangent = cotangent[:, front:]

    def run(x, bias, gain, i=i):
      options = dict(filtered="qkv"[i] in filtered, over_heads=over_heads)
      coarse = None if cells is None else cells.compress(x)
      return _one(x, bias, gain, coarse, tables=tables, cells=cells, bands=bands, **options)[0]

    _, pull = jax.vjp(run, x, bias[i], (*gains, None)[i])
    found.append(pull(cotangent))
  d_joint, d_bias, d_gains = zip(*found, strict=True)
  rest = jax.tree.map(no_gradient, (tables, lengths, cells, bands))
  d_ahead = tuple(d_ahead) or None
  # The norm is differentiated above; whoever made the inverses did so without a gradient.
  d_inverses = jax.tree.map(no_gradient, inverses)
  return jnp.stack(d_joint, 2), jnp.stack(d_bias), d_gains[:2], *rest, d_ahead, d_inverses
