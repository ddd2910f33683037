"""The backward in two kernels: dQ walks the forward lists, dK and dV walk the transposed ones.

Neither uses atomics, hence both are deterministic. P is recomputed from the scores and the row's
LSE; dS = P (dO V^T - delta), where delta already carries -dLSE. Both kernels recompute P and dP:
7 products per pair of tiles instead of the 5 of a single pass with atomic adds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.hopper_forward import QueryLists, Settings
from freqformer.kernels.core import log2
from freqformer.kernels.hopper import products
from freqformer.kernels.hopper import ring as rings
from freqformer.kernels.hopper.launch import set_registers
from freqformer.kernels.hopper.machine import ROWS
from freqformer.kernels.hopper.products import LAYOUT, PER_COLUMN, PER_ROW
from freqformer.kernels.hopper.ring import Feed, Ring, head_numbers, head_rows
from freqformer.kernels.hopper.tile_walk import TileList, TileWalk, broadcast_index, place_of
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Inputs(NamedTuple):
  """Arrays that both kernels read.

  Attributes:
    q, d_out: `[b, n_q, h, d]`, bf16 or f16.
    k, v: `[b, n_kv, h, d]`.
    lse: float32 `[b, h, n_q]` in log2 units, large where a row sees nothing.
    delta: float32 `[b, h, n_q]`.
  """

  q: Any
  k: Any
  v: Any
  d_out: Any
  lse: Any
  delta: Any


class KeyLists(NamedTuple):
  """Query tiles that read each key tile, int32, as `lists.by_key` makes them.

  Attributes:
    starts, counts: `[b or 1, h or 1, kv_tiles]`.
    readers: `[b or 1, h or 1, list]`.
    kv_len: `[b or 1, kv_tiles]`, valid rows.
    order: `[b * h]`, `lists.order_of_call`; None for heads as they are numbered.
  """

  starts: Any
  counts: Any
  readers: Any
  kv_len: Any
  order: Any

  def of_tile(self, walk: TileWalk, sample, head, tile) -> TileList:
    """Returns the list of one key tile, read inside a kernel; all rows of query tiles count."""
    count = self.counts[broadcast_index(self.counts, sample, head, tile)]
    start = self.starts[broadcast_index(self.starts, sample, head, tile)]

    def entry(i):
      reader = self.readers[(*broadcast_index(self.readers, sample, head), start + i)]
      return reader, jnp.int32(walk.block)

    return TileList(walk, count, entry)


def dq(inputs: Inputs, lists: QueryLists, bias, settings: Settings):
  """Returns the queries' gradient, `[b, n_q, h, d]` in their dtype; bias `[kv_tiles]` or None."""
  b, n, h, d = inputs.q.shape
  dtype = inputs.q.dtype
  tuning = settings.tuning
  deal = settings.deal(n, settings.block_q)
  walk = TileWalk(tuning.step, settings.block_kv)
  biased = bias is not None
  sign, factor = log2.split_scale(settings.scale)

  def attention_dq(inputs, lists, bias_gm, dq_gm, *scratch):
    q_sm, do_sm, lse_sm, delta_sm, arrived, k_ring, v_ring, staging = scratch
    (keys,) = k_ring.slots
    (values,) = v_ring.slots
    warpgroup = lax.axis_index("warpgroup")
    sample, head, place = place_of(lax.axis_index("block"), deal.blocks, h, lists.order)
    side = deal.side(warpgroup)
    tile = deal.tile(place, side)
    listed = lists.of_tile(walk, sample, head, tile)

    @pl.when(warpgroup < deal.consumers)
    def compute_warpgroup():
      set_registers(tuning.compute_registers, "increase")
      rows = pl.ds(tile * settings.block_q + deal.part(warpgroup) * ROWS, ROWS)
      q_own, do_own, lse_own, delta_own = (
        ref.at[warpgroup] for ref in (q_sm, do_sm, lse_sm, delta_sm)
      )
      pairs = [
        (inputs.q.at[sample, rows, head], q_own),
        (inputs.d_out.at[sample, rows, head], do_own),
        (inputs.lse.at[sample, head, rows], lse_own),
        (inputs.delta.at[sample, head, rows], delta_own),
      ]
      rings.load_own(pairs, arrived.at[warpgroup], listed.count > 0)
      lse = plgpu.load(lse_own, layout=PER_ROW)
      delta = plgpu.load(delta_own, layout=PER_ROW)

      def kv_loop(s, acc):
        slot = deal.slot(side, s)
        entries = listed.entries(s)
        # Scores and dP.
        k_ring.wait(slot)
        v_ring.wait(slot)
        x, dp = products.two_products(q_own, keys.at[slot], do_own, values.at[slot])
        v_ring.release(slot)
        # P, and dS in 16 bits.
        x = walk.hide(x * sign if sign != 1 else x, entries) * factor
        if biased:
          x = x + walk.spread([bias_gm[part.tile] for part in entries])
        p = jnp.exp2(x - products.over_columns(lse, tuning.step))
        ds = (p * (dp - products.over_columns(delta, tuning.step))).astype(dtype)
        # dQ.
        acc = products.accumulate(acc, ds, keys.at[slot], *(x.at[warpgroup] for x in staging))
        k_ring.release(slot)
        return acc

      acc = lax.fori_loop(0, listed.steps, kv_loop, products.zeros(d))
      q_own[...] = (acc * settings.scale).astype(dtype)
      rings.store_own((q_own, dq_gm.at[sample, rows, head]))

    @pl.when(warpgroup >= deal.consumers)
    def memory_warpgroup():
      keys_feed = Feed(k_ring, [head_rows(inputs.k, sample, head)])
      values_feed = Feed(v_ring, [head_rows(inputs.v, sample, head)])
      rings.fill_rings(listed, [keys_feed, values_feed], deal, side, tuning.memory_registers)

  rows_type = products.tiles_type(deal.consumers, ROWS, d, dtype=dtype)
  numbers_type = plgpu.SMEM((deal.consumers, ROWS), jnp.float32)
  ring = Ring.types(walk, deal, products.tiles_type(deal.slots, tuning.step, d, dtype=dtype))
  scratch = [
    rows_type,  # queries, then dQ
    rows_type,  # dO
    numbers_type,  # LSE
    numbers_type,  # delta
    plgpu.Barrier(num_arrivals=4, num_barriers=deal.consumers),  # a warpgroup's have arrived
    ring,
    ring,
    products.staging_types(deal.consumers, tuning.step, dtype),
  ]
  out_type = [jax.ShapeDtypeStruct(inputs.q.shape, dtype)]
  operands = (inputs, lists, log2.in_log2(bias))
  (found,) = settings.launch(attention_dq, operands, out_type, scratch, deal, b * h)
  return found


def dkv(inputs: Inputs, lists: KeyLists, bias, settings: Settings):
  """Returns gradients of keys and values, `[b, n_kv, h, d]` in their dtype; 0 in padding rows."""
  b, n, h, d = inputs.k.shape
  dtype = inputs.k.dtype
  tuning = settings.tuning
  deal = settings.deal(n, settings.block_kv)
  walk = TileWalk(tuning.step, settings.block_q)
  biased = bias is not None
  sign, factor = log2.split_scale(settings.scale)

  def attention_dkv(inputs, lists, bias_gm, dk_gm, dv_gm, *scratch):
    k_sm, v_sm, arrived, q_ring, do_ring, staging = scratch
    warpgroup = lax.axis_index("warpgroup")
    sample, head, place = place_of(lax.axis_index("block"), deal.blocks, h, lists.order)
    side = deal.side(warpgroup)
    tile = deal.tile(place, side)
    listed = lists.of_tile(walk, sample, head, tile)

    @pl.when(warpgroup < deal.consumers)
    def compute_warpgroup():
      set_registers(tuning.compute_registers, "increase")
      rows = pl.ds(tile * settings.block_kv + deal.part(warpgroup) * ROWS, ROWS)
      k_own = k_sm.at[warpgroup]
      v_own = v_sm.at[warpgroup]
      pairs = [(inputs.k.at[sample, rows, head], k_own), (inputs.v.at[sample, rows, head], v_own)]
      rings.load_own(pairs, arrived.at[warpgroup], listed.count > 0)

      def q_loop(s, carry):
        dk, dv = carry
        slot = deal.slot(side, s)
        queries, lse, d_outs, delta = (ref.at[slot] for ref in (*q_ring.slots, *do_ring.slots))
        # Scores, transposed: keys are the rows.
        q_ring.wait(slot)
        x = products.product(k_own, queries)
        lse = plgpu.load(lse, layout=PER_COLUMN)
        x = (x * sign if sign != 1 else x) * factor
        if biased:
          x = x + bias_gm[tile]
        x = x - products.over_rows(lse)
        if walk.parts > 1:
          x = walk.hide(x, listed.entries(s))
        p = jnp.exp2(x)
        # dV and dP. One in flight with the other, not both products of a stage first: that would
        # cost 16 registers, and there are none left.
        stage = [x.at[warpgroup] for x in staging]
        do_ring.wait(slot)
        dv, dp = products.accumulate_beside(dv, p.astype(dtype), d_outs, v_own, d_outs, *stage)
        delta = plgpu.load(delta, layout=PER_COLUMN)
        do_ring.release(slot)
        # dK.
        ds = (p * (dp - products.over_rows(delta))).astype(dtype)
        dk = products.accumulate(dk, ds, queries, *stage)
        q_ring.release(slot)
        return dk, dv

      dk, dv = lax.fori_loop(0, listed.steps, q_loop, (products.zeros(d), products.zeros(d)))
      valid = lists.kv_len[broadcast_index(lists.kv_len, sample, tile)]
      valid = valid - deal.part(warpgroup) * ROWS
      seen = plgpu.broadcasted_iota(jnp.int32, (ROWS, d), 0, layout=LAYOUT) < valid
      k_own[...] = jnp.where(seen, dk * settings.scale, 0.0).astype(dtype)
      v_own[...] = jnp.where(seen, dv, 0.0).astype(dtype)
      rings.store_own((k_own, dk_gm.at[sample, rows, head]), (v_own, dv_gm.at[sample, rows, head]))

    @pl.when(warpgroup >= deal.consumers)
    def memory_warpgroup():
      pair = (sample, head)
      q_feed = Feed(q_ring, [head_rows(inputs.q, *pair), head_numbers(inputs.lse, *pair)])
      do_feed = Feed(do_ring, [head_rows(inputs.d_out, *pair), head_numbers(inputs.delta, *pair)])
      rings.fill_rings(listed, [q_feed, do_feed], deal, side, tuning.memory_registers)

  rows_type = products.tiles_type(deal.consumers, ROWS, d, dtype=dtype)
  ring = Ring.types(
    walk,
    deal,
    products.tiles_type(deal.slots, tuning.step, d, dtype=dtype),
    plgpu.SMEM((deal.slots, tuning.step), jnp.float32),
  )
  scratch = [
    rows_type,  # keys, then dK
    rows_type,  # values, then dV
    plgpu.Barrier(num_arrivals=2, num_barriers=deal.consumers),  # a warpgroup's have arrived
    ring,
    ring,
    products.staging_types(deal.consumers, tuning.step, dtype),
  ]
  out_type = [jax.ShapeDtypeStruct(inputs.k.shape, dtype)] * 2
  operands = (inputs, lists, log2.in_log2(bias))
  return settings.launch(attention_dkv, operands, out_type, scratch, deal, b * h)
