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
from kernels.pallas_mgpu_parts import ROWS
from kernels.tuning import TuningConfig


def forward(q, k, v, codes, counts, bias, blocks, scale: float, config: TuningConfig):
  """Attention of every row of work.

  Args:
    q: `[b, n_q, h, d]`; k, v: `[b, n_kv, h, d]`; bf16 or f16, whole tiles.
    codes: int32 `[b or 1, h or 1, q_tiles or 1, list]` of `parts.encode`; counts: int32 `[b or 1, h or 1, q_tiles]`.
    bias: float32 `[kv_tiles]` or None.
    blocks: `(block_q, block_kv)`.

  Returns:
    out `[b, n_q, h, d]`, lse float32 `[b, h, n_q]`.
  """
  (b, n, h, d), (block_q, block_kv) = q.shape, blocks
  tiles, consumers = n // block_q, block_q // ROWS
  walk = parts.Walk(config.step, block_kv)
  biased = bias is not None
  stages = config.stages

  def attention_forward(q_gm, k_gm, v_gm, codes_gm, counts_gm, order_gm, *rest):
    bias_gm, rest = (rest[0], rest[1:]) if biased else (None, rest)
    out_gm, lse_gm, q_sm, k_sm, v_sm, lse_sm, q_bar, k_bar, v_bar, k_free, v_free, turn, *staging = rest
    sample, head, tile = parts.place(order_gm, tiles, h)
    count = counts_gm[parts.at(counts_gm, sample, head, tile)]
    steps = walk.steps(count)
    warpgroup = lax.axis_index("warpgroup")

    def entry(i):
      """Tile and valid rows of list entry i."""
      return parts.decode(codes_gm[(*parts.at(codes_gm, sample, head, tile), i)])

    def pass_turn():
      if consumers == 2 and config.take_turns:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      mine, bar = q_sm.at[warpgroup], q_bar.at[warpgroup]
      rows = pl.ds(tile * block_q + warpgroup * ROWS, ROWS)

      @pl.when(count > 0)
      def _load():
        plgpu.copy_gmem_to_smem(q_gm.at[sample, rows, head], mine, bar)
        plgpu.barrier_wait(bar)

      pl.when(warpgroup == 1)(pass_turn)

      def attend(s, carry):
        acc, top, total = carry
        slot = lax.rem(s, jnp.int32(stages))
        entries = walk.entries(s, count, entry)  # read from global memory while the keys arrive
        plgpu.barrier_wait(k_bar.at[slot])
        x = parts.product(mine, k_sm.at[slot], pass_turn)
        plgpu.barrier_arrive(k_free.at[slot])
        x = x * sign if sign != 1 else x
        x = lax.cond(walk.whole(entries), lambda x: x, lambda x: walk.hide(x, entries), x)
        if biased:
          x = x * factor + walk.spread([bias_gm[tile] for tile, *_ in entries])
        unit = 1.0 if biased else factor
        new = jnp.maximum(top, x.max(axis=1) * unit)
        shrink = jnp.exp2(top - new)
        p = jnp.exp2(x * unit - parts.over_columns(new, config.step))
        acc = acc * parts.over_columns(shrink, d)
        total = total * shrink + p.sum(axis=1)
        p = p.astype(q.dtype)
        acc, new, total, p = lax.optimization_barrier((acc, new, total, p))
        pass_turn()
        plgpu.barrier_wait(v_bar.at[slot])
        acc = parts.accumulate(acc, p, v_sm.at[slot], *(x.at[warpgroup] for x in staging))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new, total

      start = (parts.zeros(d), parts.rows_full(parts.HIDDEN), parts.rows_full(0.0))
      acc, top, total = lax.fori_loop(0, steps, attend, start)
      pl.when(warpgroup == 0)(pass_turn)
      alive = top > parts.DEAD
      inverse = jnp.where(alive, 1 / jnp.where(alive, total, 1.0), 0.0)
      mine[...] = (acc * parts.over_columns(inverse, d)).astype(q.dtype)
      lse = (top + jnp.log2(jnp.where(alive, total, 1.0))) * (1 / parts.LOG2E)
      lse_sm.at[warpgroup][...] = jnp.where(alive, lse, -jnp.inf)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mine, out_gm.at[sample, rows, head])
      plgpu.copy_smem_to_gmem(lse_sm.at[warpgroup], lse_gm.at[sample, head, rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == consumers)
    def _memory():
      parts.set_registers(config.memory_registers, "decrease")

      def fetch(s, slot):
        for source, ring, full in ((k_gm, k_sm, k_bar), (v_gm, v_sm, v_bar)):
          keys = lambda rows, source=source: source.at[sample, rows, head]
          walk.copy(keys, ring.at[slot], full.at[slot], walk.entries(s, count, entry))

      parts.fill_ring(steps, stages, fetch, (k_free, v_free))

  sign, factor = parts.split_scale(scale)
  order = parts.costliest_first(counts, b, h)
  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  scratch = [
    tile_of(consumers, ROWS, d),
    tile_of(stages, config.step, d),
    tile_of(stages, config.step, d),
    plgpu.SMEM((consumers, ROWS), jnp.float32),
    plgpu.Barrier(num_barriers=consumers),
    plgpu.Barrier(num_arrivals=walk.parts, num_barriers=stages),
    plgpu.Barrier(num_arrivals=walk.parts, num_barriers=stages),
    plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    plgpu.Barrier(num_arrivals=consumers),
    *parts.staging_types(consumers, config.step, q.dtype),
  ]
  out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)]
  operands = [q, k, v, codes, jnp.asarray(counts), order, *([bias * parts.LOG2E] if biased else [])]
  launch = parts.Launch(b * h * tiles, consumers, config.by_lane)
  return tuple(launch(attention_forward, operands, out_type, scratch))
