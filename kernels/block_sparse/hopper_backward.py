"""The backward in two kernels: dQ walks the forward lists, dK and dV walk the transposed ones. No atomics, hence deterministic.

P is recomputed from the scores and the row's LSE; dS = P (dO V^T - delta), where delta already carries -dLSE. Both kernels
recompute P and dP, 7 matmuls instead of the 5 of a single pass with atomic adds.
"""

import functools

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.tuning import TuningConfig
from freqformer.kernels.core.lists import decode
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch
from freqformer.kernels.hopper.parts import LAYOUT, ROWS
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def dq(data, lists, bias, blocks, scale: float, config: TuningConfig, cost: pl.CostEstimate):
  """Gradient of the queries.

  Args:
    data: q, k, v, d_out `[b, n, h, d]` and lse (log2, large where a row sees nothing), delta `[b, h, n_q]`.
    lists, bias, blocks, cost: as in `hopper_forward.forward`.

  Returns:
    `[b, n_q, h, d]` in q's dtype.
  """
  (q, *_), (block_q, block_kv) = data, blocks
  b, n, h, d = q.shape
  deal = parts.Deal(n // block_q, config.tiles_per_block, block_q // ROWS, config.stages)
  walk, biased = parts.Walk(config.step, block_kv), bias is not None
  sign, factor = parts.split_scale(scale)

  def attention_dq(data, lists, bias_gm, dq_gm, own, rings, staging):
    (q_gm, k_gm, v_gm, do_gm, lse_gm, delta_gm), (codes_gm, counts_gm, order_gm) = data, lists
    (*kept, own_bar), (k_ring, v_ring) = own, rings
    warpgroup = lax.axis_index("warpgroup")
    sample, head, place = parts.place(order_gm, deal.blocks, h)
    side = deal.side(warpgroup)
    tile = deal.tile(place, side)
    count = counts_gm[parts.at(counts_gm, sample, head, tile)]
    listed = parts.TileList(
      walk, count, lambda i: decode(codes_gm[(*parts.at(codes_gm, sample, head, tile), i)])
    )

    @pl.when(warpgroup < deal.consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      rows = pl.ds(tile * block_q + deal.part(warpgroup) * ROWS, ROWS)
      q_own, do_own, *numbers = (ref.at[warpgroup] for ref in kept)
      pairs = [(q_gm.at[sample, rows, head], q_own), (do_gm.at[sample, rows, head], do_own)]
      pairs += [
        (source.at[sample, head, rows], own)
        for source, own in zip((lse_gm, delta_gm), numbers, strict=True)
      ]
      parts.load_own(pairs, own_bar.at[warpgroup], count > 0)
      lse, delta = (plgpu.load(ref, layout=LAYOUT.reduce(1)) for ref in numbers)

      def attend(s, acc):
        slot, (keys,), (values,) = deal.slot(side, s), k_ring.slots, v_ring.slots
        entries = listed.entries(s)
        k_ring.wait(slot)
        v_ring.wait(slot)
        x, dp = parts.two_products(q_own, keys.at[slot], do_own, values.at[slot])
        v_ring.release(slot)
        x = walk.hide(x * sign if sign != 1 else x, entries) * factor
        if biased:
          x = x + walk.spread([bias_gm[tile] for tile, *_ in entries])
        p = jnp.exp2(x - parts.over_columns(lse, config.step))
        ds = (p * (dp - parts.over_columns(delta, config.step))).astype(q.dtype)
        acc = parts.accumulate(acc, ds, keys.at[slot], *(x.at[warpgroup] for x in staging))
        k_ring.release(slot)
        return acc

      acc = lax.fori_loop(0, listed.steps, attend, parts.zeros(d))
      q_own[...] = (acc * scale).astype(q.dtype)
      parts.store_own((q_own, dq_gm.at[sample, rows, head]))

    @pl.when(warpgroup >= deal.consumers)
    def _memory():
      def rows_of(ref):
        return lambda rows: ref.at[sample, rows, head]

      sources = [(k_ring, [rows_of(k_gm)]), (v_ring, [rows_of(v_gm)])]
      parts.memory_warpgroup(listed, sources, deal, side, config.memory_registers)

  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  ring = parts.Ring.types(walk, deal, tile_of(deal.slots, config.step, d))
  own, number = tile_of(deal.consumers, ROWS, d), plgpu.SMEM((deal.consumers, ROWS), jnp.float32)
  own = (own, own, number, number, plgpu.Barrier(num_arrivals=4, num_barriers=deal.consumers))
  scratch = [own, (ring, ring), parts.staging_types(deal.consumers, config.step, q.dtype)]
  options = {
    "blocks": b * h * deal.blocks,
    "warpgroups": deal.warpgroups,
    "by_lane": config.by_lane,
  }
  operands, out_type = (data, lists, parts.in_log2(bias)), jax.ShapeDtypeStruct(q.shape, q.dtype)
  return launch(attention_dq, operands, [out_type], scratch, cost=cost, **options)[0]


def dkv(data, lists, bias, blocks, scale: float, config: TuningConfig, cost: pl.CostEstimate):
  """Gradients of keys and values.

  Args:
    data: as in `dq`.
    lists: `(starts, counts, readers, kv_len, order)`: those of `lists.by_key`, with int32
      `[b or 1, kv_tiles]` before the order.
    bias, blocks, cost: as in `dq`.

  Returns:
    dk, dv `[b, n_kv, h, d]` in k's dtype; 0 in padding rows.
  """
  (q, k, *_), (block_q, block_kv) = data, blocks
  b, n, h, d = k.shape
  deal = parts.Deal(n // block_kv, config.tiles_per_block, block_kv // ROWS, config.stages)
  walk, biased = parts.Walk(config.step, block_q), bias is not None
  sign, factor = parts.split_scale(scale)

  def attention_dkv(data, lists, bias_gm, out, own, rings, staging):
    (q_gm, k_gm, v_gm, do_gm, lse_gm, delta_gm), (dk_gm, dv_gm) = data, out
    (starts_gm, counts_gm, indices_gm, len_gm, order_gm), (k_sm, v_sm, own_bar) = lists, own
    q_ring, do_ring = rings
    warpgroup = lax.axis_index("warpgroup")
    sample, head, place = parts.place(order_gm, deal.blocks, h)
    side = deal.side(warpgroup)
    tile = deal.tile(place, side)
    count = counts_gm[parts.at(counts_gm, sample, head, tile)]
    start = starts_gm[parts.at(starts_gm, sample, head, tile)]

    def entry(i):
      return (indices_gm[(*parts.at(indices_gm, sample, head), start + i)], jnp.int32(block_q))

    listed = parts.TileList(walk, count, entry)

    @pl.when(warpgroup < deal.consumers)
    def _compute():
      parts.set_registers(config.compute_registers, "increase")
      rows = pl.ds(tile * block_kv + deal.part(warpgroup) * ROWS, ROWS)
      own_k, own_v = k_sm.at[warpgroup], v_sm.at[warpgroup]
      pairs = [(k_gm.at[sample, rows, head], own_k), (v_gm.at[sample, rows, head], own_v)]
      parts.load_own(pairs, own_bar.at[warpgroup], count > 0)

      def attend(s, carry):
        (dk, dv), slot = carry, deal.slot(side, s)
        queries, lse, d_outs, delta = (ref.at[slot] for ref in (*q_ring.slots, *do_ring.slots))
        q_ring.wait(slot)
        x = parts.product(own_k, queries)
        lse = plgpu.load(lse, layout=LAYOUT.reduce(0))
        x = (x * sign if sign != 1 else x) * factor
        if biased:
          x = x + bias_gm[tile]
        x = x - parts.over_rows(lse)
        if walk.parts > 1:
          x = walk.hide(x, listed.entries(s))
        p = jnp.exp2(x)
        stage = [x.at[warpgroup] for x in staging]
        do_ring.wait(slot)
        # One in flight beside the other, not both products first: that would cost 16 registers, and there are none left.
        dv, dp = parts.accumulate_beside(dv, p.astype(q.dtype), d_outs, own_v, d_outs, *stage)
        delta = plgpu.load(delta, layout=LAYOUT.reduce(0))
        do_ring.release(slot)
        ds = (p * (dp - parts.over_rows(delta))).astype(q.dtype)
        dk = parts.accumulate(dk, ds, queries, *stage)
        q_ring.release(slot)
        return dk, dv

      dk, dv = lax.fori_loop(0, listed.steps, attend, (parts.zeros(d), parts.zeros(d)))
      valid = len_gm[parts.at(len_gm, sample, tile)] - deal.part(warpgroup) * ROWS
      seen = plgpu.broadcasted_iota(jnp.int32, (ROWS, d), 0, layout=LAYOUT) < valid
      own_k[...] = jnp.where(seen, dk * scale, 0.0).astype(q.dtype)
      own_v[...] = jnp.where(seen, dv, 0.0).astype(q.dtype)
      parts.store_own((own_k, dk_gm.at[sample, rows, head]), (own_v, dv_gm.at[sample, rows, head]))

    @pl.when(warpgroup >= deal.consumers)
    def _memory():
      def rows_of(ref):
        return lambda rows: ref.at[sample, rows, head]

      def numbers_of(ref):
        return lambda rows: ref.at[sample, head, rows]

      sources = (
        (q_ring, [rows_of(q_gm), numbers_of(lse_gm)]),
        (do_ring, [rows_of(do_gm), numbers_of(delta_gm)]),
      )
      parts.memory_warpgroup(listed, sources, deal, side, config.memory_registers)

  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  numbers = plgpu.SMEM((deal.slots, config.step), jnp.float32)
  ring = parts.Ring.types(walk, deal, tile_of(deal.slots, config.step, d), numbers)
  own = tile_of(deal.consumers, ROWS, d)
  own = (own, own, plgpu.Barrier(num_arrivals=2, num_barriers=deal.consumers))
  scratch = [own, (ring, ring), parts.staging_types(deal.consumers, config.step, q.dtype)]
  options = {
    "blocks": b * h * deal.blocks,
    "warpgroups": deal.warpgroups,
    "by_lane": config.by_lane,
  }
  out_type = (jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2
  return launch(
    attention_dkv, (data, lists, parts.in_log2(bias)), [out_type], scratch, cost=cost, **options
  )[0]
