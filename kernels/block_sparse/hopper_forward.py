"""The forward kernel: a thread block walks the list of key tiles of one head's query tile.

Compute warpgroups keep 64 query rows each; a further one only moves memory. A 128-row tile has two
compute warpgroups, which share every key tile. 64-row tiles have one each, and either a block of
their own or one for two neighbours, each with its own list, ring and memory warpgroup
(`TuningConfig.tiles_per_block`). Each stage of a ring holds `step` keys: two listed 64-key tiles,
one 128-key tile, or half of one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.tuning import TuningConfig
from freqformer.kernels.core import log2
from freqformer.kernels.core.lists import decode
from freqformer.kernels.hopper import products, softmax
from freqformer.kernels.hopper.launch import launch, set_registers
from freqformer.kernels.hopper.machine import ROWS
from freqformer.kernels.hopper.ring import Feed, Ring, fill_rings, head_rows, load_own, store_own
from freqformer.kernels.hopper.tile_walk import Deal, TileList, TileWalk, broadcast_index, place_of
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of one launch of an attention kernel.

  Attributes:
    block_q, block_kv: rows of a query and of a key tile, 64 or 128.
    scale: multiplies q k^T.
    tuning: how the kernel is cut into stages and warpgroups.
    cost: of the launch, for readers of the program.
  """

  block_q: int
  block_kv: int
  scale: float
  tuning: TuningConfig
  cost: pl.CostEstimate

  def deal(self, rows: int, block: int) -> Deal:
    """Returns how tiles of `block` rows, `rows` in all, are dealt to thread blocks."""
    return Deal(rows // block, self.tuning.tiles_per_block, block // ROWS, self.tuning.stages)

  def launch(self, body, operands, out_type, scratch, deal: Deal, heads: int) -> list:
    """Launches a kernel for `heads` heads, of all samples together; see `launch.launch`."""
    return launch(
      body,
      operands,
      out_type,
      scratch,
      cost=self.cost,
      blocks=heads * deal.blocks,
      warpgroups=deal.warpgroups,
      by_lane=self.tuning.by_lane,
    )


class QueryLists(NamedTuple):
  """Key tiles of each query tile, int32, as `lists.by_query` makes them.

  Attributes:
    codes: `[b or 1, h or 1, q_tiles or 1, list]`, entries of `lists.encode`.
    counts: `[b or 1, h or 1, q_tiles]`.
    order: `[b * h]`, `lists.order_of_call`; None for heads as they are numbered.
  """

  codes: Any
  counts: Any
  order: Any

  def of_tile(self, walk: TileWalk, sample, head, tile) -> TileList:
    """Returns the list of one query tile, read inside a kernel."""
    row = broadcast_index(self.codes, sample, head, tile)
    count = self.counts[broadcast_index(self.counts, sample, head, tile)]
    return TileList(walk, count, lambda i: decode(self.codes[(*row, i)]))


def forward(q, k, v, lists: QueryLists, bias, settings: Settings):
  """Computes attention of every query row.

  Args:
    q: `[b, n_q, h, d]`, bf16 or f16, whole tiles.
    k, v: `[b, n_kv, h, d]`.
    bias: float32 `[kv_tiles]` or None.

  Returns:
    out `[b, n_q, h, d]` and lse float32 `[b, h, n_q]`.
  """
  b, n, h, d = q.shape
  tuning = settings.tuning
  step = tuning.step
  deal = settings.deal(n, settings.block_q)
  walk = TileWalk(step, settings.block_kv)
  in_turns = deal.consumers == 2 and tuning.take_turns
  sign, factor = log2.split_scale(settings.scale)
  biased = bias is not None
  unit = 1.0 if biased else factor  # a biased score is in log2 units when the maximum is taken

  def attention_forward(q_gm, k_gm, v_gm, lists, bias_gm, out_gm, lse_gm, *scratch):
    q_sm, lse_sm, arrived, turn, k_ring, v_ring, staging = scratch
    (keys,) = k_ring.slots
    (values,) = v_ring.slots
    warpgroup = lax.axis_index("warpgroup")
    sample, head, place = place_of(lax.axis_index("block"), deal.blocks, h, lists.order)
    side = deal.side(warpgroup)
    tile = deal.tile(place, side)
    listed = lists.of_tile(walk, sample, head, tile)

    def pass_turn():
      if in_turns:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < deal.consumers)
    def compute_warpgroup():
      set_registers(tuning.compute_registers, "increase")
      mine = q_sm.at[warpgroup]
      rows = pl.ds(tile * settings.block_q + deal.part(warpgroup) * ROWS, ROWS)
      load_own([(q_gm.at[sample, rows, head], mine)], arrived.at[warpgroup], listed.count > 0)
      pl.when(warpgroup == 1)(pass_turn)
      stage = [x.at[warpgroup] for x in staging]

      def soften(sums, x, entries):
        """Turns raw scores `[ROWS, step]` into rescaled sums and 16-bit probabilities."""
        acc, top, total = sums
        x = walk.hide(x * sign if sign != 1 else x, entries)
        if biased:
          x = x * factor + walk.spread([bias_gm[part.tile] for part in entries])
        new = jnp.maximum(top, x.max(axis=1) * unit)
        shrink = jnp.exp2(top - new)
        p = softmax.exponentials(x, unit, new, step)
        acc = acc * products.over_columns(shrink, d)
        total = total * shrink + p.sum(axis=1)
        # All of this before the turn that follows; ptxas still sinks the conversions (docs/log.md).
        acc, new, total, p = lax.optimization_barrier((acc, new, total, p.astype(q.dtype)))
        return (acc, new, total), p

      # Not from HIDDEN: see `softmax.exponentials`.
      start = (products.zeros(d), products.rows_full(log2.DEAD), products.rows_full(0.0))

      def stage_by_stage():
        """Walks the list: scores, softmax and values of a stage, then the next."""

        def kv_loop(s, sums):
          slot = deal.slot(side, s)
          entries = listed.entries(s)  # read from global memory while the keys arrive
          k_ring.wait(slot)
          x = products.product(mine, keys.at[slot], pass_turn)
          k_ring.release(slot)
          (acc, top, total), p = soften(sums, x, entries)
          pass_turn()
          v_ring.wait(slot)
          acc = products.accumulate(acc, p, values.at[slot], *stage)
          v_ring.release(slot)
          return acc, top, total

        return lax.fori_loop(0, listed.steps, kv_loop, start)

      def scores_ahead():
        """Walks the list; the tensor cores have a stage's values and the next scores queued."""
        last = listed.steps - 1

        def kv_loop(s, carry):
          sums, x, entries, slot = carry
          following = deal.following(side, slot)
          (acc, top, total), p = soften(sums, x, entries)
          entries = listed.entries(s + 1)  # arrive while the tensor cores work
          # Both arrivals before the turn: who has the tensor cores must not wait for memory.
          v_ring.wait(slot)
          k_ring.wait(following)
          pass_turn()
          following_keys = keys.at[following]
          acc, x = products.accumulate_beside(
            acc, p, values.at[slot], mine, following_keys, *stage, issued=pass_turn
          )
          v_ring.release(slot)
          k_ring.release(following)
          return (acc, top, total), x, entries, following

        def walked():
          # The first stage's scores, before the loop.
          entries = listed.entries(0)
          slot = side * tuning.stages
          k_ring.wait(slot)
          x = products.product(mine, keys.at[slot])
          k_ring.release(slot)
          sums, x, entries, slot = lax.fori_loop(0, last, kv_loop, (start, x, entries, slot))
          # The last stage's values, after it.
          (acc, top, total), p = soften(sums, x, entries)
          v_ring.wait(slot)
          acc = products.accumulate(acc, p, values.at[slot], *stage)
          v_ring.release(slot)
          return acc, top, total

        return lax.cond(listed.count > 0, walked, lambda: start)

      acc, top, total = scores_ahead() if tuning.scores_ahead else stage_by_stage()
      pl.when(warpgroup == 0)(pass_turn)
      if deal.sides == 2 and in_turns:
        # Both sides pass turns as often as the longer list needs; ahead, a last stage has none.
        untaken = 1 if tuning.scores_ahead else 0
        other = lists.of_tile(walk, sample, head, deal.tile(place, 1 - side))

        @pl.loop(jnp.maximum(listed.steps, untaken), other.steps)
        def _idle(_):
          pass_turn()
          pass_turn()

      # Rows that met hidden keys only have output 0 and LSE -inf.
      alive = top > log2.DEAD
      inverse = jnp.where(alive, 1 / jnp.where(alive, total, 1.0), 0.0)
      mine[...] = (acc * products.over_columns(inverse, d)).astype(q.dtype)
      lse = (top + jnp.log2(jnp.where(alive, total, 1.0))) * (1 / log2.LOG2E)
      lse_own = lse_sm.at[warpgroup]
      lse_own[...] = jnp.where(alive, lse, -jnp.inf)
      store_own((mine, out_gm.at[sample, rows, head]), (lse_own, lse_gm.at[sample, head, rows]))

    @pl.when(warpgroup >= deal.consumers)
    def memory_warpgroup():
      keys_feed = Feed(k_ring, [head_rows(k_gm, sample, head)])
      values_feed = Feed(v_ring, [head_rows(v_gm, sample, head)])
      fill_rings(listed, [keys_feed, values_feed], deal, side, tuning.memory_registers)

  ring = Ring.types(walk, deal, products.tiles_type(deal.slots, step, d, dtype=q.dtype))
  scratch = [
    products.tiles_type(deal.consumers, ROWS, d, dtype=q.dtype),  # queries, then the output
    plgpu.SMEM((deal.consumers, ROWS), jnp.float32),  # LSE
    plgpu.Barrier(num_barriers=deal.consumers),  # a warpgroup's queries have arrived
    plgpu.Barrier(num_arrivals=deal.consumers),  # both warpgroups meet: a turn ends
    ring,
    ring,
    products.staging_types(deal.consumers, step, q.dtype),
  ]
  out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)]
  operands = (q, k, v, lists, log2.in_log2(bias))
  out, lse = settings.launch(attention_forward, operands, out_type, scratch, deal, b * h)
  return out, lse
