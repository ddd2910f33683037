"""Selection of key tiles: bisection (`kernels/selection/topk.py`) against `jax.lax.top_k`.

  JAX_PLATFORMS=cpu python -m benchmarks.cpu.selection

Both compute the same pooled scores chunk by chunk and return the same lists (the ids of `top_k` are
sorted).
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from freqformer.kernels.selection.topk import top_tiles

from benchmarks.cpu.competitors import call
from benchmarks.rows import goal_row, table, write_rows
from benchmarks.timing import beside_others, interleave

_TILES = flags.DEFINE_multi_integer("tiles", [2048, 4096], "Tiles of the buffer, queries and keys.")
_HEADS = flags.DEFINE_integer("heads", 2, "Heads.")
_DENSITY = flags.DEFINE_float("density", 0.05, "Listed share of the key tiles.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each competitor.", allow_override=True)
_CHUNK = 1 << 22  # scores at once of the sorting competitor


def by_sorting(q, k, budget: int, fixed):
  """Selects by `lax.top_k` per chunk of query tiles, and sorts its ids."""
  b, h, tiles, d = q.shape
  chunk = max(1, min(tiles, _CHUNK // (b * h * tiles)))
  rows = q.reshape(b, h, -1, chunk, d).transpose(2, 0, 1, 3, 4)

  def best(args):
    q, keep = args
    scores = jnp.einsum("bhid,bhjd->bhij", q, k, precision="highest")
    scores = scores.at[:, :, jnp.arange(chunk)[:, None], keep].set(jnp.inf)
    return jnp.sort(jax.lax.top_k(scores, budget)[1], axis=-1).astype(jnp.int32)

  ids = jax.lax.map(best, (rows, jnp.asarray(fixed).reshape(-1, chunk, fixed.shape[-1])))
  return ids.transpose(1, 2, 0, 3, 4).reshape(b, h, tiles, budget)


def measure(tiles: int, heads: int, budget: int, rounds: int) -> dict:
  """Measures one row; the tiles must be a power of two, so that chunks divide them."""
  keys = jax.random.split(jax.random.key(0))
  q, k = (jax.random.normal(key, (1, heads, tiles, 64)) for key in keys)
  fixed = np.arange(tiles, dtype=np.int32)[:, None]
  calls = {
    "bisect": call(lambda q, k: top_tiles(q, k, budget, fixed), q, k),
    "sort": call(lambda q, k: by_sorting(q, k, budget, fixed), q, k),
  }
  np.testing.assert_array_equal(calls["bisect"](), calls["sort"]())
  times = interleave(calls, rounds)
  return goal_row(
    f"selection_{tiles}_tiles",
    times["sort"].median / times["bisect"].median,
    ">= 1",
    unit="x",
    heads=heads,
    budget=budget,
    **{name: timing.row() for name, timing in times.items()},
  )


def main(_):
  logging.set_verbosity(logging.INFO)
  device = jax.devices()[0].platform
  rows = []
  for tiles in _TILES.value:
    budget = max(1, int(tiles * _DENSITY.value))
    rows += beside_others(lambda n=tiles, k=budget: [measure(n, _HEADS.value, k, _ROUNDS.value)])
  write_rows(
    f"selection_{device}", rows, f"JAX_PLATFORMS={device} python -m benchmarks.cpu.selection"
  )
  print(table(rows))


if __name__ == "__main__":
  app.run(main)
