"""The forward kernel: a thread block takes a query tile of one head and walks its list of key tiles.

Compute warpgroups keep 64 query rows each; a further one only moves memory. A 128-row tile has two
compute warpgroups, which share every key tile. 64-row tiles have one each, and either a thread
block of their own or one for two neighbours, each with its own list, ring and memory warpgroup
(`TuningConfig.tiles_per_block`). Each stage of a ring holds `step` keys: two listed 64-key tiles,
one 128-key tile, or half of one.
"""

import functools

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.tuning import TuningConfig
from freqformer.kernels.core.lists import decode
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch
from freqformer.kernels.hopper.parts import ROWS
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def forward(data, lists, bias, blocks, scale: float, config: TuningConfig, cost: pl.CostEstimate):
  """Computes attention of every row of work.

  Args:
    data: q `[b, n_q, h, d]`; k, v `[b, n_kv, h, d]`; bf16 or f16, whole tiles.
    lists: `(codes, counts, order)`: int32 `[b or 1, h or 1, q_tiles or 1, list]` of
      `lists.encode`, `[b or 1, h or 1, q_tiles]`, and `lists.costliest_first` of the counts.
    bias: float32 `[kv_tiles]` or None.
    blocks: `(block_q, block_kv)`.
    scale: multiplies q k^T.
    config: how the kernel is cut.
    cost: for whoever reads the program.

  Returns:
    out `[b, n_q, h, d]`, lse float32 `[b, h, n_q]`.
  """
  q, _, _ = data
  block_q, block_kv = blocks
  b, n, h, d = q.shape
  deal = parts.Deal(n // block_q, config.tiles_per_block, block_q // ROWS, config.stages)
  in_turns = deal.consumers == 2 and config.take_turns
  walk = parts.Walk(config.step, block_kv)
  sign, factor = parts.split_scale(scale)
  biased = bias is not None
  unit = 1.0 if biased else factor  # a biased score is in log2 units when the maximum is taken

  def attention_forward(data, lists, bias_gm, out, own, rings, staging):
    q_gm, k_gm, v_gm = data
    codes_gm, counts_gm, order_gm = lists
    out_gm, lse_gm = out
    q_sm, lse_sm, q_bar, turn = own
    k_ring, v_ring = rings
    (keys,), (values,) = k_ring.slots, v_ring.slots
    warpgroup = lax.axis_index("warpgroup")
    sample, head, place = parts.place(order_gm, deal.blocks, h)

    def list_of(tile):
      row = parts.at(codes_gm, sample, head, tile)
      count = counts_gm[parts.at(counts_gm, sample, head, tile)]
      return parts.TileList(walk, count, lambda i: decode(codes_gm[(*row, i)]))

    side = deal.side(warpgroup)
    tile = deal.tile(place, side)
    listed = list_of(tile)

    def pass_turn():
      if in_turns:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < deal.consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      mine = q_sm.at[warpgroup]
      rows = pl.ds(tile * block_q + deal.part(warpgroup) * ROWS, ROWS)
      parts.load_own([(q_gm.at[sample, rows, head], mine)], q_bar.at[warpgroup], listed.count > 0)
      pl.when(warpgroup == 1)(pass_turn)
      stage = [x.at[warpgroup] for x in staging]

      def soften(sums, x, entries):
        """Turns raw scores into rescaled sums and 16-bit probabilities.

        Args:
          sums: output so far `[ROWS, d]`, running maximum and denominator `[ROWS]`.
          x: raw scores of a stage, float32 `[ROWS, step]`.
          entries: of `TileList.entries` for the stage.
        """
        acc, top, total = sums
        x = walk.hide(x * sign if sign != 1 else x, entries)
        if biased:
          x = x * factor + walk.spread([bias_gm[tile] for tile, *_ in entries])
        new = jnp.maximum(top, x.max(axis=1) * unit)
        shrink = jnp.exp2(top - new)
        p = parts.exponentials(x, unit, new, config.step)
        acc = acc * parts.over_columns(shrink, d)
        total = total * shrink + p.sum(axis=1)
        # All of this before the turn that follows; ptxas still sinks the conversions (docs/log.md).
        acc, new, total, p = lax.optimization_barrier((acc, new, total, p.astype(q.dtype)))
        return (acc, new, total), p

      # Not from HIDDEN: see `parts.exponentials`.
      start = (parts.zeros(d), parts.rows_full(parts.DEAD), parts.rows_full(0.0))

      def stage_by_stage():
        """Walks the list: scores, softmax and values of a stage, then the next."""

        def attend(s, sums):
          slot = deal.slot(side, s)
          entries = listed.entries(s)  # read from global memory while the keys arrive
          k_ring.wait(slot)
          x = parts.product(mine, keys.at[slot], pass_turn)
          k_ring.release(slot)
          (acc, top, total), p = soften(sums, x, entries)
          pass_turn()
          v_ring.wait(slot)
          acc = parts.accumulate(acc, p, values.at[slot], *stage)
          v_ring.release(slot)
          return acc, top, total

        return lax.fori_loop(0, listed.steps, attend, start)

      def scores_ahead():
        """Walks the list with the next stage's scores issued beside this one's values.

        The tensor cores then have both products queued when the turn is passed on, and nothing
        of a stage stands between its values and the scores of the next.
        """
        last = listed.steps - 1

        def attend(s, carry):
          sums, x, entries, slot = carry
          following = deal.following(side, slot)
          (acc, top, total), p = soften(sums, x, entries)
          entries = listed.entries(s + 1)  # arrive while the tensor cores work
          # Both arrivals before the turn: who has the tensor cores must not wait for memory.
          v_ring.wait(slot)
          k_ring.wait(following)
          pass_turn()
          following_keys = keys.at[following]
          acc, x = parts.accumulate_beside(
            acc, p, values.at[slot], mine, following_keys, *stage, issued=pass_turn
          )
          v_ring.release(slot)
          k_ring.release(following)
          return (acc, top, total), x, entries, following

        def walked():
          entries = listed.entries(0)
          slot = side * config.stages
          k_ring.wait(slot)
          x = parts.product(mine, keys.at[slot])
          k_ring.release(slot)
          sums, x, entries, slot = lax.fori_loop(0, last, attend, (start, x, entries, slot))
          (acc, top, total), p = soften(sums, x, entries)
          v_ring.wait(slot)
          acc = parts.accumulate(acc, p, values.at[slot], *stage)
          v_ring.release(slot)
          return acc, top, total

        return lax.cond(listed.count > 0, walked, lambda: start)

      acc, top, total = scores_ahead() if config.scores_ahead else stage_by_stage()
      pl.when(warpgroup == 0)(pass_turn)
      if deal.sides == 2 and in_turns:
        # Both sides pass turns as often as the longer list needs. The last stage of a list has
        # no turn where scores run ahead.
        untaken = 1 if config.scores_ahead else 0
        other = list_of(deal.tile(place, 1 - side))

        @pl.loop(jnp.maximum(listed.steps, untaken), other.steps)
        def _idle(_):
          pass_turn()
          pass_turn()

      alive = top > parts.DEAD
      inverse = jnp.where(alive, 1 / jnp.where(alive, total, 1.0), 0.0)
      mine[...] = (acc * parts.over_columns(inverse, d)).astype(q.dtype)
      lse = (top + jnp.log2(jnp.where(alive, total, 1.0))) * (1 / parts.LOG2E)
      lse_sm.at[warpgroup][...] = jnp.where(alive, lse, -jnp.inf)
      parts.store_own(
        (mine, out_gm.at[sample, rows, head]), (lse_sm.at[warpgroup], lse_gm.at[sample, head, rows])
      )

    @pl.when(warpgroup >= deal.consumers)
    def _memory():
      def rows_of(ref):
        return lambda rows: ref.at[sample, rows, head]

      sources = [(k_ring, [rows_of(k_gm)]), (v_ring, [rows_of(v_gm)])]
      parts.memory_warpgroup(listed, sources, deal, side, config.memory_registers)

  tiles_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  ring = parts.Ring.types(walk, deal, tiles_of(deal.slots, config.step, d))
  own = (
    tiles_of(deal.consumers, ROWS, d),
    plgpu.SMEM((deal.consumers, ROWS), jnp.float32),
    plgpu.Barrier(num_barriers=deal.consumers),
    plgpu.Barrier(num_arrivals=deal.consumers),
  )
  out_type = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32))
  scratch = [own, (ring, ring), parts.staging_types(deal.consumers, config.step, q.dtype)]
  (found,) = launch(
    attention_forward,
    (data, lists, parts.in_log2(bias)),
    [out_type],
    scratch,
    cost=cost,
    blocks=b * h * deal.blocks,
    warpgroups=deal.warpgroups,
    by_lane=config.by_lane,
  )
  return found
