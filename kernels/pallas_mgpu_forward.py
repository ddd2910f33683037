"""The forward kernel: one thread block per query tile and head, walking that tile's list of key tiles.

Two compute warpgroups keep 64 query rows each and share every key tile; a third only moves memory. Each stage of the ring
holds `step` keys: two listed 64-key tiles, one 128-key tile, or half of one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import pallas_mgpu_parts as parts
from kernels.launch_mgpu import launch
from kernels.pallas_mgpu_parts import ROWS
from kernels.tuning import TuningConfig


def forward(data, lists, bias, blocks, scale: float, config: TuningConfig, cost: pl.CostEstimate):
  """Attention of every row of work.

  Args:
    data: q `[b, n_q, h, d]`; k, v `[b, n_kv, h, d]`; bf16 or f16, whole tiles.
    lists: `(codes, counts)`: int32 `[b or 1, h or 1, q_tiles or 1, list]` of `parts.encode` and `[b or 1, h or 1, q_tiles]`.
    bias: float32 `[kv_tiles]` or None.
    blocks: `(block_q, block_kv)`.
    cost: for whoever reads the program.

  Returns:
    out `[b, n_q, h, d]`, lse float32 `[b, h, n_q]`.
  """
  (q, *_), (codes, counts), (block_q, block_kv) = data, lists, blocks
  b, n, h, d = q.shape
  tiles, consumers = n // block_q, block_q // ROWS
  walk, biased = parts.Walk(config.step, block_kv), bias is not None
  sign, factor = parts.split_scale(scale)

  def attention_forward(data, lists, bias_gm, out, own, rings, staging):
    (q_gm, k_gm, v_gm), (codes_gm, counts_gm, order_gm), (out_gm, lse_gm) = data, lists, out
    (q_sm, lse_sm, q_bar, turn), (k_ring, v_ring) = own, rings
    sample, head, tile = parts.place(order_gm, tiles, h)
    count = counts_gm[parts.at(counts_gm, sample, head, tile)]
    listed = parts.TileList(walk, count, lambda i: parts.decode(codes_gm[(*parts.at(codes_gm, sample, head, tile), i)]))
    warpgroup = lax.axis_index("warpgroup")

    def pass_turn():
      if consumers == 2 and config.take_turns:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      mine, rows = q_sm.at[warpgroup], pl.ds(tile * block_q + warpgroup * ROWS, ROWS)
      parts.load_own([(q_gm.at[sample, rows, head], mine)], q_bar.at[warpgroup], count > 0)
      pl.when(warpgroup == 1)(pass_turn)

      def attend(s, carry):
        acc, top, total = carry
        slot, (keys,), (values,) = lax.rem(s, jnp.int32(config.stages)), k_ring.slots, v_ring.slots
        entries = listed.entries(s)  # read from global memory while the keys arrive
        k_ring.wait(slot)
        x = parts.product(mine, keys.at[slot], pass_turn)
        k_ring.release(slot)
        x = walk.hide(x * sign if sign != 1 else x, entries)
        if biased:
          x = x * factor + walk.spread([bias_gm[tile] for tile, *_ in entries])
        unit = 1.0 if biased else factor
        new = jnp.maximum(top, x.max(axis=1) * unit)
        shrink = jnp.exp2(top - new)
        p = parts.exponentials(x, unit, new, config.step)
        acc = acc * parts.over_columns(shrink, d)
        total = total * shrink + p.sum(axis=1)
        p = p.astype(q.dtype)
        acc, new, total, p = lax.optimization_barrier((acc, new, total, p))
        pass_turn()
        v_ring.wait(slot)
        acc = parts.accumulate(acc, p, values.at[slot], *(x.at[warpgroup] for x in staging))
        v_ring.release(slot)
        return acc, new, total

      # Not from HIDDEN: a fused multiply-add takes the rounded maximum from the exact product, and what is left of -1e30 may be
      # +1e21. Above all hidden scores, every one of them has probability 0, also where a row has met nothing else.
      start = (parts.zeros(d), parts.rows_full(parts.DEAD), parts.rows_full(0.0))
      acc, top, total = lax.fori_loop(0, listed.steps, attend, start)
      pl.when(warpgroup == 0)(pass_turn)
      alive = top > parts.DEAD
      inverse = jnp.where(alive, 1 / jnp.where(alive, total, 1.0), 0.0)
      mine[...] = (acc * parts.over_columns(inverse, d)).astype(q.dtype)
      lse = (top + jnp.log2(jnp.where(alive, total, 1.0))) * (1 / parts.LOG2E)
      lse_sm.at[warpgroup][...] = jnp.where(alive, lse, -jnp.inf)
      parts.store_own((mine, out_gm.at[sample, rows, head]), (lse_sm.at[warpgroup], lse_gm.at[sample, head, rows]))

    @pl.when(warpgroup == consumers)
    def _memory():
      rows_of = lambda ref: lambda rows: ref.at[sample, rows, head]
      parts.memory_warpgroup(listed, [(k_ring, [rows_of(k_gm)]), (v_ring, [rows_of(v_gm)])], config)

  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  ring = parts.Ring.types(walk, consumers, config.stages, tile_of(config.stages, config.step, d))
  turn = plgpu.Barrier(num_arrivals=consumers)
  own = (tile_of(consumers, ROWS, d), plgpu.SMEM((consumers, ROWS), jnp.float32), plgpu.Barrier(num_barriers=consumers), turn)
  out_type = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32))
  lists = (codes, jnp.asarray(counts), parts.costliest_first(counts, b, h))
  scratch = [own, (ring, ring), parts.staging_types(consumers, config.step, q.dtype)]
  options = {"blocks": b * h * tiles, "warpgroups": consumers + 1, "by_lane": config.by_lane}
  return launch(attention_forward, (data, lists, parts.in_log2(bias)), [out_type], scratch, cost=cost, **options)[0]
