"""Sets of rows that linear attention sums together, and the order in which a GPU walks them.

A segment is any set of rows: a frame, a tile, the whole buffer. In tile order a frame is scattered
over the buffer in short runs. `Work` cuts the runs into boxes of 8 to 64 rows, each one copy, and
gathers the boxes of one segment into stages of 64 rows, so that a thread block reads rows of a
single segment, every row once, and nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.table import Array

# Below this there is no denominator: its inverse, squared in the backward, would leave float32.
TINY = 1e-18
STAGE = 64  # rows of a stage: one wgmma
# Stages of a chunk at most (2,048 rows): partial sums are then 6 % of its bytes at d = 128.
# choice: 32.
_MAX_CHUNK_STAGES = 32
# choice: rows of all stages over rows of the buffer, at most. Beyond, XLA costs hardly more.
_MAX_STAGE_ROWS = 2.5
# Rows of a box. A copy begins at a multiple of 8 rows, as the swizzled form in shared memory does.
_BOXES = (64, 32, 16, 8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
  """Stages of 64 rows, and chunks of stages; every buffer row is in a stage, a few are in it twice.

  Chunk c belongs to segment `c // per_segment`; those after the last hold rows of no segment.

  Attributes:
    boxes: int32 `[stages, 64 / box]`, a stage's boxes; box i starts at row `i * box`. What fills up
      a stage repeats its last box: the same results, written twice.
    fresh: float32 `[stages * 64]`, 1 once for each row that counts in its segment's sums, else 0.
    valid: float32 `[stages * 64]`, 1 for the rows of a segment.
    back: int32 `[n]`, a place in the stages of every buffer row.
    start, count: int32 `[chunks]`, first stage and number of stages of each chunk.
    per_segment: static, chunks of each segment.
    mixed: static, whether a box may hold rows of several segments. It is then in stages of each, so
      that results per row must be written in the order of the stages and put back (`back` names
      each row's own segment's stage).
  """

  boxes: Array
  fresh: Array
  valid: Array
  back: Array
  start: Array
  count: Array
  per_segment: int = dataclasses.field(metadata={"static": True})
  mixed: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def box(self) -> int:
    """Rows that are copied at once."""
    return STAGE // self.boxes.shape[1]

  @property
  def rows(self) -> int:
    """Rows of all stages."""
    return self.fresh.shape[0]

  def stage_rows(self, x: jax.Array) -> jax.Array:
    """Puts numbers of buffer rows `[b, h, n]` in the order of the stages, `[b, h, rows]`."""
    rows = (jnp.asarray(self.boxes)[..., None] * self.box + jnp.arange(self.box)).reshape(-1)
    return jnp.take(x, rows, axis=2, mode="clip")

  def buffer_rows(self, x: jax.Array) -> jax.Array:
    """Puts numbers in the order of the stages `[b, h, rows]` back, `[b, h, n]`."""
    return jnp.take(x, jnp.asarray(self.back), axis=2, mode="clip")

  @classmethod
  def of_ids(cls, ids: np.ndarray, segments: int) -> "Work | None":
    """Returns the work of segments that are given row by row.

    Boxes are as large as they can be without mixing segments; else they have 8 rows.

    Args:
      ids: int `[n]`, the segment of every buffer row, -1 for no segment.

    Returns:
      None for a buffer whose rows are no multiple of 8, and for runs so short that stages would
      hold more than `_MAX_STAGE_ROWS` times its rows.
    """
    if len(ids) % _BOXES[-1]:
      return None
    for size in _BOXES:
      mixed = len(ids) % size != 0 or _mixed(ids.reshape(-1, size))
      if not mixed:
        break
    holds = np.sort(ids.reshape(-1, size), axis=1)
    new = np.diff(holds, axis=1, prepend=-2) != 0  # each segment of a box once
    # Rows of no segment count only where there is nothing else.
    new[:, :-1] &= (holds[:, :-1] >= 0) | (holds[:, -1:] < 0)
    box = np.nonzero(new)[0]
    owner = holds[new]
    order, count = _pack(owner, segments, STAGE // size)
    if order.size * size > _MAX_STAGE_ROWS * len(ids) + STAGE * segments:
      return None
    again = np.zeros(order.shape, bool)
    again[:, 1:] = order[:, 1:] == order[:, :-1]
    rows = (box[order][..., None] * size + np.arange(size)).reshape(-1)
    valid = (ids[rows] >= 0) & (ids[rows] == np.repeat(owner[order].reshape(-1), size))
    back = np.zeros(len(ids), np.int32)
    # A row of no segment may be anywhere, the others are in their own segment's stage.
    for which in (~valid, valid):
      back[rows[which][::-1]] = np.flatnonzero(which)[::-1]
    fresh = valid & ~np.repeat(again.reshape(-1), size)
    per_segment = max(1, -(-int(count[:segments].max()) // _MAX_CHUNK_STAGES))
    return cls(
      box[order].astype(np.int32),
      fresh.astype(np.float32),
      valid.astype(np.float32),
      back,
      *_chunks(count, per_segment, segments),
      per_segment,
      mixed,
    )

  @classmethod
  def of_tiles(cls, kv_len: Array, block: int) -> "Work | None":
    """Returns the work of a segment per tile; None if tiles are no multiple of 64 rows."""
    if block % STAGE:
      return None
    tiles, stages = kv_len.shape[0], block // STAGE
    xp = np if isinstance(kv_len, np.ndarray) else jnp
    valid = (xp.arange(block) < xp.asarray(kv_len)[:, None]).reshape(-1).astype(xp.float32)
    per_segment, number = -(-stages // _MAX_CHUNK_STAGES), np.arange(tiles * block, dtype=np.int32)
    chunks = _chunks(np.r_[np.full(tiles, stages), 0], per_segment, tiles)
    return cls(number[: tiles * stages, None], valid, valid, number, *chunks, per_segment)


def _mixed(boxes) -> bool:
  """Returns True if any row of `[boxes, size]` ids holds two segments."""
  return not ((boxes == boxes.max(1, keepdims=True)) | (boxes < 0)).all()


def _pack(owner, segments: int, parts: int):
  """Returns boxes `[stages, parts]` by segment (`owner`, -1 last), and stages `[segments + 1]`."""
  owner = np.where(owner < 0, segments, owner)
  order = np.argsort(owner, kind="stable")
  boxed = np.bincount(owner, minlength=segments + 1)
  count = -(-boxed // parts)
  of = np.repeat(np.arange(segments + 1), count)
  place = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
  within = np.minimum(place[:, None] * parts + np.arange(parts), boxed[of][:, None] - 1)
  return order[(np.cumsum(boxed) - boxed)[of][:, None] + within], count


def _chunks(count, per_segment: int, segments: int):
  """Returns start and count of nearly equal chunks; rows of no segment have full chunks."""
  begin = np.cumsum(count) - count
  cuts = begin[:segments, None] + np.arange(per_segment + 1) * count[:segments, None] // per_segment
  rest = np.arange(begin[segments], begin[segments] + count[segments], _MAX_CHUNK_STAGES)
  start = np.r_[cuts[:, :-1].reshape(-1), rest]
  last = np.minimum(begin[segments] + count[segments] - rest, _MAX_CHUNK_STAGES)
  length = np.r_[np.diff(cuts).reshape(-1), last]
  return start.astype(np.int32), length.astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
  """Rows of a buffer that are summed together; a row is in one segment or in none.

  Attributes:
    rows: int32 `[segments, size]`, buffer rows of each segment, valid ones first; None: the buffer
      itself, in order, `segments * size` rows.
    place: int32 `[n]`, each row's place in `rows` (out of bounds: in none); None where `rows` is.
    length: int32 `[segments]`, rows of each segment, 0..size.
    work: how a GPU walks them; None where it cannot.
    size: static, rows of the longest segment. Memory is `segments * size * d`: near n where
      segments are equal.
  """

  rows: Array | None
  place: Array | None
  length: Array
  work: Work | None
  size: int = dataclasses.field(metadata={"static": True})

  @classmethod
  def of_ids(cls, ids: np.ndarray) -> "Segments":
    """Returns the segments of int `[n]` ids of all rows, -1 for none; ids left out are empty."""
    ids = np.asarray(ids)
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] >= 0].astype(np.int32)
    length = np.bincount(ids[order], minlength=1).astype(np.int32)
    size = max(1, int(length.max()))
    column = np.arange(len(order)) - np.repeat(np.cumsum(length) - length, length)
    at = (ids[order] * size + column).astype(np.int32)
    rows = np.zeros(len(length) * size, np.int32)
    rows[at] = order
    place = np.full(len(ids), len(length) * size, np.int32)
    place[order] = at
    return cls(rows.reshape(-1, size), place, length, Work.of_ids(ids, len(length)), size)

  @classmethod
  def of_tiles(cls, kv_len: Array, block: int) -> "Segments":
    """Returns one segment per tile of `block` rows, whose first `kv_len` `[tiles]` are valid."""
    return cls(None, None, kv_len, Work.of_tiles(kv_len, block), block)

  @classmethod
  def whole(cls, n: int) -> "Segments":
    """Returns one segment of all n rows."""
    return cls(None, None, np.full(1, n, np.int32), Work.of_ids(np.zeros(n, np.int32), 1), n)

  @property
  def count(self) -> int:
    """Segments, empty ones too."""
    return self.length.shape[0]

  @property
  def buffer(self) -> int:
    """Buffer rows."""
    return self.count * self.size if self.place is None else self.place.shape[0]

  def gather(self, x: jax.Array) -> jax.Array:
    """Returns `[b, n, h, d]` as `[b, segments, h, size, d]`, zeros where there is no row."""
    if self.rows is not None:
      x = jnp.take(x, jnp.asarray(self.rows).reshape(-1), axis=1, mode="clip")
    x = x.reshape(x.shape[0], -1, self.size, *x.shape[2:]).swapaxes(2, 3)
    return jnp.where(self.valid(), x, 0)

  def scatter(self, x: jax.Array, fill: float = 0) -> jax.Array:
    """Inverts `gather`, with `fill` in rows without a segment."""
    x = jnp.where(self.valid(), x, fill).swapaxes(2, 3)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if self.place is None:
      return x
    return jnp.take(x, self.place, axis=1, mode="fill", fill_value=fill)

  def valid(self) -> jax.Array:
    """Returns bool `[segments, 1, size, 1]`: True where a gathered row is one of the segment's."""
    return (jnp.arange(self.size) < jnp.asarray(self.length)[:, None])[:, None, :, None]
