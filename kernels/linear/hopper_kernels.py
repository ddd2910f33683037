"""The four Hopper kernels of linear attention: segment sums, reading them, both sides' gradients.

All are memory-bound and alike: a thread block is one warpgroup that walks the stages of one chunk
of one segment (`kernels.linear.segments.Work`), with a ring of stages whose copies run ahead.
Blocks of heads that are not linear leave at once. Results leave through the slot that their rows
came in (dV through its own); a slot is filled again one stage later, when every warp has passed it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper.launch import launch, streaming_cost
from freqformer.kernels.hopper.products import (
  PER_COLUMN,
  PER_ROW,
  over_columns,
  over_rows,
  tiles_type,
)
from freqformer.kernels.hopper.tile_walk import broadcast_index, place_of
from freqformer.kernels.linear.segments import STAGE, TINY, Work
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Slots of the ring. At d = 128 two blocks share a multiprocessor, except of the last kernel.
_SLOTS = {"linear_states": 3, "linear_read": 3, "linear_dq": 2, "linear_dkv": 3}
# Products of `[d, d]` with each row, of all heads: only the device may know which take part.
_PRODUCTS = {"linear_states": 1, "linear_read": 1, "linear_dq": 1, "linear_dkv": 2}
_WARPS = 4  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class LinearCall:
  """Facts that the kernels of one call share; `feature_map` is a name of `FEATURE_MAPS`.

  Attributes:
    heads: int32 `[b or 1, h or 1]`, nonzero where a head takes part; None: all.
  """

  work: Work
  heads: jax.Array | None
  feature_map: str

  @property
  def chunks(self) -> int:
    """Chunks of a head."""
    return len(self.work.start)

  def rows_type(self, x) -> jax.ShapeDtypeStruct:
    """Returns the type of results like `x` `[b, n, h, d]`, in stage order where boxes are mixed."""
    b, n, *rest = x.shape
    return jax.ShapeDtypeStruct((b, self.work.rows if self.work.mixed else n, *rest), x.dtype)


# ---- feature maps in registers -------------------------------------------------------------------


def _phi(name: str, x):
  """Returns the features of float32 rows `[64, d]`."""
  if name == "relu":
    return jnp.maximum(x, 0.0)
  if name == "elu":
    return jnp.where(x > 0, x + 1, jnp.exp(x))
  e = jnp.exp(x - over_columns(x.max(axis=1), x.shape[1]))
  return e * over_columns(1 / e.sum(axis=1), x.shape[1])


def _phi_back(name: str, x, p, g):
  """Returns the gradient of rows `x` from the gradient `g` of their features `p`."""
  if name == "relu":
    return jnp.where(x > 0, g, 0.0)
  if name == "elu":
    return g * jnp.where(x > 0, 1.0, p)
  return p * (g - over_columns((p * g).sum(axis=1), x.shape[1]))


def _phi_parts(name: str, ring):
  """Yields `(columns, features [64, 64])`; two accumulators leave no registers for more."""

  def load(columns):
    return ring.at[:, columns][...].astype(jnp.float32)

  columns = [pl.ds(i, STAGE) for i in range(0, ring.shape[1], STAGE)]
  if name != "softmax":
    yield from ((part, _phi(name, load(part))) for part in columns)
    return
  top = functools.reduce(jnp.maximum, [load(part).max(axis=1) for part in columns])

  def e(part):
    return jnp.exp(load(part) - over_columns(top, STAGE))

  inverse = 1 / sum(e(part).sum(axis=1) for part in columns)
  yield from ((part, e(part) * over_columns(inverse, STAGE)) for part in columns)


# ---- what the kernels share ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stages:
  """The stages of one thread block's chunk, copied ahead of their use.

  Attributes:
    sample, head: of the thread block.
    begin, count: first stage of the chunk, and how many.
    table: reference to `Work.boxes`.
    rows_gm, numbers_gm: global `[b, n, h, d]` and `[b or 1, h or 1, rows]` that come in stages.
    rings: slots of both, `[slots, 64, d]` and `[slots, 64]`.
    full: a barrier per slot.
  """

  sample: Any
  head: Any
  begin: Any
  count: Any
  table: Any
  work: Work
  rows_gm: Sequence
  numbers_gm: Sequence
  rings: Sequence
  full: Any

  @property
  def slots(self) -> int:
    return self.rings[0].shape[0]

  def slot(self, s):
    return lax.rem(s, jnp.int32(self.slots))

  def wait(self, slot):
    plgpu.barrier_wait(self.full.at[slot])

  def rows(self, s):
    """Returns the rows of stage `s` in the order of the stages."""
    return pl.ds((self.begin + s) * STAGE, STAGE)

  def boxes(self, s) -> list[tuple]:
    """Returns `(rows of the buffer, rows of the stage)` of each box of stage `s`."""
    box = self.work.box

    def row(i):
      return self.table[self.begin + s, i] * box

    return [(pl.ds(row(i), box), pl.ds(i * box, box)) for i in range(self.table.shape[1])]

  def fetch(self, s):
    slot = self.slot(s)
    full = self.full.at[slot]
    rows_sm = self.rings[: len(self.rows_gm)]
    for rows, lanes in self.boxes(s):
      for source, ring in zip(self.rows_gm, rows_sm, strict=True):
        place = source.at[self.sample, rows, self.head]
        plgpu.copy_gmem_to_smem(place, ring.at[slot, lanes], full)
    for source, ring in zip(self.numbers_gm, self.rings[len(rows_sm) :], strict=True):
      lead = broadcast_index(source, self.sample, self.head)
      plgpu.copy_gmem_to_smem(source.at[(*lead, self.rows(s))], ring.at[slot], full)

  def start(self):
    for s in range(self.slots):
      pl.when(s < self.count)(functools.partial(self.fetch, jnp.int32(s)))

  def refill(self, s):
    """Fills the slot of the stage before `s` again; a barrier of all warps has come before."""
    pl.when(jnp.logical_and(s >= 1, s - 1 + self.slots < self.count))(
      lambda: self.fetch(s - 1 + self.slots)
    )

  def store(self, s, shared, target):
    """Starts copies of a stage's `[64, d]` to its rows of `target` (mixed: in stage order)."""
    boxes = [(self.rows(s), pl.ds(0, STAGE))] if self.work.mixed else self.boxes(s)
    for rows, lanes in boxes:
      plgpu.copy_smem_to_gmem(shared.at[lanes], target.at[self.sample, rows, self.head])


class _Sums(NamedTuple):
  """A segment's sums in shared memory: `[d, d]`, float32 `[d]`, and the barrier of both."""

  state: Any
  total: Any
  arrived: Any

  @classmethod
  def types(cls, d: int, dtype) -> "_Sums":
    total = plgpu.SMEM((d,), jnp.float32)
    return cls(tiles_type(d, d, dtype=dtype), total, plgpu.Barrier(num_arrivals=2))

  def load(self, call: LinearCall, stages: _Stages, chunk, state_gm, total_gm):
    """Copies the sums that a chunk's segment reads, if the chunk has any rows."""
    last = total_gm.shape[2] - 1
    segment = jnp.minimum(lax.div(chunk, jnp.int32(call.work.per_segment)), last)

    @pl.when(stages.count > 0)
    def _load():
      for source, target in ((state_gm, self.state), (total_gm, self.total)):
        place = source.at[stages.sample, stages.head, segment]
        plgpu.copy_gmem_to_smem(place, target, self.arrived)
      plgpu.barrier_wait(self.arrived)


def _numbers(ring, slot):
  """Returns a stage's numbers, float32 `[64]`, one per row."""
  return plgpu.load(ring.at[slot], layout=PER_ROW)


def _rows(ring, slot):
  return ring.at[slot][...].astype(jnp.float32)


def _product(a, b):
  """Returns `a b` of operands `[64, k]` and `[k, d]` in shared memory."""

  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC((STAGE, b.shape[1]), jnp.float32))


def _launch(
  body: Callable,
  call: LinearCall,
  out_type: Sequence,
  *,
  rows: Sequence,
  numbers: Sequence,
  whole: Sequence = (),
  targets: Sequence = (),
  scratch: Sequence = (),
  chunks: int | None = None,
  reduction_bytes: int = 0,
) -> list:
  """Runs `body(stages, chunk, rings, whole, results, scratch)` on samples x heads x chunks.

  `rows` `[b, n, h, d]` and `numbers` `[b or 1, h or 1, rows]` come in stages, `whole` does not.
  """
  b, _, h, d = rows[0].shape
  work = call.work
  chunks = call.chunks if chunks is None else chunks
  name = body.__name__
  slots = _SLOTS[name]
  tables = (*map(jnp.asarray, (work.boxes, work.start, work.count)), call.heads)

  def kernel(tables, rows_gm, numbers_gm, whole, targets, *refs):
    boxes, start, count, heads = tables
    *results, full, rings, scratch = refs
    sample, head, chunk = place_of(lax.axis_index("block"), chunks, h)

    def run():
      part = (start[chunk], count[chunk])
      stages = _Stages(sample, head, *part, boxes, work, rows_gm, numbers_gm, rings, full)
      body(stages, chunk, rings, whole, (*targets, *results), scratch)

    if heads is None:
      run()
    else:
      pl.when(heads[broadcast_index(heads, sample, head)] > 0)(run)

  kernel.__name__ = name
  rings = [tiles_type(slots, STAGE, d, dtype=rows[0].dtype)] * len(rows)
  rings += [plgpu.SMEM((slots, STAGE), jnp.float32)] * len(numbers)
  arrivals = len(rows) * work.boxes.shape[1] + len(numbers)
  full = plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)
  operands = (tables, rows, numbers, whole, targets)
  flops = _PRODUCTS[name] * 2 * b * h * work.rows * d * d
  return launch(
    kernel,
    operands,
    out_type,
    [full, rings, scratch],
    blocks=b * h * chunks,
    cost=streaming_cost(operands, out_type, flops),
    reduction_bytes=reduction_bytes,
  )


# ---- the kernels ---------------------------------------------------------------------------------


def states(call: LinearCall, x, y, weights, others, segments: int, dtype):
  """Computes the sums over a chunk: `phi(x)^T diag(weights) y` and `phi(x)^T others`.

  Args:
    x, y: bf16 `[b, n, h, d]`.
    weights: float32 `[b or 1, h or 1, rows]`, rows in the order of the stages.
    others: like `weights`; None: the same, and then summed as the product's operand is rounded.
    segments: number of segments.
    dtype: of the first result.

  Returns:
    `[b, h, chunks, d, d]` and float32 `[b, h, chunks, d]`, of the segments' chunks.
  """
  b, _, h, d = x.shape
  chunks = segments * call.work.per_segment
  low = x.dtype

  def linear_states(stages, chunk, rings, whole, results, scratch):
    x_sm, y_sm, weights_sm, *others_sm = rings
    state_gm, total_gm = results
    (total_sm,) = scratch

    def odd(s):
      return lax.rem(s, jnp.int32(2))

    stages.start()
    total_sm.at[1][...] = plgpu.layout_cast(jnp.zeros((d,), jnp.float32), PER_COLUMN)
    plgpu.commit_smem()

    def run(*accs):
      @pl.loop(0, stages.count)
      def _stage(s):
        slot = stages.slot(s)
        stages.wait(slot)
        weights = _numbers(weights_sm, slot)
        others = _numbers(others_sm[0], slot) if others_sm else None
        for columns, p in _phi_parts(call.feature_map, x_sm.at[slot]):
          weighted = (p * over_columns(weights, STAGE)).astype(low)
          counted = p * over_columns(others, STAGE) if others_sm else weighted.astype(jnp.float32)
          # In shared memory for want of registers, never in place: lanes hold each other's columns.
          before = plgpu.load(total_sm.at[odd(s + 1), columns], layout=PER_COLUMN)
          total_sm.at[odd(s), columns][...] = before + counted.sum(axis=0)
          x_sm.at[slot, :, columns][...] = weighted
        plgpu.wgmma_wait(0)  # for the products of the stage before
        plgpu.commit_smem()
        for i, acc in enumerate(accs):
          columns = x_sm.at[slot, :, pl.ds(i * STAGE, STAGE)]
          plgpu.wgmma(acc, columns.transpose((1, 0)), y_sm.at[slot])
        stages.refill(s)

      return [acc[...] for acc in accs]

    found = pl.run_scoped(run, *[plgpu.ACC((STAGE, d), jnp.float32)] * (d // STAGE))
    plgpu.commit_smem()
    total = total_sm.at[odd(stages.count + 1)]
    plgpu.copy_smem_to_gmem(total, total_gm.at[stages.sample, stages.head, chunk])
    for i, acc in enumerate(found):
      part = acc.astype(dtype)
      row = ((stages.sample * h + stages.head) * chunks + chunk) * d + i * STAGE
      state_gm.at[pl.ds(row, STAGE)][...] = part
    plgpu.wait_smem_to_gmem(0)

  out_type = [
    # Straight from registers, and flat: an array that is stored that way has a single index.
    jax.ShapeDtypeStruct((b * h * chunks * d, d), dtype),
    jax.ShapeDtypeStruct((b, h, chunks, d), jnp.float32),
  ]
  state, total = _launch(
    linear_states,
    call,
    out_type,
    rows=[x, y],
    numbers=[weights] if others is None else [weights, others],
    scratch=[plgpu.SMEM((2, d), jnp.float32)],
    chunks=chunks,
    reduction_bytes=_WARPS * 4 * d,  # sums over rows cross the warps: a float32 per warp and column
  )
  return state.reshape(b, h, chunks, d, d), total


def read(call: LinearCall, q, state, total, valid, into):
  """Computes what queries read of their segment's sums.

  Args:
    q: bf16 `[b, n, h, d]`.
    state, total: bf16 `[b, h, segments, d, d]` and float32 `[b, h, segments, d]`.
    valid: float32 `[1, 1, rows]`, 0 for rows that read nothing.
    into: None, or `[b, n, h, d]`, whose rows of the heads that take part are overwritten, in place
      where nobody else reads it. Must be None where boxes are mixed.

  Returns:
    out `[b, n, h, d]` (mixed boxes: `[b, rows, h, d]`), and log_den float32 `[b, h, rows]`, which
    is not written where a head takes no part.
  """
  b, _, h, d = q.shape
  low = q.dtype

  def linear_read(stages, chunk, rings, whole, results, scratch):
    q_sm, valid_sm = rings
    out_gm, log_gm = results
    (sums,) = scratch
    stages.start()
    sums.load(call, stages, chunk, *whole)
    total = plgpu.load(sums.total, layout=PER_COLUMN)

    @pl.loop(0, stages.count)
    def _stage(s):
      slot = stages.slot(s)
      stages.wait(slot)
      p = _phi(call.feature_map, _rows(q_sm, slot)).astype(low)
      q_sm.at[slot][...] = p
      den = (p.astype(jnp.float32) * over_rows(total)).sum(axis=1) * _numbers(valid_sm, slot)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.commit_smem()
      stages.refill(s)
      acc = _product(q_sm.at[slot], sums.state)
      some = den > TINY
      inverse = jnp.where(some, 1 / jnp.where(some, den, 1.0), 0.0)
      plgpu.commit_smem()  # every warp has read its operands: their place may be written
      q_sm.at[slot][...] = (acc * over_columns(inverse, d)).astype(low)
      log_den = jnp.where(some, jnp.log(jnp.where(some, den, 1.0)), -jnp.inf)
      first = (stages.sample * h + stages.head) * call.work.rows + (stages.begin + s) * STAGE
      log_gm.at[pl.ds(first, STAGE)][...] = log_den
      plgpu.commit_smem()
      stages.store(s, q_sm.at[slot], out_gm)

    plgpu.wait_smem_to_gmem(0)

  log_type = jax.ShapeDtypeStruct((b * h * call.work.rows,), jnp.float32)

  def run(out_type, targets=()):
    return _launch(
      linear_read,
      call,
      out_type,
      rows=[q],
      numbers=[valid],
      whole=[state, total],
      targets=targets,
      scratch=[_Sums.types(d, low)],
    )

  def write(targets):
    run([], targets)

  if into is None:
    out, log_den = run([call.rows_type(q), log_type])
  else:
    # An array that a kernel writes to and that is not its result is an operand by reference.
    out, log_den = pl.run_state(write)((into, lax.empty(log_type.shape, log_type.dtype)))
  return out, log_den.reshape(b, h, -1)


def dq(call: LinearCall, q, d_out, inverse, d_den, state, total):
  """Returns the gradient of the queries, in the form of `read`'s out.

  Args:
    q, d_out: bf16 `[b, n, h, d]`.
    inverse, d_den: float32 `[b, h, rows]`, 1 / denominator and the denominator's gradient; 0 for
      rows that read nothing.
    state, total: as in `read`.
  """
  d = q.shape[3]
  low = q.dtype

  def linear_dq(stages, chunk, rings, whole, results, scratch):
    q_sm, do_sm, inverse_sm, den_sm = rings
    (dq_gm,) = results
    (sums,) = scratch
    stages.start()
    sums.load(call, stages, chunk, *whole)
    total = plgpu.load(sums.total, layout=PER_COLUMN)

    @pl.loop(0, stages.count)
    def _stage(s):
      slot = stages.slot(s)
      stages.wait(slot)
      acc = _product(do_sm.at[slot], sums.state.transpose((1, 0)))
      g = acc * over_columns(_numbers(inverse_sm, slot), d)
      g = g + over_columns(_numbers(den_sm, slot), d) * over_rows(total)
      x = _rows(q_sm, slot)
      q_sm.at[slot][...] = _phi_back(call.feature_map, x, _phi(call.feature_map, x), g).astype(low)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.commit_smem()
      stages.refill(s)
      stages.store(s, q_sm.at[slot], dq_gm)

    plgpu.wait_smem_to_gmem(0)

  (found,) = _launch(
    linear_dq,
    call,
    [call.rows_type(q)],
    rows=[q, d_out],
    numbers=[inverse, d_den],
    whole=[state, total],
    scratch=[_Sums.types(d, low)],
  )
  return found


def dkv(call: LinearCall, k, v, valid, d_state, d_total):
  """Returns the gradients of keys and values, in the form of `read`'s out; 0 in rows of no segment.

  Args:
    k, v: bf16 `[b, n, h, d]`.
    valid: as in `read`.
    d_state, d_total: gradients of `read`'s, bf16 and float32.
  """
  d = k.shape[3]
  low = k.dtype

  def linear_dkv(stages, chunk, rings, whole, results, scratch):
    k_sm, v_sm, valid_sm = rings
    dk_gm, dv_gm = results
    sums, p_sm = scratch
    stages.start()
    sums.load(call, stages, chunk, *whole)

    @pl.loop(0, stages.count)
    def _stage(s):
      slot = stages.slot(s)
      stages.wait(slot)
      p = _phi(call.feature_map, _rows(k_sm, slot)).astype(low)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      p_sm[...] = p
      plgpu.commit_smem()
      stages.refill(s)
      seen = over_columns(_numbers(valid_sm, slot), d)
      dv = _product(p_sm, sums.state)
      plgpu.commit_smem()  # every warp has read its operands: their place may be written
      p_sm[...] = (dv * seen).astype(low)
      g = _product(v_sm.at[slot], sums.state.transpose((1, 0)))
      total = plgpu.load(sums.total, layout=PER_COLUMN)
      # Rows and features once more: there are no registers to keep them during the products.
      x = _rows(k_sm, slot)
      g = _phi_back(call.feature_map, x, _phi(call.feature_map, x), g + over_rows(total))
      k_sm.at[slot][...] = (g * seen).astype(low)
      plgpu.commit_smem()
      stages.store(s, k_sm.at[slot], dk_gm)
      stages.store(s, p_sm, dv_gm)

    plgpu.wait_smem_to_gmem(0)

  return _launch(
    linear_dkv,
    call,
    [call.rows_type(k)] * 2,
    rows=[k, v],
    numbers=[valid],
    whole=[d_state, d_total],
    scratch=[_Sums.types(d, low), tiles_type(STAGE, d, dtype=low)],
  )
