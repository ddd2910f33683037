"""`BlockMask`: which key tiles each query tile may see. The kernels' whole view of the world.

It knows nothing of video, bands or diffusion. Every method becomes one of these tables, every backend reads nothing else, and
the backward table is generated from the forward one here and nowhere else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core import lists
from freqformer.kernels.core.lists import array_module, search

Array = jax.Array | np.ndarray
MOST_LISTED = 1 << 27  # tiles in all lists of a concrete table (`check_listed`)
_COUNTED = 1 << 22  # listed tiles that are looked at together when a concrete table is counted


def _static(default=dataclasses.MISSING):
  return dataclasses.field(
    metadata={"static": True}, **({} if default is dataclasses.MISSING else {"default": default})
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedMask:
  """The same table by key tile, in CSR form: which query tiles read each key tile. What dK and dV walk over.

  Attributes:
    q_indices: int32 `[b or 1, h or 1, nnz]`, query tiles ordered by key tile, ascending within one; nnz is static
      (`q_tiles * max_kv`), entries behind the last offset are padding (0).
    offsets: int32 `[b or 1, h or 1, kv_tiles + 1]`; key tile j owns `q_indices[offsets[j]:offsets[j + 1]]`.
    max_kv: static, the forward table's list length, kept so that `transpose()` gives back the same shape.
  """

  q_indices: Array
  offsets: Array
  q_tiles: int = _static()
  max_kv: int = _static()

  def transpose(self) -> tuple[Array, Array]:
    """Back to `(kv_indices, kv_counts)` of the forward table; padding repeats the row's last id (0 in empty rows)."""
    xnp = array_module(self.q_indices, self.offsets)
    lead, nnz, kv_tiles = (
      self.q_indices.shape[:2],
      self.q_indices.shape[-1],
      self.offsets.shape[-1] - 1,
    )
    slot = np.arange(nnz, dtype=np.int32)
    # The key tile of slot s is the number of its offsets that lie at or before it.
    kv = search(self.offsets[..., 1:], slot, "right")
    q = xnp.where(kv < kv_tiles, self.q_indices, self.q_tiles)
    order = xnp.argsort(q, axis=-1, stable=True)
    q, kv = xnp.take_along_axis(q, order, -1), xnp.take_along_axis(kv, order, -1)
    rows = np.arange(self.q_tiles, dtype=np.int32)
    start = search(q, rows, "left")
    counts = search(q, rows, "right") - start
    last = xnp.maximum(counts - 1, 0)[..., None]
    step = xnp.minimum(np.arange(self.max_kv, dtype=np.int32), last) + start[..., None]
    flat = xnp.minimum(step, nnz - 1).reshape(*lead, -1).astype(np.int32)
    ids = xnp.take_along_axis(kv, flat, -1).reshape(*lead, self.q_tiles, self.max_kv)
    return xnp.where(counts[..., None] > 0, ids, 0).astype(np.int32), counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaunchLists:
  """A table as GPU kernels read it, made once for a static one instead of before each call.

  Attributes:
    by_query, by_key: see the functions of these names in `kernels.core.lists`.
  """

  by_query: tuple
  by_key: tuple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
  """A block-sparse attention pattern over a buffer of tiles.

  Attributes:
    kv_indices: int32 `[b or 1, h or 1, q_tiles, max_kv]`, strictly ascending within `kv_counts`; the rest repeats a valid
      id, so that prefetching it is safe. None: the key tiles 0, 1, 2, ... in order, no list is read.
    kv_counts: int32 `[b or 1, h or 1, q_tiles]`, tiles listed. A row with 0 gives output 0, LSE -inf and no gradient.
    kv_len: int32 `[kv_tiles]` or `[b, kv_tiles]`, valid key rows per tile, 0..block_kv, valid rows first.
    kv_bias: float32 `[kv_tiles]` or None, added to the scaled scores; not differentiated.
    block_q: rows of a query tile in the buffer.
    block_kv: rows of a key tile in the buffer.
    transposed: the backward table where it was stored (`with_transpose`), else None and built on demand.
    mean_listed: static, tiles per list where that is known, for estimates of cost alone (`with_mean`).
    launch: what GPU kernels read of the table where it was stored (`with_launch`), else None. Like
      `transposed` it goes stale where lists or lengths are replaced: set it to None then.
  """

  kv_indices: Array | None
  kv_counts: Array
  kv_len: Array
  kv_bias: Array | None = None
  block_q: int = _static(128)
  block_kv: int = _static(128)
  transposed: TransposedMask | None = None
  mean_listed: float | None = _static(None)
  launch: LaunchLists | None = None

  def check_shapes(self) -> "BlockMask":
    """Checks shapes, dtypes and block sizes, also of traced tables, and returns the table.

    Not done on construction: transformations rebuild pytrees from stacked, batched or empty leaves.

    Raises:
      ValueError: if they contradict each other.
    """
    if self.block_q < 1 or self.block_kv < 1:
      raise ValueError(f"block sizes must be >= 1, got {self.block_q=}, {self.block_kv=}.")
    for name in ("kv_indices", "kv_counts", "kv_len"):
      value = getattr(self, name)
      if value is not None and value.dtype != np.int32:
        raise ValueError(
          f"{name} must be int32, got {value.dtype}; cast it when the table is built."
        )
    if self.kv_counts.ndim != 3:
      raise ValueError(
        f"kv_counts must be [b or 1, h or 1, q_tiles], got shape {self.kv_counts.shape}."
      )
    if self.kv_len.ndim not in (1, 2):
      raise ValueError(
        f"kv_len must be [kv_tiles] or [b, kv_tiles], got shape {self.kv_len.shape}."
      )
    if self.kv_indices is not None and (
      self.kv_indices.ndim != 4 or self.kv_indices.shape[:3] != self.kv_counts.shape
    ):
      raise ValueError(
        f"kv_indices must be kv_counts' shape {self.kv_counts.shape} + [max_kv], got {self.kv_indices.shape}."
      )
    if self.kv_bias is not None and self.kv_bias.shape != (self.kv_tiles,):
      raise ValueError(
        f"kv_bias must be [kv_tiles] = [{self.kv_tiles}], got shape {self.kv_bias.shape}."
      )
    return self

  # ---- sizes -----------------------------------------------------------------------------------------------------------

  @property
  def q_tiles(self) -> int:
    return self.kv_counts.shape[-1]

  @property
  def kv_tiles(self) -> int:
    return self.kv_len.shape[-1]

  @property
  def max_kv(self) -> int:
    """Length of the lists: a static bound on every count."""
    return self.kv_tiles if self.kv_indices is None else self.kv_indices.shape[-1]

  def indices(self) -> Array:
    """The lists, also where `kv_indices` is None: int32 `[b or 1, h or 1, q_tiles, max_kv]`."""
    if self.kv_indices is not None:
      return self.kv_indices
    step = np.arange(self.kv_tiles, dtype=np.int32)
    return array_module(self.kv_counts).broadcast_to(step, (*self.kv_counts.shape, self.kv_tiles))

  # ---- the same table in other forms -----------------------------------------------------------------------------------

  def to_tiles(self) -> Array:
    """bool `[b or 1, h or 1, q_tiles, kv_tiles]`: which tile lists which."""
    xnp, ids = array_module(self.kv_indices, self.kv_counts), self.indices()
    listed = np.arange(self.max_kv, dtype=np.int32) < self.kv_counts[..., None]
    ids = xnp.where(listed, ids, self.kv_tiles)
    if xnp is np:
      out = np.zeros((*ids.shape[:3], self.kv_tiles + 1), bool)
      np.put_along_axis(out, ids, True, -1)
    else:
      lead = jnp.ogrid[tuple(slice(s) for s in ids.shape[:3])]
      out = jnp.zeros((*ids.shape[:3], self.kv_tiles + 1), bool)
      out = out.at[(*(x[..., None] for x in lead), ids)].set(True)
    return out[..., :-1]

  def to_dense(self) -> Array:
    """bool `[b or 1, h or 1, q_tiles * block_q, kv_tiles * block_kv]`: which row may see which. Small tables only."""
    xnp = array_module(self.kv_indices, self.kv_counts, self.kv_len)
    valid = (
      np.arange(self.block_kv, dtype=np.int32) < self.kv_len[..., None]
    )  # [(b,) kv_tiles, block_kv]
    valid = valid.reshape(*self.kv_len.shape[:-1], -1)
    valid = valid[None, None, None] if valid.ndim == 1 else valid[:, None, None]
    tiles = xnp.repeat(xnp.repeat(self.to_tiles(), self.block_q, 2), self.block_kv, 3)
    return tiles & valid

  def transpose(self) -> TransposedMask:
    """The table by key tile; a stable sort, hence deterministic. Works on tracers: nnz is static."""
    if self.transposed is not None:
      return self.transposed
    ids = self.indices()
    xnp, lead = array_module(self.kv_indices, self.kv_counts), ids.shape[:2]
    listed = np.arange(self.max_kv, dtype=np.int32) < self.kv_counts[..., None]
    kv = xnp.where(listed, ids, self.kv_tiles).reshape(*lead, -1)
    order = xnp.argsort(kv, axis=-1, stable=True).astype(np.int32)
    rows = np.repeat(np.arange(self.q_tiles, dtype=np.int32), self.max_kv)
    kv = xnp.take_along_axis(kv, order, -1)
    q = xnp.where(
      kv < self.kv_tiles, rows[order] if xnp is np else jnp.asarray(rows)[order], 0
    ).astype(np.int32)
    edge = np.arange(self.kv_tiles + 1, dtype=np.int32)
    return TransposedMask(q, search(kv, edge, "left"), self.q_tiles, self.max_kv)

  def with_transpose(self) -> "BlockMask":
    """Stores the backward table: for static masks, once, outside the scan over layers."""
    return dataclasses.replace(self, transposed=self.transpose())

  def with_launch(self) -> "BlockMask":
    """Stores what GPU kernels read, and the backward table: for static masks, once."""
    stored = self.with_transpose()
    launch = LaunchLists(lists.by_query(stored), lists.by_key(stored))
    return dataclasses.replace(stored, launch=launch)

  def without_order(self) -> "BlockMask":
    """Drops the stored order of heads, which does not hold for a part of them."""
    if self.launch is None:
      return self
    parts = (self.launch.by_query, self.launch.by_key)
    return dataclasses.replace(self, launch=LaunchLists(*((*part[:-1], None) for part in parts)))

  def with_mean(self) -> "BlockMask":
    """Notes the mean length of the lists while counts are NumPy; traced later on, they could not be read any more."""
    if isinstance(self.kv_counts, np.ndarray) and self.kv_counts.size:
      return dataclasses.replace(self, mean_listed=float(self.kv_counts.mean(dtype=np.float64)))
    return self

  def refine(self, factor: int) -> "BlockMask":
    """The same pattern on tiles `factor` times shorter (queries and keys), e.g. 384-row tiles refined to 128.

    Raises:
      ValueError: if a block size is not divisible by `factor`.
    """
    if factor < 1 or self.block_q % factor or self.block_kv % factor:
      raise ValueError(
        f"refine({factor}) needs block sizes divisible by it, got {self.block_q=}, {self.block_kv=}."
      )
    xnp = array_module(self.kv_indices, self.kv_counts, self.kv_len)
    part, block_kv = np.arange(factor, dtype=np.int32), self.block_kv // factor
    indices = None
    if self.kv_indices is not None:
      indices = (self.kv_indices[..., None] * factor + part).reshape(*self.kv_indices.shape[:3], -1)
      indices = xnp.repeat(indices, factor, 2).astype(np.int32)
    kv_len = xnp.clip(self.kv_len[..., None] - part * block_kv, 0, block_kv).astype(np.int32)
    return BlockMask(
      indices,
      xnp.repeat(self.kv_counts * factor, factor, 2).astype(np.int32),
      kv_len.reshape(*self.kv_len.shape[:-1], -1),
      None if self.kv_bias is None else xnp.repeat(self.kv_bias, factor),
      self.block_q // factor,
      block_kv,
    )

  # ---- counting --------------------------------------------------------------------------------------------------------

  def q_len(self) -> Array:
    """Valid query rows per query tile, `[1 or b, q_tiles]`.

    Where queries and keys share one buffer (equal rows), `kv_len` says it; otherwise every query row counts as valid.
    """
    xnp, rows = array_module(self.kv_len), self.q_tiles * self.block_q
    kv_len = self.kv_len if self.kv_len.ndim == 2 else self.kv_len[None]
    if rows != self.kv_tiles * self.block_kv:
      return xnp.full((kv_len.shape[0], self.q_tiles), self.block_q, np.int32)
    valid = np.arange(self.block_kv, dtype=np.int32) < kv_len[..., None]
    return valid.reshape(kv_len.shape[0], self.q_tiles, self.block_q).sum(-1).astype(np.int32)

  def pairs(self) -> Array:
    """Scored valid (query, key) pairs per sample and head, `[b or 1, h or 1]`: exact int64 on NumPy, float32 if traced."""
    xnp = array_module(self.kv_indices, self.kv_counts, self.kv_len)
    kind = np.int64 if xnp is np else jnp.float32
    keys = self._listed_keys(xnp, kind)
    return (keys * self.q_len()[:, None].astype(kind)).sum(-1)

  def _listed_keys(self, xnp, kind) -> Array:
    """Valid keys that each query tile's list holds, `[b or 1, h or 1, q_tiles]`."""
    if self.kv_indices is None:  # prefixes of all key tiles
      sums = xnp.cumsum(self.kv_len, -1, dtype=np.int64 if xnp is np else np.int32).reshape(
        -1, 1, self.kv_tiles
      )
      sums = xnp.pad(sums, ((0, 0), (0, 0), (1, 0)))
      counts = xnp.broadcast_to(
        self.kv_counts, np.broadcast_shapes(self.kv_counts.shape, (len(sums), 1, 1))
      )
      return xnp.take_along_axis(
        xnp.broadcast_to(sums, (*counts.shape[:2], self.kv_tiles + 1)), counts, -1
      ).astype(kind)
    ids = self.indices()
    if xnp is np and self.kv_len.ndim == 1:
      if one_list(ids):  # prefixes of one list: no table of all of them
        return np.cumsum([0, *self.kv_len[ids[0, 0, 0]]], dtype=np.int64)[self.kv_counts]
      found, step = [], max(1, _COUNTED // max(1, self.max_kv))
      slots = np.arange(self.max_kv, dtype=np.int32)
      for rows in (slice(i, i + step) for i in range(0, self.q_tiles, step)):
        keys = np.where(slots < self.kv_counts[:, :, rows, None], self.kv_len[ids[:, :, rows]], 0)
        found.append(keys.sum(-1, dtype=np.int64))
      return np.concatenate(found, -1)
    listed = np.arange(self.max_kv, dtype=np.int32) < self.kv_counts[..., None]
    if self.kv_len.ndim == 1:
      keys = xnp.asarray(self.kv_len)[ids]
    else:
      wide = xnp.broadcast_to(
        self.kv_len[:, None, None], (self.kv_len.shape[0], *ids.shape[1:3], self.kv_tiles)
      )
      keys = xnp.take_along_axis(wide, xnp.broadcast_to(ids, (*wide.shape[:3], ids.shape[-1])), -1)
    return xnp.where(listed, keys, 0).sum(-1).astype(kind)

  def density(self, n: int | None = None) -> Array:
    """Scored valid pairs / n^2 per sample and head, `[b or 1, h or 1]`; n defaults to the valid keys of the buffer.

    On a packed buffer pass the video's token count: coarse pairs count as pairs, coarse tokens do not count as tokens.
    """
    if n is None:
      kv_len = self.kv_len if self.kv_len.ndim == 2 else self.kv_len[None]
      return self.pairs() / (self.q_len().sum(-1) * 1.0 * kv_len.sum(-1))[:, None]
    return self.pairs() / float(n) ** 2

  # ---- for people ------------------------------------------------------------------------------------------------------

  def draw(self, batch: int = 0, head: int = 0, width: int = 64) -> str:
    """A printed picture: one character per tile (or per group of tiles), darker = more of them listed."""
    tiles = np.asarray(self.to_tiles())
    tiles = tiles[min(batch, tiles.shape[0] - 1), min(head, tiles.shape[1] - 1)].astype(np.float32)
    step = max(1, -(-max(tiles.shape) // width))
    pad = [(0, -s % step) for s in tiles.shape]
    cells = (
      np.pad(tiles, pad)
      .reshape(-(-tiles.shape[0] // step), step, -(-tiles.shape[1] // step), step)
      .mean((1, 3))
    )
    shades = " ░▒▓█"
    lines = ["".join(shades[int(np.ceil(c * (len(shades) - 1)))] for c in row) for row in cells]
    head_line = (
      f"{self.q_tiles} query tiles of {self.block_q} x {self.kv_tiles} key tiles of {self.block_kv}"
    )
    return "\n".join([f"{head_line}, {tiles.mean():.1%} of tiles listed", *lines])

  def check(self) -> "BlockMask":
    """Checks shapes and values of a concrete table and returns it.

    Raises:
      ValueError: if a shape, a count, an id, its order, or a length is out of range.
    """
    self.check_shapes()
    counts, kv_len = np.asarray(self.kv_counts), np.asarray(self.kv_len)
    if counts.min(initial=0) < 0 or counts.max(initial=0) > self.max_kv:
      raise ValueError(
        f"kv_counts must lie in 0..{self.max_kv}, got {counts.min()}..{counts.max()}."
      )
    if kv_len.min(initial=0) < 0 or kv_len.max(initial=0) > self.block_kv:
      raise ValueError(
        f"kv_len must lie in 0..{self.block_kv}, got {kv_len.min()}..{kv_len.max()}."
      )
    ids = np.asarray(self.indices())
    if ids.size and (ids.min() < 0 or ids.max() >= self.kv_tiles):
      raise ValueError(
        f"kv_indices must lie in 0..{self.kv_tiles - 1}, padding too, got {ids.min()}..{ids.max()}."
      )
    inside = np.arange(1, self.max_kv) < counts[..., None]
    if (inside & (np.diff(ids, axis=-1) <= 0)).any():
      raise ValueError(
        "kv_indices must be strictly ascending within kv_counts; sort each list and drop doubles."
      )
    return self


def one_list(ids: Array) -> bool:
  """Whether all rows of concrete lists are one and the same array in memory, so that each lists a prefix of it."""
  return isinstance(ids, np.ndarray) and all(
    s == 0 or n == 1 for s, n in zip(ids.strides[:3], ids.shape[:3], strict=True)
  )


def check_listed(entries: int, what: str):
  """Refuses a concrete table before it is built: `MOST_LISTED` int32 ids are 0.5 GB, and building takes several copies.

  Args:
    entries: query tiles times tiles of the longest list, at most.
    what: whose table, for the message.

  Raises:
    ValueError: if it is too large.
  """
  if entries > MOST_LISTED:
    raise ValueError(
      f"{what} would list {entries:,} tiles, more than the {MOST_LISTED:,} that a table may hold; "
      "give fewer tokens, larger tiles or a narrower pattern"
    )


def dense_mask(n_q: int, n_kv: int, block_q: int = 128, block_kv: int = 128) -> BlockMask:
  """Everything sees everything: `kv_indices` is None, the last key tile may be ragged."""
  q_tiles, kv_tiles = -(-n_q // block_q), -(-n_kv // block_kv)
  kv_len = np.clip(n_kv - np.arange(kv_tiles) * block_kv, 0, block_kv).astype(np.int32)
  return BlockMask(
    None, np.full((1, 1, q_tiles), kv_tiles, np.int32), kv_len, None, block_q, block_kv
  )


def from_tiles(tiles: np.ndarray, kv_len: np.ndarray, block_q: int, block_kv: int) -> BlockMask:
  """The table of a concrete bool array `[b or 1, h or 1, q_tiles, kv_tiles]` (or `[q_tiles, kv_tiles]`)."""
  tiles = np.asarray(tiles, bool)
  tiles = tiles[None, None] if tiles.ndim == 2 else tiles
  counts = tiles.sum(-1).astype(np.int32)
  ids = np.argsort(~tiles, axis=-1, stable=True)[..., : max(1, int(counts.max(initial=1)))].astype(
    np.int32
  )
  return pad_lists(ids, counts, np.asarray(kv_len, np.int32), None, block_q, block_kv)


def pad_lists(indices, counts, kv_len, kv_bias, block_q, block_kv) -> BlockMask:
  """A table from lists whose entries behind the count are arbitrary: they become the row's last valid id (0 if none)."""
  xnp = array_module(indices, counts)
  last = xnp.take_along_axis(indices, xnp.maximum(counts - 1, 0)[..., None], -1)
  last = xnp.where(counts[..., None] > 0, last, 0)
  listed = np.arange(indices.shape[-1], dtype=np.int32) < counts[..., None]
  return BlockMask(
    xnp.where(listed, indices, last).astype(np.int32), counts, kv_len, kv_bias, block_q, block_kv
  )


def select(masks: list[BlockMask] | tuple[BlockMask, ...], choice: Array) -> BlockMask:
  """Per sample and head one of several tables over the same buffer: hard routing is this and nothing else.

  Args:
    masks: tables with equal block sizes, tile counts and `kv_len` (the first one's is used); lists may differ in length.
    choice: int32 `[b or 1, h]`, traced or not; the shapes of the result do not depend on its values.

  Returns:
    A table `[b', h', q_tiles, max over masks of max_kv]`, where b' and h' are broadcast over choice and masks.

  Raises:
    ValueError: if the tables do not describe the same buffer.
  """
  first = masks[0]

  def shape(m):
    return (m.block_q, m.block_kv, m.q_tiles, m.kv_tiles)

  if any(shape(m) != shape(first) for m in masks):
    raise ValueError(
      "select needs tables over one buffer with equal (block_q, block_kv, q_tiles, kv_tiles), got "
      f"{[shape(m) for m in masks]}; pack them with planners.packed first."
    )
  max_kv = max(m.max_kv for m in masks)
  xnp = array_module(choice, *(m.kv_counts for m in masks), *(m.kv_indices for m in masks))
  pick = choice[..., None]
  counts = ids = None
  for i, mask in enumerate(masks):
    own = mask.indices()
    own = xnp.pad(own, ((0, 0),) * 3 + ((0, max_kv - mask.max_kv),), mode="edge")
    lead = np.broadcast_shapes(pick.shape[:2], own.shape[:2])
    ids = (
      xnp.broadcast_to(own, (*lead, *own.shape[2:]))
      if i == 0
      else xnp.where(pick[..., None] == i, own, ids)
    )
    counts = (
      xnp.broadcast_to(mask.kv_counts, (*lead, mask.q_tiles))
      if i == 0
      else xnp.where(pick == i, mask.kv_counts, counts)
    )
  return BlockMask(ids, counts, first.kv_len, first.kv_bias, first.block_q, first.block_kv)
