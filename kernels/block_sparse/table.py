"""`BlockMask`: which key tiles each query tile may see. The kernels' whole view of the world.

Every method becomes one of these tables, every implementation reads nothing else, and the backward
table is generated from the forward one here and nowhere else.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core import lists
from freqformer.kernels.core.lists import array_module, search

Array = jax.Array | np.ndarray
MOST_LISTED = 1 << 27  # tiles in all lists of a concrete table (`check_listed`)
_COUNTED = 1 << 22  # listed tiles that are looked at together when a concrete table is counted


def _static(default):
  return dataclasses.field(metadata={"static": True}, default=default)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedMask:
  """The same table by key tile, in CSR form, which dK and dV walk over.

  Attributes:
    q_indices: int32 `[b or 1, h or 1, nnz]`, query tiles by key tile, ascending within one; nnz is
      static (`q_tiles * max_kv`), entries behind the last offset are padding (0).
    offsets: int32 `[b or 1, h or 1, kv_tiles + 1]`; `q_indices[offsets[j]:offsets[j + 1]]` read j.
  """

  q_indices: Array
  offsets: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaunchLists:
  """A table as GPU kernels read it, made once if static; see functions of `kernels.core.lists`."""

  by_query: tuple
  by_key: tuple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
  """A block-sparse attention pattern over a buffer of tiles.

  Attributes:
    kv_indices: int32 `[b or 1, h or 1, q_tiles, max_kv]`, strictly ascending within `kv_counts`;
      the rest repeats a valid id, so that prefetching it is safe. None: the key tiles 0, 1, 2, ...
      in order, no list is read.
    kv_counts: int32 `[b or 1, h or 1, q_tiles]`, tiles listed. A row with 0 gives output 0, LSE
      -inf and no gradient.
    kv_len: int32 `[kv_tiles]` or `[b, kv_tiles]`, valid key rows of each tile; they come first.
    kv_bias: float32 `[kv_tiles]` or None, added to the scaled scores; not differentiated.
    block_q, block_kv: rows of a query and of a key tile in the buffer.
    transposed: the backward table if stored (`with_transpose`), else None and built on demand.
    mean_listed: static, known tiles per list (`with_mean`), for estimates of cost alone.
    launch: what GPU kernels read if stored (`with_launch`), else None. Like `transposed` it goes
      stale where lists or lengths are replaced: set it to None then.
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
      self.kv_indices.ndim != 4
      or self.kv_indices.shape[:3] != self.kv_counts.shape
      or self.kv_indices.shape[3] == 0
    ):
      raise ValueError(
        f"kv_indices must be kv_counts' shape {self.kv_counts.shape} + [max_kv], max_kv >= 1, got "
        f"{self.kv_indices.shape}."
      )
    if self.kv_bias is not None and self.kv_bias.shape != (self.kv_tiles,):
      raise ValueError(
        f"kv_bias must be [kv_tiles] = [{self.kv_tiles}], got shape {self.kv_bias.shape}."
      )
    return self

  # ---- sizes -------------------------------------------------------------------------------------

  @property
  def q_tiles(self) -> int:
    """Query tiles, whether they list something or not."""
    return self.kv_counts.shape[-1]

  @property
  def kv_tiles(self) -> int:
    """Key tiles of the buffer."""
    return self.kv_len.shape[-1]

  @property
  def max_kv(self) -> int:
    """Length of the lists: a static bound on every count."""
    return self.kv_tiles if self.kv_indices is None else self.kv_indices.shape[-1]

  def indices(self) -> Array:
    """Returns int32 `[b or 1, h or 1, q_tiles, max_kv]` lists, also where `kv_indices` is None."""
    if self.kv_indices is not None:
      return self.kv_indices
    step = np.arange(self.kv_tiles, dtype=np.int32)
    return array_module(self.kv_counts).broadcast_to(step, (*self.kv_counts.shape, self.kv_tiles))

  def _listed(self) -> Array:
    """Returns bool `[b or 1, h or 1, q_tiles, max_kv]`: True up to each list's count."""
    return np.arange(self.max_kv, dtype=np.int32) < self.kv_counts[..., None]

  # ---- the same table in other forms -------------------------------------------------------------

  def to_tiles(self) -> Array:
    """Returns bool `[b or 1, h or 1, q_tiles, kv_tiles]`: True where a tile lists another."""
    xnp = array_module(self.kv_indices, self.kv_counts)
    ids = xnp.where(self._listed(), self.indices(), self.kv_tiles)
    row = xnp.zeros(self.kv_tiles + 1, bool)
    if xnp is np:
      out = np.broadcast_to(row, (*ids.shape[:3], len(row))).copy()
      np.put_along_axis(out, ids, True, -1)
    else:  # row by row: devices that share the heads move none, where put_along_axis gathers
      out = jnp.vectorize(lambda ids: row.at[ids].set(True), signature="(k)->(n)")(ids)
    return out[..., :-1]

  def to_dense(self) -> Array:
    """Returns bool `[b or 1, h or 1, query rows, key rows]`, True where seen. For small tables."""
    xnp = array_module(self.kv_indices, self.kv_counts, self.kv_len)
    # [(b,) kv_tiles, block_kv]
    valid = np.arange(self.block_kv, dtype=np.int32) < self.kv_len[..., None]
    valid = valid.reshape(*self.kv_len.shape[:-1], -1)
    valid = valid[None, None, None] if valid.ndim == 1 else valid[:, None, None]
    tiles = xnp.repeat(xnp.repeat(self.to_tiles(), self.block_q, 2), self.block_kv, 3)
    return tiles & valid

  def transpose(self) -> TransposedMask:
    """Returns the table by key tile; a stable sort, hence deterministic. Tracers work, too."""
    if self.transposed is not None:
      return self.transposed
    xnp = array_module(self.kv_indices, self.kv_counts)
    kv = xnp.where(self._listed(), self.indices(), self.kv_tiles)
    kv = kv.reshape(*kv.shape[:2], -1)
    order = xnp.argsort(kv, axis=-1, stable=True).astype(np.int32)
    rows = np.repeat(np.arange(self.q_tiles, dtype=np.int32), self.max_kv)
    kv = xnp.take_along_axis(kv, order, -1)
    q = xnp.where(kv < self.kv_tiles, xnp.asarray(rows)[order], 0).astype(np.int32)
    edge = np.arange(self.kv_tiles + 1, dtype=np.int32)
    return TransposedMask(q, search(kv, edge, "left"))

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
    """Notes the lists' mean length while counts are NumPy: once traced, they cannot be read."""
    if isinstance(self.kv_counts, np.ndarray) and self.kv_counts.size:
      return dataclasses.replace(self, mean_listed=float(self.kv_counts.mean(dtype=np.float64)))
    return self

  def refine(self, factor: int) -> "BlockMask":
    """Returns the same pattern on tiles `factor` times shorter, e.g. 384-row tiles refined to 128.

    Raises:
      ValueError: if a block size is not divisible by `factor`.
    """
    if factor < 1 or self.block_q % factor or self.block_kv % factor:
      raise ValueError(
        f"refine({factor}) needs block sizes divisible by it, got {self.block_q=}, "
        f"{self.block_kv=}."
      )
    xnp = array_module(self.kv_indices, self.kv_counts, self.kv_len)
    part = np.arange(factor, dtype=np.int32)
    block_kv = self.block_kv // factor
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

  # ---- counting ----------------------------------------------------------------------------------

  def q_len(self) -> Array:
    """Returns valid query rows per query tile, `[1 or b, q_tiles]`.

    `kv_len` where queries and keys share a buffer (equal rows); else every query row is valid.
    """
    kv_len = self.kv_len.reshape(-1, self.kv_tiles)
    if self.q_tiles * self.block_q != self.kv_tiles * self.block_kv:
      shape = (len(kv_len), self.q_tiles)
      return array_module(self.kv_len).full(shape, self.block_q, np.int32)
    valid = np.arange(self.block_kv, dtype=np.int32) < kv_len[..., None]
    return valid.reshape(len(kv_len), self.q_tiles, self.block_q).sum(-1).astype(np.int32)

  def pairs(self) -> Array:
    """Returns scored valid pairs `[b or 1, h or 1]`: exact int64 for NumPy, float32 if traced."""
    xnp = array_module(self.kv_indices, self.kv_counts, self.kv_len)
    kind = np.int64 if xnp is np else jnp.float32
    keys = self._listed_keys(xnp).astype(kind)
    return (keys * self.q_len()[:, None].astype(kind)).sum(-1)

  def _listed_keys(self, xnp) -> Array:
    """Returns valid keys that each query tile's list holds, `[b or 1, h or 1, q_tiles]`."""
    kv_len = xnp.asarray(self.kv_len).reshape(-1, self.kv_tiles)
    ids = self.kv_indices
    if ids is None or one_list(ids):  # prefixes of one list: no table of all of them
      first = kv_len if ids is None else kv_len[:, ids[0, 0, 0]]
      sums = xnp.cumsum(first, -1, dtype=np.int64 if xnp is np else np.int32)
      sums = xnp.pad(sums, ((0, 0), (1, 0)))[:, None]
      lead = np.broadcast_shapes(self.kv_counts.shape[:2], sums.shape[:2])
      counts = xnp.broadcast_to(self.kv_counts, (*lead, self.q_tiles))
      return xnp.take_along_axis(xnp.broadcast_to(sums, (*lead, sums.shape[-1])), counts, -1)
    sample = np.arange(len(kv_len), dtype=np.int32)[:, None, None, None]
    slots = np.arange(self.max_kv, dtype=np.int32)
    step = max(1, _COUNTED // max(1, self.max_kv) if xnp is np else self.q_tiles)
    found = []
    for rows in (slice(i, i + step) for i in range(0, self.q_tiles, step)):
      keys = kv_len.reshape(-1)[ids[:, :, rows] + sample * self.kv_tiles]
      found.append(xnp.where(slots < self.kv_counts[:, :, rows, None], keys, 0).sum(-1))
    return xnp.concatenate(found, -1)

  def density(self, n: int | None = None) -> Array:
    """Returns scored valid pairs / n^2 per sample and head, `[b or 1, h or 1]`.

    Args:
      n: by default the valid keys of the buffer. On a packed buffer pass the video's token count:
        coarse pairs count as pairs, coarse tokens do not count as tokens.
    """
    if n is not None:
      return self.pairs() / float(n) ** 2
    keys = self.kv_len.reshape(-1, self.kv_tiles).sum(-1)
    return self.pairs() / (self.q_len().sum(-1) * 1.0 * keys)[:, None]

  # ---- for people --------------------------------------------------------------------------------

  def draw(self, batch: int = 0, head: int = 0, width: int = 64) -> str:
    """Returns a printed picture: a character per tile or group of tiles, darker = more listed."""
    tiles = np.asarray(self.to_tiles())
    tiles = tiles[min(batch, tiles.shape[0] - 1), min(head, tiles.shape[1] - 1)].astype(np.float32)
    step = max(1, -(-max(tiles.shape) // width))
    rows, columns = (-(-size // step) for size in tiles.shape)
    cells = np.pad(tiles, [(0, -size % step) for size in tiles.shape])
    cells = cells.reshape(rows, step, columns, step).mean((1, 3))
    shades = " ░▒▓█"
    lines = ["".join(shades[int(np.ceil(c * (len(shades) - 1)))] for c in row) for row in cells]
    sizes = (
      f"{self.q_tiles} query tiles of {self.block_q} x {self.kv_tiles} key tiles of {self.block_kv}"
    )
    return "\n".join([f"{sizes}, {tiles.mean():.1%} of tiles listed", *lines])

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
    self._check_lists(counts)
    return self

  def _check_lists(self, counts: np.ndarray) -> None:
    """Checks the ids of a concrete table, some rows at a time: copies of a large one do not fit."""
    if self.kv_indices is None:
      return
    ids = np.asarray(self.kv_indices)
    if one_list(ids):  # what every row is a prefix of
      ids = ids[:1, :1, :1]
      counts = counts.max(initial=0).reshape(1, 1, 1)
    slots = np.arange(1, self.max_kv, dtype=np.int32)
    step = max(1, _COUNTED // max(1, self.max_kv * math.prod(ids.shape[:2])))
    for part in (slice(i, i + step) for i in range(0, ids.shape[2], step)):
      some = ids[:, :, part]
      if some.min(initial=0) < 0 or some.max(initial=0) >= self.kv_tiles:
        raise ValueError(
          f"kv_indices must lie in 0..{self.kv_tiles - 1}, padding too, got "
          f"{some.min()}..{some.max()}."
        )
      if ((np.diff(some, axis=-1) <= 0) & (slots < counts[:, :, part, None])).any():
        raise ValueError(
          "kv_indices must be strictly ascending within kv_counts; sort each list and drop doubles."
        )

  def check_if_concrete(self) -> "BlockMask":
    """Checks shapes, and once the values too if they are known; returns the table.

    Arrays that are changed in place afterwards are not looked at again.

    Raises:
      ValueError: as `check`; of a traced table only for what `check_shapes` finds.
    """
    self.check_shapes()
    if all(map(_is_known, (self.kv_indices, self.kv_counts, self.kv_len))):
      _ = self._checked
    return self

  @functools.cached_property
  def _checked(self) -> bool:
    """True, once `check` has found nothing."""
    table = dataclasses.replace(self, transposed=None, launch=None)
    jax.device_get(table).check()
    return True


def _is_known(x: Array | None) -> bool:
  """Returns True if this process can read the values of an array now."""
  if isinstance(x, jax.core.Tracer):
    return False
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def one_list(ids: Array) -> bool:
  """Returns True if all rows of concrete lists are one array in memory, and so prefixes of it."""
  if not isinstance(ids, np.ndarray):
    return False
  lead = zip(ids.strides[:3], ids.shape[:3], strict=True)
  return all(stride == 0 or size == 1 for stride, size in lead)


def check_listed(entries: int, what: str) -> None:
  """Refuses a concrete table of too many entries; building takes several copies of the ids.

  Args:
    entries: query tiles times tiles of the longest list, at most.
    what: whose table, for the message.

  Raises:
    ValueError: above `MOST_LISTED` (0.5 GB of int32 ids).
  """
  if entries > MOST_LISTED:
    raise ValueError(
      f"{what} would list {entries:,} tiles, more than the {MOST_LISTED:,} that a table may hold; "
      "give fewer tokens, larger tiles or a narrower pattern"
    )


def dense_mask(n_q: int, n_kv: int, block_q: int = 128, block_kv: int = 128) -> BlockMask:
  """Returns the table in which everything sees everything; the last key tile may be ragged."""
  kv_tiles = -(-n_kv // block_kv)
  counts = np.full((1, 1, -(-n_q // block_q)), kv_tiles, np.int32)
  kv_len = np.clip(n_kv - np.arange(kv_tiles) * block_kv, 0, block_kv).astype(np.int32)
  return BlockMask(None, counts, kv_len, None, block_q, block_kv)


def from_tiles(tiles: np.ndarray, kv_len: np.ndarray, block_q: int, block_kv: int) -> BlockMask:
  """Returns the table of a concrete bool array `[b or 1, h or 1, q_tiles, kv_tiles]`.

  Dimensions b and h may be missing; `kv_len` is as in `BlockMask`.
  """
  tiles = np.asarray(tiles, bool)
  tiles = tiles[None, None] if tiles.ndim == 2 else tiles
  counts = tiles.sum(-1).astype(np.int32)
  longest = max(1, int(counts.max(initial=1)))
  ids = np.argsort(~tiles, axis=-1, stable=True)[..., :longest].astype(np.int32)
  return pad_lists(ids, counts, np.asarray(kv_len, np.int32), None, block_q, block_kv)


def pad_lists(
  indices: Array, counts: Array, kv_len: Array, kv_bias: Array | None, block_q: int, block_kv: int
) -> BlockMask:
  """Returns a table from lists whose entries behind the count are arbitrary.

  They become the row's last valid id, 0 if there is none. Arguments as in `BlockMask`.
  """
  xnp = array_module(indices, counts)
  last = xnp.take_along_axis(indices, xnp.maximum(counts - 1, 0)[..., None], -1)
  last = xnp.where(counts[..., None] > 0, last, 0)
  listed = np.arange(indices.shape[-1], dtype=np.int32) < counts[..., None]
  indices = xnp.where(listed, indices, last).astype(np.int32)
  return BlockMask(indices, counts, kv_len, kv_bias, block_q, block_kv)


def select(masks: Sequence[BlockMask], choice: Array) -> BlockMask:
  """Returns per sample and head one of several tables over the same buffer: hard routing.

  Args:
    masks: tables with equal block sizes, tile counts and `kv_len` (the first one's is used); lists
      may differ in length.
    choice: int32 `[b or 1, h]`; the result's shapes do not depend on its values.

  Returns:
    A table `[b', h', q_tiles, longest max_kv]`, b' and h' broadcast over choice and masks.

  Raises:
    ValueError: if the tables do not describe the same buffer.
  """
  first = masks[0]
  sizes = [(m.block_q, m.block_kv, m.q_tiles, m.kv_tiles) for m in masks]
  if any(size != sizes[0] for size in sizes):
    raise ValueError(
      "select needs tables over one buffer with equal (block_q, block_kv, q_tiles, kv_tiles), got "
      f"{sizes}; pack them first."
    )
  max_kv = max(m.max_kv for m in masks)
  xnp = array_module(choice, *(m.kv_counts for m in masks), *(m.kv_indices for m in masks))

  def padded(mask):
    filler = ((0, 0),) * 3 + ((0, max_kv - mask.max_kv),)
    return xnp.pad(mask.indices(), filler, mode="edge")

  pick = choice[..., None]
  ids = padded(first)
  counts = first.kv_counts
  for i, mask in enumerate(masks):
    ids = xnp.where(pick[..., None] == i, padded(mask), ids)
    counts = xnp.where(pick == i, mask.kv_counts, counts)
  return BlockMask(ids, counts, first.kv_len, first.kv_bias, first.block_q, first.block_kv)
