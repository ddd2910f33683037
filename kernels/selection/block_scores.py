"""Exact softmax mass per (query tile, key tile), from a row LSE that is already known.

    mass[I, J] = sum over valid rows i of query tile I and valid keys j of key tile J of exp(scale q_i k_j - LSE_i)

With the true LSE a query tile's mass sums to its number of valid rows; with an LSE cached at another denoising step, or one
per tile, it is an estimate whose rows need not sum to that. AdaSpa (arXiv 2502.21079) searches its masks with it.

One pass over q and k without v: 2 of attention's 4 FLOPs per pair and channel. Nothing of size n x n exists: scores of one
group of query tiles against one chunk of keys do, and with `reduce` not even the masses of a whole head.

On Hopper a kernel does it (`hopper_block_scores.py`) and scores stay in registers. Elsewhere `_row_mass` does, one group of query
rows against all keys of its head, and its scores pass through memory.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from freqformer.kernels.core.dispatch import choose
from freqformer.kernels.core.partition import by_sample_and_head, several_devices
from freqformer.kernels.core.target import Target, current_target
from jax import lax

BACKENDS = ("pallas_mgpu", "xla")
# Scores of one step. On 2 CPU cores 1,024 x 1,024 was the fastest shape tried. On a GPU each step is a launch of a few kernels,
# so it must be larger; 2^26 (256 MB) is a guess that no GPU has seen yet.
_SCORES = {"cpu": 1 << 20}
_SCORES_ELSEWHERE = 1 << 26
_GROUP_ROWS = 1024  # query rows that run together, at most
# exp's argument is cut here: a cached LSE may be far below today's scores, and infinite masses could not be compared.
_LARGEST = 60.0
# Masses that the kernel writes before `reduce` sees them, and query tiles that should run together at least: four rounds of
# thread blocks on 132 multiprocessors. Ours; no GPU has seen them yet.
_MASSES, _LEAST_BLOCKS = 1 << 23, 528


def block_mass(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  kv_len,
  block: int,
  *,
  scale: float | None = None,
  reduce: Callable | None = None,
  implementation: str | None = None,
):
  """Mass of every pair of tiles, or what `reduce` makes of it.

  Args:
    q, k: `[b, n, h, d]`, the same buffer of tiles; what padding rows hold is not seen.
    lse: natural log, any float dtype: `[b, h, n]` per row, or `[b, h, tiles]` one for all rows of a query tile (told apart
      by their length; a row whose LSE is not finite counts nothing).
    kv_len: int32 `[tiles]` or `[b, tiles]`, valid rows per tile, valid first: of keys, and of queries.
    block: rows of a tile.
    scale: multiplies q k^T; default `1 / sqrt(d)`.
    reduce: `(mass [g, tiles], query tiles int32 [g]) -> pytree of [g, ...]`, row by row; applied to each group of query tiles
      as soon as it is known, so that masses of all heads never exist together. A group may hold tiles of several heads, and
      rows that are none: what it returns for them is dropped.
    implementation: a name of `BACKENDS`, or None for the first that supports the call.

  Returns:
    float32 `[b, h, tiles, tiles]`, or `reduce`'s pytree with leading `[b, h, tiles]`.

  Raises:
    ValueError: if shapes contradict each other, or for an unknown implementation.
    NotImplementedError: if the named implementation does not support the call, with the reason.
  """
  b, n, h, d = q.shape
  kv_len = jnp.asarray(kv_len)
  tiles = kv_len.shape[-1]
  if q.shape != k.shape or n != tiles * block:
    raise ValueError(
      f"block_mass takes q, k over one buffer of {tiles} tiles of {block} rows; got {q.shape=}, {k.shape=}."
    )
  if lse.shape not in ((b, h, n), (b, h, tiles)):
    raise ValueError(
      f"lse must be [b, h, n] = {(b, h, n)} or [b, h, tiles] = {(b, h, tiles)}, got {lse.shape}."
    )
  scale = 1.0 / math.sqrt(d) if scale is None else float(scale)
  if choose_backend(q, block, implementation) == "pallas_mgpu":
    return _split(functools.partial(_fused, block, scale, reduce), q, k, lse, kv_len)
  return _portable(block, scale, reduce, q, k, lse, kv_len)


def choose_backend(
  q, block: int, implementation: str | None = None, target: Target | None = None
) -> str:
  """The name of the backend that `block_mass` would run; raises as it does."""
  if implementation not in (None, *BACKENDS):
    raise ValueError(
      f"{implementation=} is unknown; choose one of {', '.join(BACKENDS)} or None for automatic choice."
    )
  # Pallas is imported where it is used
  from freqformer.kernels.selection import hopper_block_scores as hopper_block_scores

  target = current_target() if target is None else target

  def refused(name):
    return hopper_block_scores.unsupported(q, block, target) if name == "pallas_mgpu" else None

  return choose("block mass", BACKENDS, refused, implementation, target)


# ---- on Hopper -------------------------------------------------------------------------------------------------------


def _split(run, q, k, lse, kv_len):
  """`run`, on several devices split along samples and heads."""
  if not several_devices():
    return run(q, k, lse, kv_len)
  dims = ["b.h."] * 2 + ["bh.", "b." if kv_len.ndim == 2 else "."]
  results = jax.tree.map(
    lambda x: "bh" + "." * (x.ndim - 2), jax.eval_shape(run, q, k, lse, kv_len)
  )
  return by_sample_and_head(run, (q, k, lse, kv_len), dims, results)


def _fused(block, scale, reduce, q, k, lse, kv_len):
  """Chunks of query tiles of all heads in turn, each a launch."""
  from freqformer.kernels.selection import hopper_block_scores

  (b, n, h, _), tiles = q.shape, kv_len.shape[-1]
  shifts = _shifts(lse, kv_len.reshape(-1, tiles), block)
  shifts = (shifts * math.log2(math.e)).reshape(b, h, n)
  total = b * h * tiles
  chunks = -(-total // min(total, max(_LEAST_BLOCKS, _MASSES // tiles)))
  count = -(-total // chunks)

  def one(first):
    mass = hopper_block_scores.row_mass(
      q, k, shifts, kv_len.reshape(-1, tiles), first[None], count=count, scale=scale, largest=_LARGEST
    )
    return (
      mass if reduce is None else reduce(mass, (first + jnp.arange(count, dtype=jnp.int32)) % tiles)
    )

  found = lax.map(one, jnp.arange(chunks, dtype=jnp.int32) * count)
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[:total].reshape(b, h, tiles, *x.shape[2:]), found
  )


def _shifts(lse, kv_len, block: int):
  """float32 `[b, h, tiles, block]`: what is taken from a row's scores; inf for rows that count nothing."""
  b, h, tiles = *lse.shape[:2], kv_len.shape[-1]
  valid = jnp.arange(block) < kv_len[:, None, :, None]
  shifts = jnp.broadcast_to(lse.astype(jnp.float32).reshape(b, h, tiles, -1), (b, h, tiles, block))
  return jnp.where(valid & jnp.isfinite(shifts), shifts, jnp.inf)


# ---- anywhere --------------------------------------------------------------------------------------------------------


def _portable(block, scale, reduce, q, k, lse, kv_len):
  """Head after head, group after group."""
  (b, _, h, d), tiles = q.shape, kv_len.shape[-1]
  group = max(1, min(tiles, _GROUP_ROWS // block))
  filler = -tiles % group
  numbers = jnp.arange(tiles + filler, dtype=jnp.int32).reshape(-1, group)

  def head(i):
    sample, number = i // h, i % h
    valid = (
      jnp.arange(block) < kv_len.reshape(-1, tiles)[sample if kv_len.ndim == 2 else 0][:, None]
    )
    queries, keys = (_head(x, sample, number).reshape(tiles, block, d) for x in (q, k))
    shifts = jnp.broadcast_to(
      lse[sample, number].astype(jnp.float32).reshape(tiles, -1), (tiles, block)
    )
    shifts = jnp.where(valid & jnp.isfinite(shifts), shifts, jnp.inf)
    queries = jnp.pad(queries, ((0, filler), (0, 0), (0, 0))).reshape(-1, group, block, d)
    shifts = jnp.pad(shifts, ((0, filler), (0, 0)), constant_values=jnp.inf).reshape(
      -1, group, block
    )

    def rows(args):
      mass = _row_mass(args[0], args[1], keys, valid, scale)
      return mass if reduce is None else reduce(mass, args[2])

    found = lax.map(rows, (queries, shifts, numbers))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tiles], found)

  found = lax.map(head, jnp.arange(b * h))
  return jax.tree.map(lambda x: x.reshape(b, h, *x.shape[1:]), found)


def _head(x, sample, head):
  """One head's rows: `[b, n, h, d] -> [n, d]`."""
  b, n, h, d = x.shape
  return lax.dynamic_slice(x, (sample, 0, head, 0), (1, n, 1, d)).reshape(n, d)


def _row_mass(queries, shifts, keys, valid, scale):
  """Mass of a group of query tiles on every key tile of its head.

  Args:
    queries: `[g, block, d]`; shifts: `[g, block]`, their LSE, inf for rows that count nothing.
    keys: `[tiles, block, d]`; valid: bool `[tiles, block]`.

  Returns:
    float32 `[g, tiles]`.
  """
  group, block, d = queries.shape
  tiles = keys.shape[0]
  most = max(
    1, _SCORES.get(current_target().platform, _SCORES_ELSEWHERE) // (group * block * block)
  )
  chunk = -(-tiles // -(-tiles // most))  # equal chunks

  def pad(x):
    return jnp.pad(x, ((0, -tiles % chunk),) + ((0, 0),) * (x.ndim - 1)).reshape(
      -1, chunk * block, *x.shape[2:]
    )

  def step(args):
    keys, seen = args
    scores = jnp.einsum(
      "gid,jd->gij", queries, keys, precision="highest", preferred_element_type=jnp.float32
    )
    p = jnp.where(seen, jnp.exp(jnp.minimum(scores * scale - shifts[..., None], _LARGEST)), 0)
    return (
      p.sum(1).reshape(group, chunk, block).sum(-1)
    )  # rows first: one fast reduction, then a small one

  valid = valid[..., None]
  return (
    lax.map(step, (pad(jnp.where(valid, keys, 0)), pad(valid)[..., 0]))
    .transpose(1, 0, 2)
    .reshape(group, -1)[:, :tiles]
  )
