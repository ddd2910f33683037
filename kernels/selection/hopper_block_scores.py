"""The Hopper kernel of `kernels.selection.block_scores`: attention's forward kernel without v, which keeps one number per tile.

A thread block takes one query tile of one head and walks all key tiles. Two compute warpgroups (one for 64-row tiles) keep 64
query rows each; a third moves keys through a ring. Probabilities are added up along keys in registers. Across rows they would
have to cross the warps at every key tile, so row sums of `COLLECT` key tiles wait in shared memory and are added up together.
"""

import functools
import math

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch
from freqformer.kernels.hopper.parts import LAYOUT, ROWS
from freqformer.kernels.selection.block_scores import LARGEST_EXPONENT, row_shifts
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

STAGES = 4
COLLECT = 64  # key tiles whose row sums are added up at once: the rows of one warpgroup's array
# choice: masses that the kernel writes before `reduce` sees them, and query tiles that should run
# together at least: four rounds of thread blocks on 132 multiprocessors. Not measured.
_MASSES = 1 << 23
_LEAST_BLOCKS = 528
HEAD_DIMS, BLOCKS, DTYPES = (32, 64, 128), (64, 128), (jnp.bfloat16, jnp.float16)


def unsupported(q, block: int, target) -> str | None:
  """Returns why the kernel cannot run on q and k, all reasons at once; None if it can."""
  reasons = [reason for reason in [parts.wrong_device(target)] if reason]
  if q.dtype not in DTYPES or q.shape[-1] not in HEAD_DIMS or block not in BLOCKS:
    reasons.append(
      f"q is {q.dtype} with head_dim {q.shape[-1]} in tiles of {block} rows, it takes bfloat16 or "
      f"float16, one of {HEAD_DIMS} and one of {BLOCKS}"
    )
  return "; ".join(reasons) or None


def row_mass(data, place, scale: float, largest: float):
  """Mass of consecutive query tiles on every key tile of their heads.

  Args:
    data: q, k `[b, n, h, d]`; lse in log2 units, float32 `[b, h, n]`, inf for rows that count nothing; kv_len int32
      `[b or 1, tiles]`.
    place: `(first, count)`: int32 `[1]`, the number of the first query tile, `(sample * h + head) * tiles + tile`, and how
      many; tiles behind the last are the last one again.
    scale: multiplies q k^T. largest: where the exponent is cut, natural units.

  Returns:
    float32 `[count, tiles]`.
  """
  (q, k, lse, kv_len), (first, count) = data, place
  (b, n, h, d), tiles = q.shape, kv_len.shape[-1]
  block = n // tiles
  deal, groups = parts.Deal(tiles, 1, block // ROWS, STAGES), -(-tiles // COLLECT)
  consumers = deal.consumers
  walk = parts.Walk(block, block)  # a stage is one key tile

  def block_mass(data, out_gm, own, rings, sums):
    (q_gm, k_gm, lse_gm, len_gm, first_gm), (q_sm, lse_sm, own_bar), (k_ring,) = data, own, rings
    collected, added = sums
    program = lax.axis_index("block")
    flat = jnp.minimum(first_gm[0] + program, jnp.int32(b * h * tiles - 1))
    tile, pair = lax.rem(flat, jnp.int32(tiles)), lax.div(flat, jnp.int32(tiles))
    sample, head = lax.div(pair, jnp.int32(h)), lax.rem(pair, jnp.int32(h))
    every = parts.TileList(
      walk, jnp.int32(tiles), lambda i: (i, len_gm[parts.at(len_gm, sample, i)])
    )
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < consumers)
    def _compute():
      rows = pl.ds(tile * block + warpgroup * ROWS, ROWS)
      mine, numbers = q_sm.at[warpgroup], lse_sm.at[warpgroup]
      pairs = [(q_gm.at[sample, rows, head], mine), (lse_gm.at[sample, head, rows], numbers)]
      parts.load_own(pairs, own_bar.at[warpgroup], tiles > 0)
      shift = plgpu.load(numbers, layout=LAYOUT.reduce(1))

      def add_up(s):
        """Row sums of the last stages to a number each, and to where it belongs."""
        plgpu.commit_smem()  # every warp has written its rows
        found = plgpu.load(collected.at[warpgroup], layout=LAYOUT, optimized=False).sum(axis=1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        added.at[warpgroup][...] = found
        plgpu.commit_smem()  # also: every warp has read the sums, which are overwritten next
        group = pl.ds(lax.div(s, jnp.int32(COLLECT)) * COLLECT, COLLECT)
        plgpu.copy_smem_to_gmem(added.at[warpgroup], out_gm.at[program, warpgroup, group])

      @pl.loop(0, every.steps)
      def _stage(s):
        slot, (keys,) = deal.slot(0, s), k_ring.slots
        entries = every.entries(s)
        k_ring.wait(slot)
        x = parts.product(mine, keys.at[slot])
        k_ring.release(slot)
        x = walk.hide(x * (scale * parts.LOG2E), entries) - parts.over_columns(shift, block)
        p = jnp.exp2(jnp.minimum(x, largest * parts.LOG2E))
        collected.at[warpgroup, lax.rem(s, jnp.int32(COLLECT))][...] = p.sum(axis=1)
        last = jnp.logical_or(lax.rem(s, jnp.int32(COLLECT)) == COLLECT - 1, s == every.steps - 1)
        pl.when(last)(functools.partial(add_up, s))

      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == consumers)
    def _memory():
      parts.memory_warpgroup(
        every, [(k_ring, [lambda rows: k_gm.at[sample, rows, head]])], deal, 0, 0
      )

  tile_of = functools.partial(parts.tiles_type, dtype=q.dtype)
  ring = parts.Ring.types(walk, deal, tile_of(STAGES, block, d))
  own = (
    tile_of(consumers, ROWS, d),
    plgpu.SMEM((consumers, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
  )
  sums = (
    plgpu.SMEM((consumers, COLLECT, ROWS), jnp.float32),
    plgpu.SMEM((consumers, COLLECT), jnp.float32),
  )
  out = jax.ShapeDtypeStruct((count, consumers, groups * COLLECT), jnp.float32)
  options = {
    "blocks": count,
    "warpgroups": deal.warpgroups,
    "by_lane": True,
    "cost": _cost(q, block, count, out),
  }
  operands, scratch = (q, k, lse, kv_len, first), [own, (ring,), sums]
  (found,) = launch(block_mass, [operands], [out], scratch, **options)
  return found.sum(1)[:, :tiles]


def _cost(q, block: int, count: int, out) -> pl.CostEstimate:
  """2 FLOPs per pair and channel and an exponential per pair; keys of the heads that take part once."""
  _, n, h, d = q.shape
  pairs, heads = count * block * n, -(-count // max(1, n // block))
  moved = (count * block + heads * n) * d * q.dtype.itemsize + math.prod(out.shape) * 4
  return pl.CostEstimate(flops=2 * pairs * d, transcendentals=pairs, bytes_accessed=moved)


def forward(q, k, lse, kv_len, *, block, scale, reduce):
  """Runs chunks of query tiles of all heads in turn, each a launch."""
  (b, n, h, _), tiles = q.shape, kv_len.shape[-1]
  shifts = (row_shifts(lse, kv_len, block) * math.log2(math.e)).reshape(b, h, n)
  total = b * h * tiles
  chunks = -(-total // min(total, max(_LEAST_BLOCKS, _MASSES // tiles)))
  count = -(-total // chunks)

  def one(first):
    mass = row_mass((q, k, shifts, kv_len), (first[None], count), scale, LARGEST_EXPONENT)
    if reduce is None:
      return mass
    return reduce(mass, (first + jnp.arange(count, dtype=jnp.int32)) % tiles)

  found = lax.map(one, jnp.arange(chunks, dtype=jnp.int32) * count)
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[:total].reshape(b, h, tiles, *x.shape[2:]), found
  )
