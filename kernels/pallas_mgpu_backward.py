"""The backward in two kernels: dQ walks the forward lists, dK and dV walk the transposed ones. No atomics, hence deterministic.

P is recomputed from the scores and the row's LSE; dS = P (dO V^T - delta), where delta already carries -dLSE. Both kernels
recompute P and dP, 7 matmuls instead of the 5 of a single pass with atomic adds.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import pallas_mgpu_parts as parts
from kernels.pallas_mgpu_parts import LAYOUT, ROWS
from kernels.tuning import TuningConfig


def dq(data, codes, counts, bias, blocks, scale: float, config: TuningConfig):
  """Gradient of the queries.

  Args:
    data: q, k, v, d_out `[b, n, h, d]` and lse (log2, large where a row sees nothing), delta `[b, h, n_q]`.
    codes, counts, bias, blocks: as in `pallas_mgpu_forward.forward`.

  Returns:
    `[b, n_q, h, d]` in q's dtype.
  """
  q = data[0]
  (b, n, h, d), (block_q, block_kv) = q.shape, blocks
  tiles, consumers, stages = n // block_q, block_q // ROWS, config.stages
  walk, biased = parts.Walk(config.step, block_kv), bias is not None
  sign, factor = parts.split_scale(scale)

  def attention_dq(q_gm, k_gm, v_gm, do_gm, lse_gm, delta_gm, codes_gm, counts_gm, order_gm, *rest):
    bias_gm, rest = (rest[0], rest[1:]) if biased else (None, rest)
    dq_gm, q_sm, do_sm, lse_sm, delta_sm, k_sm, v_sm, own_bar, k_bar, v_bar, k_free, v_free, *staging = rest
    sample, head, tile = parts.place(order_gm, tiles, h)
    count = counts_gm[parts.at(counts_gm, sample, head, tile)]
    steps, warpgroup = walk.steps(count), lax.axis_index("warpgroup")

    def entry(i):
      return parts.decode(codes_gm[(*parts.at(codes_gm, sample, head, tile), i)])

    @pl.when(warpgroup < consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      rows = pl.ds(tile * block_q + warpgroup * ROWS, ROWS)
      own = [ref.at[warpgroup] for ref in (q_sm, do_sm, lse_sm, delta_sm)]
      bar = own_bar.at[warpgroup]

      @pl.when(count > 0)
      def _load():
        for source, target in ((q_gm, own[0]), (do_gm, own[1])):
          plgpu.copy_gmem_to_smem(source.at[sample, rows, head], target, bar)
        for source, target in ((lse_gm, own[2]), (delta_gm, own[3])):
          plgpu.copy_gmem_to_smem(source.at[sample, head, rows], target, bar)
        plgpu.barrier_wait(bar)

      lse, delta = (plgpu.load(ref, layout=LAYOUT.reduce(1)) for ref in own[2:])

      def attend(s, acc):
        slot = lax.rem(s, jnp.int32(stages))
        entries = walk.entries(s, count, entry)
        plgpu.barrier_wait(k_bar.at[slot])
        plgpu.barrier_wait(v_bar.at[slot])
        x, dp = parts.two_products(own[0], k_sm.at[slot], own[1], v_sm.at[slot])
        plgpu.barrier_arrive(v_free.at[slot])
        x = x * sign if sign != 1 else x
        x = lax.cond(walk.whole(entries), lambda x: x, lambda x: walk.hide(x, entries), x) * factor
        if biased:
          x = x + walk.spread([bias_gm[tile] for tile, *_ in entries])
        p = jnp.exp2(x - parts.over_columns(lse, config.step))
        ds = (p * (dp - parts.over_columns(delta, config.step))).astype(q.dtype)
        acc = parts.accumulate(acc, ds, k_sm.at[slot], *(x.at[warpgroup] for x in staging))
        plgpu.barrier_arrive(k_free.at[slot])
        return acc

      acc = lax.fori_loop(0, steps, attend, parts.zeros(d))
      own[0][...] = (acc * scale).astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(own[0], dq_gm.at[sample, rows, head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == consumers)
    def _memory():
      parts.set_registers(config.memory_registers, "decrease")

      def fetch(s, slot):
        for source, ring, full in ((k_gm, k_sm, k_bar), (v_gm, v_sm, v_bar)):
          keys = lambda rows, source=source: source.at[sample, rows, head]
          walk.copy(keys, ring.at[slot], full.at[slot], walk.entries(s, count, entry))

      parts.fill_ring(steps, stages, fetch, (k_free, v_free))

  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  full, free = (plgpu.Barrier(num_arrivals=a, num_barriers=stages) for a in (walk.parts, consumers))
  scratch = [
    tile_of(consumers, ROWS, d),
    tile_of(consumers, ROWS, d),
    plgpu.SMEM((consumers, ROWS), jnp.float32),
    plgpu.SMEM((consumers, ROWS), jnp.float32),
    tile_of(stages, config.step, d),
    tile_of(stages, config.step, d),
    plgpu.Barrier(num_arrivals=4, num_barriers=consumers),
    *(full, full, free, free),
    *parts.staging_types(consumers, config.step, q.dtype),
  ]
  order = parts.costliest_first(counts, b, h)
  operands = [*data, codes, jnp.asarray(counts), order, *([bias * parts.LOG2E] if biased else [])]
  launch = parts.Launch(b * h * tiles, consumers, config.by_lane)
  return launch(attention_dq, operands, jax.ShapeDtypeStruct(q.shape, q.dtype), scratch)


def dkv(data, lists, kv_len, bias, blocks, scale: float, config: TuningConfig):
  """Gradients of keys and values.

  Args:
    data: as in `dq`.
    lists: `(starts, counts, q_indices)`: int32 `[b or 1, h or 1, kv_tiles]` twice and `[b or 1, h or 1, list]`; key tile j is
      read by the query tiles `q_indices[starts[j] : starts[j] + counts[j]]`.
    kv_len: int32 `[b or 1, kv_tiles]`; bias, blocks: as in `dq`.

  Returns:
    dk, dv `[b, n_kv, h, d]` in k's dtype; 0 in padding rows.
  """
  q, k = data[:2]
  starts, counts, indices = lists
  (b, n, h, d), (block_q, block_kv) = k.shape, blocks
  tiles, consumers, stages = n // block_kv, block_kv // ROWS, config.stages
  walk, biased = parts.Walk(config.step, block_q), bias is not None
  sign, factor = parts.split_scale(scale)

  def attention_dkv(q_gm, k_gm, v_gm, do_gm, lse_gm, delta_gm, starts_gm, counts_gm, indices_gm, order_gm, len_gm, *rest):
    bias_gm, rest = (rest[0], rest[1:]) if biased else (None, rest)
    dk_gm, dv_gm, k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, own_bar, q_bar, do_bar, q_free, do_free, *staging = rest
    sample, head, tile = parts.place(order_gm, tiles, h)
    count = counts_gm[parts.at(counts_gm, sample, head, tile)]
    start = starts_gm[parts.at(starts_gm, sample, head, tile)]
    steps, warpgroup = walk.steps(count), lax.axis_index("warpgroup")

    def entry(i):
      return indices_gm[(*parts.at(indices_gm, sample, head), start + i)], jnp.int32(block_q)

    @pl.when(warpgroup < consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      rows = pl.ds(tile * block_kv + warpgroup * ROWS, ROWS)
      own_k, own_v, bar = k_sm.at[warpgroup], v_sm.at[warpgroup], own_bar.at[warpgroup]

      @pl.when(count > 0)
      def _load():
        for source, target in ((k_gm, own_k), (v_gm, own_v)):
          plgpu.copy_gmem_to_smem(source.at[sample, rows, head], target, bar)
        plgpu.barrier_wait(bar)

      def attend(s, carry):
        dk, dv = carry
        slot = lax.rem(s, jnp.int32(stages))
        plgpu.barrier_wait(q_bar.at[slot])
        x = parts.product(own_k, q_sm.at[slot])
        lse = plgpu.load(lse_sm.at[slot], layout=LAYOUT.reduce(0))
        x = (x * sign if sign != 1 else x) * factor
        if biased:
          x = x + bias_gm[tile]
        x = x - parts.over_rows(lse)
        if walk.parts > 1:
          entries = walk.entries(s, count, entry)
          x = lax.cond(walk.whole(entries), lambda x: x, lambda x: walk.hide(x, entries), x)
        p = jnp.exp2(x)
        stage = [x.at[warpgroup] for x in staging]
        plgpu.barrier_wait(do_bar.at[slot])
        # One in flight beside the other, not both products first: that would cost 16 registers, and there are none left.
        dv, dp = parts.accumulate_beside(dv, p.astype(q.dtype), do_sm.at[slot], own_v, do_sm.at[slot], *stage)
        delta = plgpu.load(delta_sm.at[slot], layout=LAYOUT.reduce(0))
        plgpu.barrier_arrive(do_free.at[slot])
        ds = (p * (dp - parts.over_rows(delta))).astype(q.dtype)
        dk = parts.accumulate(dk, ds, q_sm.at[slot], *stage)
        plgpu.barrier_arrive(q_free.at[slot])
        return dk, dv

      dk, dv = lax.fori_loop(0, steps, attend, (parts.zeros(d), parts.zeros(d)))
      valid = len_gm[parts.at(len_gm, sample, tile)] - warpgroup * ROWS
      seen = plgpu.broadcasted_iota(jnp.int32, (ROWS, d), 0, layout=LAYOUT) < valid
      own_k[...] = jnp.where(seen, dk * scale, 0.0).astype(q.dtype)
      own_v[...] = jnp.where(seen, dv, 0.0).astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(own_k, dk_gm.at[sample, rows, head])
      plgpu.copy_smem_to_gmem(own_v, dv_gm.at[sample, rows, head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == consumers)
    def _memory():
      parts.set_registers(config.memory_registers, "decrease")

      def fetch(s, slot):
        sides = ((q_gm, q_sm, lse_gm, lse_sm, q_bar), (do_gm, do_sm, delta_gm, delta_sm, do_bar))
        for source, ring, numbers, numbers_ring, full in sides:
          entries = walk.entries(s, count, entry)
          walk.copy(lambda rows, x=source: x.at[sample, rows, head], ring.at[slot], full.at[slot], entries)
          walk.copy(lambda rows, x=numbers: x.at[sample, head, rows], numbers_ring.at[slot], full.at[slot], entries)

      parts.fill_ring(steps, stages, fetch, (q_free, do_free))

  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  full, free = (plgpu.Barrier(num_arrivals=a, num_barriers=stages) for a in (2 * walk.parts, consumers))
  scratch = [
    tile_of(consumers, ROWS, d),
    tile_of(consumers, ROWS, d),
    tile_of(stages, config.step, d),
    tile_of(stages, config.step, d),
    plgpu.SMEM((stages, config.step), jnp.float32),
    plgpu.SMEM((stages, config.step), jnp.float32),
    plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
    *(full, full, free, free),
    *parts.staging_types(consumers, config.step, q.dtype),
  ]
  order = parts.costliest_first(counts, b, h)
  operands = [*data, starts, counts, indices, order, kv_len, *([bias * parts.LOG2E] if biased else [])]
  launch = parts.Launch(b * h * tiles, consumers, config.by_lane)
  return tuple(launch(attention_dkv, operands, [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2, scratch))
