"""The four Hopper kernels of linear attention: sums of a segment, reading them, and the gradients of both sides.

All are memory-bound and alike: a thread block is one warpgroup that walks the stages of one chunk of one segment
(`kernels.linear.segments.Work`), with a ring of stages whose copies run ahead. Blocks of heads that are not linear leave at once.
Results leave through the slot that their rows came in (dV through a place of its own); a slot is filled again one stage later,
when every warp has passed it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch, streaming_cost
from freqformer.kernels.hopper.parts import LAYOUT
from freqformer.kernels.linear.segments import STAGE, TINY, Work
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Stages in the ring. At d = 128 two thread blocks of the first three share a multiprocessor, the last has it to itself.
_STAGES = {"linear_states": 3, "linear_read": 3, "linear_dq": 2, "linear_dkv": 3}
# Products of `[d, d]` matrices with each row. Costs count all heads: which of them take part may be known only on the device.
_PRODUCTS = {"linear_states": 1, "linear_read": 1, "linear_dq": 1, "linear_dkv": 2}


@dataclasses.dataclass(frozen=True)
class Walk:
  """What all four kernels walk over.

  Attributes:
    work: the stages and chunks.
    heads: int32 `[b or 1, h or 1]`, nonzero where a head takes part; None: all.
    feature_map: a name of `kernels.linear.api.FEATURE_MAPS`.
  """

  work: Work
  heads: jax.Array | None
  feature_map: str


# ---- feature maps in registers ---------------------------------------------------------------------------------------


def _phi(name: str, x):
  """Features of float32 rows `[64, d]`."""
  if name == "relu":
    return jnp.maximum(x, 0.0)
  if name == "elu":
    return jnp.where(x > 0, x + 1, jnp.exp(x))
  e = jnp.exp(x - parts.over_columns(x.max(axis=1), x.shape[1]))
  return e * parts.over_columns(1 / e.sum(axis=1), x.shape[1])


def _phi_back(name: str, x, p, g):
  """Gradient of the rows from that of their features p."""
  if name == "relu":
    return jnp.where(x > 0, g, 0.0)
  if name == "elu":
    return g * jnp.where(x > 0, 1.0, p)
  return p * (g - parts.over_columns((p * g).sum(axis=1), x.shape[1]))


def _phi_parts(name: str, ring):
  """Features of a stage's rows, 64 columns at a time: `(columns, [64, 64])`. Two accumulators leave no more registers."""

  def load(columns):
    return ring.at[:, columns][...].astype(jnp.float32)

  columns = [pl.ds(i, STAGE) for i in range(0, ring.shape[1], STAGE)]
  if name != "softmax":
    yield from ((part, _phi(name, load(part))) for part in columns)
    return
  top = functools.reduce(jnp.maximum, [load(part).max(axis=1) for part in columns])

  def e(part):
    return jnp.exp(load(part) - parts.over_columns(top, STAGE))

  inverse = 1 / sum(e(part).sum(axis=1) for part in columns)
  yield from ((part, e(part) * parts.over_columns(inverse, STAGE)) for part in columns)


# ---- what the kernels share ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ring:
  """Copies of one block's stages, ahead of their use.

  Attributes:
    place: sample, head.
    begin, count: first stage and number of stages of the chunk.
    table: reference to `Work.boxes`; box: rows of a copy; mixed: of `Work`.
    boxed: `(global rows [b, n, h, d], ring [slots, 64, d])`; vectors: `(global numbers [b or 1, h or 1, rows], ring)`.
    full: barriers, one per slot.
  """

  place: tuple
  begin: jax.Array
  count: jax.Array
  table: object
  box: int
  mixed: bool
  boxed: tuple
  vectors: tuple
  full: object

  @property
  def slots(self) -> int:
    return self.boxed[0][1].shape[0]

  def slot(self, s):
    return lax.rem(s, jnp.int32(self.slots))

  def boxes(self, s):
    """`(rows of the buffer, rows of the stage)` of each box."""

    def row(i):
      return self.table[self.begin + s, i] * self.box

    return [
      (pl.ds(row(i), self.box), pl.ds(i * self.box, self.box)) for i in range(self.table.shape[1])
    ]

  def fetch(self, s):
    """Starts the copies of stage s."""
    (sample, head), slot = self.place, self.slot(s)
    for rows, lanes in self.boxes(s):
      for source, ring in self.boxed:
        plgpu.copy_gmem_to_smem(
          source.at[sample, rows, head], ring.at[slot, lanes], self.full.at[slot]
        )
    for source, ring in self.vectors:
      numbers = source.at[(*parts.at(source, sample, head), self.rows(s))]
      plgpu.copy_gmem_to_smem(numbers, ring.at[slot], self.full.at[slot])

  def store(self, s, shared, target):
    """Starts the copies of a stage's rows `[64, d]` to where they belong, or in the order of the stages."""
    sample, head = self.place
    for rows, lanes in [(self.rows(s), pl.ds(0, STAGE))] if self.mixed else self.boxes(s):
      plgpu.copy_smem_to_gmem(shared.at[lanes], target.at[sample, rows, head])

  def rows(self, s):
    """The stage's rows in the order of the stages."""
    return pl.ds((self.begin + s) * STAGE, STAGE)

  def start(self):
    for s in range(self.slots):
      pl.when(s < self.count)(functools.partial(self.fetch, jnp.int32(s)))

  def refill(self, s):
    """In stage s, behind a barrier of all warps: the slot of the stage before is free."""
    pl.when(jnp.logical_and(s >= 1, s - 1 + self.slots < self.count))(
      lambda: self.fetch(s - 1 + self.slots)
    )


def _numbers(ring, slot):
  """float32 `[64]`, one per row."""
  return plgpu.load(ring.at[slot], layout=LAYOUT.reduce(1))


def _rows(ring, slot):
  return ring.at[slot][...].astype(jnp.float32)


def _products(*pairs):
  """Products of shared-memory operands, in flight together."""

  def run(*accs):
    for acc, (a, b) in zip(accs, pairs, strict=True):
      plgpu.wgmma(acc, a, b)
    return [acc[...] for acc in accs]

  return pl.run_scoped(run, *(plgpu.ACC((STAGE, b.shape[1]), jnp.float32) for _, b in pairs))


def _launch(body, walk: Walk, operands, counts, out_type, scratch=()):
  """Runs a kernel on a grid of samples x heads x chunks.

  Args:
    body: `(ring, chunk, *rest)` with references to operands, results, the rings' slots and `scratch` as rest.
    operands: first the rows `[b, n, h, d]` that come in stages, then numbers per row, then anything.
    counts: how many operands are rows, how many are numbers, and the chunks of a head.
  """
  (b, _, h, d), (boxed, vectors, chunks) = operands[0].shape, counts
  work, slots, moved = walk.work, _STAGES[body.__name__], boxed + vectors
  tables = [jnp.asarray(x) for x in (work.boxes, work.start, work.count)] + (
    [] if walk.heads is None else [walk.heads]
  )
  rings = [parts.tiles_type(slots, STAGE, d, dtype=operands[0].dtype)] * boxed
  rings += [plgpu.SMEM((slots, STAGE), jnp.float32)] * vectors
  arrivals = boxed * work.boxes.shape[1] + vectors

  def kernel(*refs):
    (boxes_gm, start_gm, count_gm, *heads_gm), (full, *rest) = (
      refs[: len(tables)],
      refs[len(tables) + results :],
    )
    program = lax.axis_index("block")
    chunk, pair = lax.rem(program, jnp.int32(chunks)), lax.div(program, jnp.int32(chunks))
    sample, head = lax.div(pair, jnp.int32(h)), lax.rem(pair, jnp.int32(h))
    arrays = refs[len(tables) : len(tables) + results]
    moves = tuple(zip(arrays[:moved], rest[:moved], strict=True))

    def run():
      place = ((sample, head), start_gm[chunk], count_gm[chunk], boxes_gm, work.box, work.mixed)
      body(_Ring(*place, moves[:boxed], moves[boxed:], full), chunk, *arrays, *rest)

    if heads_gm:
      pl.when(heads_gm[0][parts.at(heads_gm[0], sample, head)] > 0)(run)
    else:
      run()

  kernel.__name__ = body.__name__
  results = len(operands) + len(out_type)
  scratch = [plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots), *rings, *scratch]
  cost = streaming_cost(
    (tables, operands), out_type, _PRODUCTS[body.__name__] * 2 * b * h * work.rows * d * d
  )
  # Sums over rows cross the warps, in `states` alone: a float32 per warp and column.
  crossing = 16 * d * (body.__name__ == "linear_states")
  operands = (*tables, *operands)
  return launch(
    kernel, operands, out_type, scratch, blocks=b * h * chunks, cost=cost, reduction_bytes=crossing
  )


def _rows_type(walk: Walk, x):
  """Of results like `x` `[b, n, h, d]`: in the order of the stages where boxes are mixed."""
  b, n, *rest = x.shape
  return jax.ShapeDtypeStruct((b, walk.work.rows if walk.work.mixed else n, *rest), x.dtype)


def _segment(walk: Walk, chunk, segments: int):
  """Whose sums a chunk reads; rows of no segment read the last one's and are 0 whatever they are."""
  return jnp.minimum(lax.div(chunk, jnp.int32(walk.work.per_segment)), segments - 1)


def _load_sums(ring, segment, state, total, full):
  """A segment's sums into shared memory, if the chunk has any rows; `state` and `total` are `(global, shared)`."""

  @pl.when(ring.count > 0)
  def _load():
    for source, target in (state, total):
      plgpu.copy_gmem_to_smem(source.at[(*ring.place, segment)], target, full)
    plgpu.barrier_wait(full)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def states(walk: Walk, x, y, weights, others, segments: int, dtype):
  """Sums over a chunk: `phi(x)^T diag(weights) y` and `phi(x)^T others`.

  Args:
    x, y: `[b, n, h, d]` bf16.
    weights: float32 `[b or 1, h or 1, rows]`, rows in the order of the stages.
    others: like `weights`; None: the same, and then summed as the product's operand is rounded.
    dtype: of the first result.

  Returns:
    `[b, h, chunks, d, d]` and float32 `[b, h, chunks, d]`, of the segments' chunks.
  """
  (b, _, h, d), chunks, low = x.shape, segments * walk.work.per_segment, x.dtype

  def linear_states(ring, chunk, *refs):
    state_gm, total_gm, x_sm, y_sm, w_sm, *u_sm, total_sm = refs[-6 - (others is not None) :]

    def odd(s):
      return lax.rem(s, jnp.int32(2))

    ring.start()
    total_sm.at[1][...] = plgpu.layout_cast(jnp.zeros((d,), jnp.float32), LAYOUT.reduce(0))
    plgpu.commit_smem()

    def run(*accs):
      @pl.loop(0, ring.count)
      def _stage(s):
        slot = ring.slot(s)
        plgpu.barrier_wait(ring.full.at[slot])
        weights, others = (_numbers(x, slot) for x in (w_sm, *u_sm, w_sm)[:2])
        for columns, p in _phi_parts(walk.feature_map, x_sm.at[slot]):
          weighted = (p * parts.over_columns(weights, STAGE)).astype(low)
          counted = p * parts.over_columns(others, STAGE) if u_sm else weighted.astype(jnp.float32)
          # In shared memory for want of registers, and never in place: lanes hold copies of each other's columns.
          before = plgpu.load(total_sm.at[odd(s + 1), columns], layout=LAYOUT.reduce(0))
          total_sm.at[odd(s), columns][...] = before + counted.sum(axis=0)
          x_sm.at[slot, :, columns][...] = weighted
        plgpu.wgmma_wait(0)  # of the stage before, under way until here
        plgpu.commit_smem()
        for i, acc in enumerate(accs):
          columns = x_sm.at[slot, :, pl.ds(i * STAGE, STAGE)]
          plgpu.wgmma(acc, columns.transpose((1, 0)), y_sm.at[slot])
        ring.refill(s)

      return [acc[...] for acc in accs]

    found = pl.run_scoped(run, *[plgpu.ACC((STAGE, d), jnp.float32)] * (d // STAGE))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(total_sm.at[odd(ring.count + 1)], total_gm.at[(*ring.place, chunk)])
    sample, head = ring.place
    for i, acc in enumerate(found):
      state_gm.at[pl.ds(((sample * h + head) * chunks + chunk) * d + i * STAGE, STAGE)][...] = (
        acc.astype(dtype)
      )
    plgpu.wait_smem_to_gmem(0)

  # Straight from registers, and flat: what is stored that way has no index but one.
  out = [
    jax.ShapeDtypeStruct((b * h * chunks * d, d), dtype),
    jax.ShapeDtypeStruct((b, h, chunks, d), jnp.float32),
  ]
  operands = [x, y, weights, *([] if others is None else [others])]
  counts = (2, len(operands) - 2, chunks)
  state, total = _launch(
    linear_states, walk, operands, counts, out, [plgpu.SMEM((2, d), jnp.float32)]
  )
  return state.reshape(b, h, chunks, d, d), total


def read(walk: Walk, q, state, total, valid, into):
  """What queries read of their segment's sums.

  Args:
    state: bf16 `[b, h, segments, d, d]`; total: float32 `[b, h, segments, d]`.
    valid: float32 `[1, 1, rows]`, 0 for rows that read nothing.
    into: None, or `[b, n, h, d]`, whose rows of the heads that take part are overwritten; in place where nobody else reads it.
      Not where boxes are mixed.

  Returns:
    out `[b, n, h, d]` (mixed boxes: `[b, rows, h, d]`), and log_den float32 `[b, h, rows]`, which is not written where a head
    takes no part.
  """
  (b, _, h, d), segments, low = q.shape, state.shape[2], q.dtype

  def linear_read(ring, chunk, *refs):
    (state_gm, total_gm), (out_gm, log_gm, q_sm, valid_sm, state_sm, total_sm, sums_bar) = (
      refs[2:4],
      refs[-7:],
    )
    sample, head = ring.place
    ring.start()
    _load_sums(
      ring, _segment(walk, chunk, segments), (state_gm, state_sm), (total_gm, total_sm), sums_bar
    )
    total = plgpu.load(total_sm, layout=LAYOUT.reduce(0))

    @pl.loop(0, ring.count)
    def _stage(s):
      slot = ring.slot(s)
      plgpu.barrier_wait(ring.full.at[slot])
      p = _phi(walk.feature_map, _rows(q_sm, slot)).astype(low)
      q_sm.at[slot][...] = p
      den = (p.astype(jnp.float32) * parts.over_rows(total)).sum(axis=1) * _numbers(valid_sm, slot)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.commit_smem()
      ring.refill(s)
      (acc,) = _products((q_sm.at[slot], state_sm))
      some = den > TINY
      inverse = jnp.where(some, 1 / jnp.where(some, den, 1.0), 0.0)
      plgpu.commit_smem()  # every warp has read its operands: their place may be written
      q_sm.at[slot][...] = (acc * parts.over_columns(inverse, d)).astype(low)
      log_den = jnp.where(some, jnp.log(jnp.where(some, den, 1.0)), -jnp.inf)
      log_gm.at[pl.ds(((sample * h + head) * walk.work.rows + (ring.begin + s) * STAGE), STAGE)][
        ...
      ] = log_den
      plgpu.commit_smem()
      ring.store(s, q_sm.at[slot], out_gm)

    plgpu.wait_smem_to_gmem(0)

  log, extra = jax.ShapeDtypeStruct((b * h * walk.work.rows,), jnp.float32), _sums_types(d, low)

  def run(out, targets=()):
    return _launch(
      linear_read,
      walk,
      [q, valid, state, total, *targets],
      (1, 1, len(walk.work.start)),
      out,
      extra,
    )

  if into is None:
    out, log_den = run([_rows_type(walk, q), log])
  else:  # what a kernel writes to that is not its result is an operand by reference

    def write(targets):
      run([], targets)

    out, log_den = pl.run_state(write)((into, lax.empty(log.shape, log.dtype)))
  return out, log_den.reshape(b, h, -1)


def dq(walk: Walk, q, d_out, inverse, d_den, state, total):
  """Gradient of the queries, as `read` gives out.

  Args:
    inverse, d_den: float32 `[b, h, rows]`, 1 / denominator and its gradient; 0 for rows that read nothing.
    state, total: as in `read`.
  """
  (d,), segments, low = q.shape[3:], state.shape[2], q.dtype

  def linear_dq(ring, chunk, *refs):
    (state_gm, total_gm), (dq_gm, q_sm, do_sm, inverse_sm, den_sm, state_sm, total_sm, sums_bar) = (
      refs[4:6],
      refs[-8:],
    )
    ring.start()
    _load_sums(
      ring, _segment(walk, chunk, segments), (state_gm, state_sm), (total_gm, total_sm), sums_bar
    )
    total = plgpu.load(total_sm, layout=LAYOUT.reduce(0))

    @pl.loop(0, ring.count)
    def _stage(s):
      slot = ring.slot(s)
      plgpu.barrier_wait(ring.full.at[slot])
      (acc,) = _products((do_sm.at[slot], state_sm.transpose((1, 0))))
      g = acc * parts.over_columns(_numbers(inverse_sm, slot), d)
      g = g + parts.over_columns(_numbers(den_sm, slot), d) * parts.over_rows(total)
      x = _rows(q_sm, slot)
      q_sm.at[slot][...] = _phi_back(walk.feature_map, x, _phi(walk.feature_map, x), g).astype(low)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.commit_smem()
      ring.refill(s)
      ring.store(s, q_sm.at[slot], dq_gm)

    plgpu.wait_smem_to_gmem(0)

  operands, out = [q, d_out, inverse, d_den, state, total], [_rows_type(walk, q)]
  return _launch(linear_dq, walk, operands, (2, 2, len(walk.work.start)), out, _sums_types(d, low))[
    0
  ]


def dkv(walk: Walk, k, v, valid, d_state, d_total):
  """Gradients of keys and values, as `read` gives out, from those of the sums; 0 in rows of no segment."""
  (d,), segments, low = k.shape[3:], d_state.shape[2], k.dtype

  def linear_dkv(ring, chunk, *refs):
    state_gm, total_gm, dk_gm, dv_gm, k_sm, v_sm, valid_sm, state_sm, total_sm, sums_bar, p_sm = (
      refs[3:]
    )
    ring.start()
    _load_sums(
      ring, _segment(walk, chunk, segments), (state_gm, state_sm), (total_gm, total_sm), sums_bar
    )

    @pl.loop(0, ring.count)
    def _stage(s):
      slot = ring.slot(s)
      plgpu.barrier_wait(ring.full.at[slot])
      p = _phi(walk.feature_map, _rows(k_sm, slot)).astype(low)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      p_sm[...] = p
      plgpu.commit_smem()
      ring.refill(s)
      seen = parts.over_columns(_numbers(valid_sm, slot), d)
      (dv,) = _products((p_sm, state_sm))
      plgpu.commit_smem()  # every warp has read its operands: their place may be written
      p_sm[...] = (dv * seen).astype(low)
      (g,) = _products((v_sm.at[slot], state_sm.transpose((1, 0))))
      total = plgpu.load(total_sm, layout=LAYOUT.reduce(0))
      x = _rows(
        k_sm, slot
      )  # again, and the features too: beside products there are no registers to keep them
      g = _phi_back(walk.feature_map, x, _phi(walk.feature_map, x), g + parts.over_rows(total))
      k_sm.at[slot][...] = (g * seen).astype(low)
      plgpu.commit_smem()
      ring.store(s, k_sm.at[slot], dk_gm)
      ring.store(s, p_sm, dv_gm)

    plgpu.wait_smem_to_gmem(0)

  operands, out = [k, v, valid, d_state, d_total], [_rows_type(walk, k)] * 2
  scratch = [*_sums_types(d, low), parts.tiles_type(STAGE, d, dtype=low)]
  return _launch(linear_dkv, walk, operands, (2, 1, len(walk.work.start)), out, scratch)


def _sums_types(d: int, dtype):
  """Shared memory for a segment's sums, and the barrier they arrive on."""
  return [
    parts.tiles_type(d, d, dtype=dtype),
    plgpu.SMEM((d,), jnp.float32),
    plgpu.Barrier(num_arrivals=2),
  ]
