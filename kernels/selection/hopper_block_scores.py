"""The Hopper kernel of `kernels.selection.block_scores`: attention's forward without v.

It keeps one number per key tile. A thread block takes one query tile of one head and walks all key
tiles. Two compute warpgroups (one for 64-row tiles) keep 64 query rows each; a third moves keys
through a ring. Probabilities add up along keys in registers. Across rows they would have to cross
the warps at every key tile, so row sums of `COLLECT` tiles wait in shared memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from freqformer.kernels.core.log2 import LOG2E
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper.launch import launch
from freqformer.kernels.hopper.machine import MULTIPROCESSORS, ROWS, wrong_device
from freqformer.kernels.hopper.products import LAYOUT, PER_ROW, over_columns, product, tiles_type
from freqformer.kernels.hopper.ring import Feed, Ring, fill_rings, head_rows, load_own
from freqformer.kernels.hopper.tile_walk import Deal, TileList, TileWalk, broadcast_index, place_of
from freqformer.kernels.selection.block_scores import LARGEST_EXPONENT, row_shifts
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

STAGES = 4
COLLECT = 64  # key tiles whose row sums are added up at once: the rows of one warpgroup's array
# choice: masses that the kernel writes before `reduce` sees them, and query tiles that should run
# together at least: four rounds of thread blocks, one per multiprocessor. Not measured.
_MASSES = 1 << 23
_LEAST_BLOCKS = 4 * MULTIPROCESSORS
HEAD_DIMS = (32, 64, 128)
BLOCKS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported(q, block: int, target: Target) -> str | None:
  """Returns all reasons why the kernel cannot run on q and k, as one clause; None if it can."""
  reasons = [wrong_device(target)]
  if q.dtype not in DTYPES or q.shape[-1] not in HEAD_DIMS or block not in BLOCKS:
    reasons.append(
      f"q is {q.dtype} with head_dim {q.shape[-1]} in tiles of {block} rows, it takes bfloat16 or "
      f"float16, one of {HEAD_DIMS} and one of {BLOCKS}"
    )
  return "; ".join(filter(None, reasons)) or None


def row_mass(q, k, lse, kv_len, first, *, count: int, scale: float) -> jax.Array:
  """Computes the mass of consecutive query tiles on the key tiles, float32 `[count, tiles]`.

  Args:
    q, k: `[b, n, h, d]`.
    lse: float32 `[b, h, n]` in log2 units, inf for rows that count nothing.
    kv_len: int32 `[b or 1, tiles]`, valid rows of each tile.
    first: int32 `[1]`, number of the first query tile, `(sample * h + head) * tiles + tile`.
    count: number of query tiles; those after the last are the last one again.
    scale: multiplies q k^T.
  """
  b, n, h, d = q.shape
  tiles = kv_len.shape[-1]
  block = n // tiles
  deal = Deal(tiles, 1, block // ROWS, STAGES)
  groups = -(-tiles // COLLECT)
  consumers = deal.consumers
  walk = TileWalk(block, block)  # a stage is one key tile

  def block_mass(q_gm, k_gm, lse_gm, len_gm, first_gm, out_gm, own, k_ring, sums):
    q_sm, lse_sm, own_arrived = own
    collected, added = sums
    (keys,) = k_ring.slots
    program = lax.axis_index("block")
    number = jnp.minimum(first_gm[0] + program, jnp.int32(b * h * tiles - 1))
    sample, head, tile = place_of(number, tiles, h)

    def entry(i):
      return i, len_gm[broadcast_index(len_gm, sample, i)]

    every = TileList(walk, jnp.int32(tiles), entry)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < consumers)
    def compute_warpgroup():
      rows = pl.ds(tile * block + warpgroup * ROWS, ROWS)
      mine = q_sm.at[warpgroup]
      lse_own = lse_sm.at[warpgroup]
      pairs = [(q_gm.at[sample, rows, head], mine), (lse_gm.at[sample, head, rows], lse_own)]
      load_own(pairs, own_arrived.at[warpgroup], tiles > 0)
      shift = plgpu.load(lse_own, layout=PER_ROW)

      def add_up(s):
        """Adds the row sums of the last stages up to a number each, and sends them."""
        plgpu.commit_smem()  # every warp has written its rows
        found = plgpu.load(collected.at[warpgroup], layout=LAYOUT, optimized=False).sum(axis=1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        added.at[warpgroup][...] = found
        plgpu.commit_smem()  # also: every warp has read the sums, which are overwritten next
        group = pl.ds(lax.div(s, jnp.int32(COLLECT)) * COLLECT, COLLECT)
        plgpu.copy_smem_to_gmem(added.at[warpgroup], out_gm.at[program, warpgroup, group])

      @pl.loop(0, every.steps)
      def kv_loop(s):
        slot = deal.slot(0, s)
        entries = every.entries(s)
        k_ring.wait(slot)
        x = product(mine, keys.at[slot])
        k_ring.release(slot)
        x = walk.hide(x * (scale * LOG2E), entries) - over_columns(shift, block)
        p = jnp.exp2(jnp.minimum(x, LARGEST_EXPONENT * LOG2E))
        collected.at[warpgroup, lax.rem(s, jnp.int32(COLLECT))][...] = p.sum(axis=1)
        last = jnp.logical_or(lax.rem(s, jnp.int32(COLLECT)) == COLLECT - 1, s == every.steps - 1)
        pl.when(last)(functools.partial(add_up, s))

      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == consumers)
    def memory_warpgroup():
      fill_rings(every, [Feed(k_ring, [head_rows(k_gm, sample, head)])], deal, 0, 0)

  own = (
    tiles_type(consumers, ROWS, d, dtype=q.dtype),
    plgpu.SMEM((consumers, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
  )
  sums = (
    plgpu.SMEM((consumers, COLLECT, ROWS), jnp.float32),
    plgpu.SMEM((consumers, COLLECT), jnp.float32),
  )
  out = jax.ShapeDtypeStruct((count, consumers, groups * COLLECT), jnp.float32)
  pairs = count * block * n
  rows = count * block + -(-count // tiles) * n  # of queries, and of the heads' keys, once
  cost = pl.CostEstimate(
    flops=2 * pairs * d,
    transcendentals=pairs,
    bytes_accessed=rows * d * q.dtype.itemsize + math.prod(out.shape) * 4,
  )
  (found,) = launch(
    block_mass,
    (q, k, lse, kv_len, first),
    [out],
    [own, Ring.types(walk, deal, tiles_type(STAGES, block, d, dtype=q.dtype)), sums],
    blocks=count,
    cost=cost,
    warpgroups=deal.warpgroups,
    by_lane=True,
  )
  return found.sum(1)[:, :tiles]


def forward(q, k, lse, kv_len, *, block, scale, reduce):
  """Runs chunks of query tiles of all heads in turn, each a launch."""
  b, n, h, _ = q.shape
  tiles = kv_len.shape[-1]
  shifts = (row_shifts(lse, kv_len, block) * LOG2E).reshape(b, h, n)
  total = b * h * tiles
  chunks = -(-total // min(total, max(_LEAST_BLOCKS, _MASSES // tiles)))
  count = -(-total // chunks)

  def one(first):
    tables = (q, k, shifts, kv_len, first[None])
    mass = row_mass(*tables, count=count, scale=scale)
    if reduce is None:
      return mass
    return reduce(mass, (first + jnp.arange(count, dtype=jnp.int32)) % tiles)

  found = lax.map(one, jnp.arange(chunks, dtype=jnp.int32) * count)
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[:total].reshape(b, h, tiles, *x.shape[2:]), found
  )
