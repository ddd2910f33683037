"""Attention by query tiles: each device attends with its own tokens, for all heads."""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from freqformer.kernels.around.prepare import prepare
from freqformer.kernels.block_sparse.api import attention
from freqformer.placement import CONTEXT, of_tokens
from freqformer.tables.exchange import TileExchange


def attend_exchanged(qkv, exchange: TileExchange) -> jax.Array:
  """Returns attention's output `[b, n_buffer, h, d]` by a table of which each device has its part.

  Args:
    qkv: the layer's `Projected`, projected together, its tokens split over `context`.
  """

  def local(product, bias, gains, positions, lengths, exchange):
    angles = qkv.angles(positions)
    others = qkv.other_ops_implementation
    q, k, v, *_ = prepare(
      product, bias, gains, angles, lengths, over_heads=qkv.over_heads, implementation=others
    )
    keys, values = (exchange.gather(x, CONTEXT) for x in (k, v))
    out, _ = attention(q, keys, values, exchange.table(), implementation=qkv.implementation)
    return out

  tokens = of_tokens(len(qkv.product))
  everywhere = PartitionSpec()
  by_tile = PartitionSpec(CONTEXT)
  layout = qkv.layout
  run = jax.shard_map(
    local, in_specs=(tokens, everywhere, everywhere, by_tile, by_tile, by_tile), out_specs=tokens
  )
  own = dataclasses.replace(exchange, whole=None)
  return run(qkv.product, qkv.bias, qkv.gains, layout.positions, layout.kv_len, own)
