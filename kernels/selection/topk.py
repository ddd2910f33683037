"""Exact top-k as ascending lists, without a sort: threshold, a bit per candidate, set bits' places.

The rank of the best tiles among themselves does not matter. Floats are read as unsigned integers of
the same order; counting how many reach a few trial values brackets the k-th largest. What lies
above is packed into words of 32 candidates, ties from the left, and a search over word counts finds
the r-th set bit. `forward` defines the threshold; on Hopper a kernel finds it (`hopper_topk.py`).
`top_tiles` computes, selects and drops scores chunk by chunk, never all at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.op import Op, Split
from freqformer.kernels.core.target import current_target
from jax import lax

# Scores of one chunk. On 2 CPU cores 2^20 beat 2^18 and 2^22, at 2K and 4K tiles. A GPU pays for
# launches, so it takes more. choice: 2^25 scores (128 MB), a guess that has not been measured.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 25
# 2^bits - 1 trial values per pass. On a CPU counting costs, elsewhere reading: XLA counts 7 in one
# read, 15 in two, and so few fewer passes (7, not 9, on normal scores) would not pay for that.
_BITS = {"cpu": 1}
_BITS_ELSEWHERE = 3
_INFINITY = np.uint32(0xFF800000)  # the ordered integer of +inf
_WORD = 32

TOP_K = Op(
  name="top-k",
  implementations={"hopper": "selection.hopper_topk", "xla": "selection.topk"},
  forward=Split(("bh", "."), "bh"),
)


def ordered_integers(x: jax.Array) -> jax.Array:
  """Returns uint32 in the order of the float32 values; -0 and 0 are one, NaN is beyond the ends."""
  sign = jnp.uint32(1 << 31)
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return jnp.where(bits > sign, ~bits, bits | sign)


def top_ids(
  scores: jax.Array, budget: int, always: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
  """Returns the ascending places of the `budget` largest scores of each row, int32 `[..., budget]`.

  Ties go to the lower place. Rows with NaN get some valid, ascending ids.

  Args:
    scores: float32 (or narrower) `[..., m]`.
    budget: 1..m.
    always: None, or int `[r, f]` for scores `[..., r, m]`: places that come first (may repeat).
    implementation: of `TOP_K.implementations`; None: the first that supports the call.

  Raises:
    ValueError: if the budget is not in 1..m, or the implementation is unknown.
    NotImplementedError: if the named implementation does not support the call, with the reason.
  """
  if budget == scores.shape[-1]:
    TOP_K.choose(scores, implementation=implementation)  # a named one is refused here, too
    return jnp.broadcast_to(jnp.arange(budget, dtype=jnp.int32), scores.shape)
  return places(top_words(scores, budget, always, implementation), budget)


def top_words(
  scores: jax.Array, budget: int, always: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
  """Returns the set of `top_ids` in bits, lowest first: uint32 `[..., ceil(m / 32)]`."""
  m = scores.shape[-1]
  if not 1 <= budget <= m:
    raise ValueError(f"{budget=} must lie in 1..{m}, the candidates of a row.")
  name = TOP_K.choose(scores, implementation=implementation)
  # Two leading axes, along which several devices share the rows.
  wide = scores[(None,) * max(0, 3 - scores.ndim)]
  threshold = TOP_K.run(name, (wide, always), budget=budget)
  keys = _keys(scores, always)
  return _chosen_words(keys, threshold.reshape(*scores.shape[:-1], 1), budget)


def forward(scores, always, *, budget):
  """Returns a value per row that `budget` keys reach and fewer exceed: uint32 `[...]`."""
  bits = _BITS.get(current_target().platform, _BITS_ELSEWHERE)
  # Rows stay in their axes here and below: merged, devices could not share them by heads.
  return _threshold(_keys(scores, always), budget, bits)[..., 0]


def _keys(scores, always):
  """Returns the scores' ordered integers, infinite in places that are always taken."""
  keys = ordered_integers(scores)
  if always is None:
    return keys
  place = jnp.arange(scores.shape[-1])
  for column in jnp.moveaxis(jnp.asarray(always), -1, 0):
    keys = jnp.where(place == column[:, None], _INFINITY, keys)
  return keys


def _threshold(keys, budget: int, bits: int):
  """Returns a value per row that at least `budget` keys reach and fewer exceed: uint32 `[..., 1]`.

  Invariant: `low` is reached by `reached >= budget` keys, `high` by fewer. A row is done when
  exactly `budget` reach `low` (its set is known) or when the bracket holds one value. Infinite
  scores (of fixed tiles) would stretch the bracket, so it starts at the largest finite one.
  """
  most = jnp.sum(keys >= _INFINITY, -1, dtype=jnp.int32, keepdims=True) >= budget
  low = jnp.where(most, _INFINITY, keys.min(-1, keepdims=True))
  finite = jnp.max(jnp.where(keys < _INFINITY, keys, 0), -1, keepdims=True)
  high = jnp.where(most, _INFINITY, jnp.maximum(finite, low)) + 1
  reached = jnp.where(most, budget, jnp.int32(keys.shape[-1]))

  def running(state):
    low, high, reached = state
    return jnp.any((reached != budget) & (high - low > 1))

  def narrow(state):
    low, high, reached = state
    step = ((high - low - 1) >> bits) + 1  # parts of the bracket, the last may be empty
    new_low = low
    new_high = jnp.minimum(low + step, high)
    new_reached = reached
    for part in range(1, 1 << bits):
      offset = part * step
      trial = low + offset
      inside = offset < high - low  # also keeps trials from wrapping around
      count = jnp.sum(keys >= trial, -1, dtype=jnp.int32, keepdims=True)
      up = inside & (count >= budget)
      new_low, new_reached = jnp.where(up, trial, new_low), jnp.where(up, count, new_reached)
      new_high = jnp.where(up, jnp.minimum(high - trial, step) + trial, new_high)
    done = reached == budget

    def keep(old, new):
      return jnp.where(done, old, new)

    return keep(low, new_low), keep(high, new_high), keep(reached, new_reached)

  return lax.while_loop(running, narrow, (low, high, reached))[0]


def _chosen_words(keys, threshold, budget: int):
  """Returns a bit per candidate `[..., words]`: above the threshold, then ties from the left."""
  above = _pack(keys > threshold)
  equal = _pack(keys == threshold)
  left = budget - lax.population_count(above).astype(jnp.int32).sum(-1, keepdims=True)
  ties = lax.population_count(equal).astype(jnp.int32)
  take = left - (jnp.cumsum(ties, -1) - ties)  # how many of this word's ties still fit
  some = equal & (
    (jnp.uint32(1) << _nth_bit(equal, jnp.clip(take, 0, _WORD - 1)).astype(jnp.uint32)) - 1
  )
  return above | jnp.where(take >= ties, equal, jnp.where(take > 0, some, 0))


def _pack(flags):
  """Returns bool `[..., m]` as uint32 `[..., ceil(m / 32)]`, candidate 0 in the lowest bit."""
  *lead, m = flags.shape
  flags = jnp.pad(flags, (*[(0, 0)] * len(lead), (0, -m % _WORD))).reshape(*lead, -1, _WORD)
  bits = flags.astype(jnp.uint32) << jnp.arange(_WORD, dtype=jnp.uint32)
  return jnp.sum(bits, -1, dtype=jnp.uint32)


def _nth_bit(word, n):
  """Returns the place of the n-th set bit (from 0), at most 31; halves the word five times."""
  place = jnp.zeros_like(n)
  for width in (16, 8, 4, 2, 1):
    lower = lax.population_count(word & jnp.uint32((1 << width) - 1)).astype(jnp.int32)
    up = n >= lower
    n = jnp.where(up, n - lower, n)
    word = jnp.where(up, word >> width, word)
    place = place + jnp.where(up, width, 0)
  return place


def places(words: jax.Array, budget: int) -> jax.Array:
  """Returns the ascending places of each row's first `budget` set bits, int32 `[..., budget]`.

  Behind the last set bit of uint32 `[..., words]`: anything, perhaps beyond the candidates.
  """
  counts = lax.population_count(words).astype(jnp.int32)
  ends = jnp.cumsum(counts, -1)
  slots = jnp.arange(budget, dtype=jnp.int32)
  # Comparing all moves only words; halving writes its bounds each round, which a CPU minds less.
  method = "scan" if current_target().platform == "cpu" else "compare_all"
  search = functools.partial(jnp.searchsorted, v=slots, side="right", method=method)
  at = jnp.vectorize(search, signature="(w)->(k)")(ends)
  at = jnp.minimum(at, words.shape[-1] - 1).astype(jnp.int32)
  take = functools.partial(jnp.take_along_axis, indices=at, axis=-1, mode="clip")
  return at * _WORD + _nth_bit(take(words), slots - (take(ends) - take(counts)))


def top_tiles(
  q_pool: jax.Array,
  k_pool: jax.Array,
  budget: int,
  fixed: jax.Array,
  chunk_scores: int | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Returns per query tile the key tiles of largest `q_pool . k_pool`, fixed ones before others.

  Args:
    q_pool, k_pool: `[b, h, tiles, d]`, `[b, h, key tiles, d]`.
    budget: ids per list, fixed ones included.
    fixed: int `[tiles, f]`, ids that come first (repeats allowed).
    chunk_scores: scores that exist at once; None for the target's default.
    implementation: as in `top_ids`.

  Returns:
    int32 `[b, h, tiles, budget]`, ascending.
  """
  b, h, tiles, d = q_pool.shape
  most = chunk_scores or _CHUNK.get(current_target().platform, _CHUNK_ELSEWHERE)
  chunk = max(1, min(tiles, most // (b * h * k_pool.shape[2])))
  filler = -tiles % chunk
  rows = jnp.pad(q_pool, ((0, 0), (0, 0), (0, filler), (0, 0)))
  rows = rows.reshape(b, h, -1, chunk, d).transpose(2, 0, 1, 3, 4)
  always = jnp.pad(jnp.asarray(fixed, jnp.int32), ((0, filler), (0, 0)), mode="edge")
  always = always.reshape(len(rows), chunk, fixed.shape[-1])

  def best(args):
    q, keep = args
    product = functools.partial(jnp.einsum, precision="highest")
    scores = product("bhid,bhjd->bhij", q, k_pool, preferred_element_type=jnp.float32)
    return top_ids(scores, budget, keep, implementation)

  ids = best((rows[0], always[0]))[None] if len(rows) == 1 else lax.map(best, (rows, always))
  return ids.transpose(1, 2, 0, 3, 4).reshape(b, h, -1, budget)[:, :, :tiles]
