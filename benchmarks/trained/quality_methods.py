"""What `benchmarks/trained/quality.py` compares: training-free methods at equal density, and random block masks as their control.

The control and the wrapper live here and not in the package: nobody should generate videos with them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask

from freqformer.cost import attention_cost
from freqformer.methods.adaspa import AdaSpa
from freqformer.methods.base import Method, attend, plain_aux
from freqformer.methods.block_topk import BlockTopK
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.head_profile import ProfileConfig
from freqformer.methods.radial import Radial
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.methods.spatial_temporal import SpatialTemporal
from freqformer.tables.dense import dense
from freqformer.methods.radial import radial_density
from freqformer.tables.topk import fixed_tiles


@dataclasses.dataclass(frozen=True)
class RandomTiles(Method):
  """Random lists of `budget` key tiles, the own one among them, as all methods here have it.

  Attributes:
    fresh: drawn anew by every layer, step, sample and head (errors then average out over a run); else one list per head and
      query tile for the whole run, as a mask that is searched once.
  """

  budget: int = 9
  fresh: bool = True

  def __call__(self, module, qkv, cond, tables, state):
    arrays, (b, _, h, _) = qkv.layout, qkv.q.shape
    q, k = qkv.rotated()
    mask = self.mask(q, cond, arrays)
    out, _ = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
    return out, state, plain_aux(mask, arrays.layout.n, b, h, cond.want_masks)

  def mask(self, q, cond, arrays) -> BlockMask:
    """Lists for every sample and head of `q` `[b, n_buffer, h, d]`."""
    (b, _, h, _), tiles, block = q.shape, arrays.layout.tiles, arrays.layout.block
    # The seam hands out no random key in sampling: the bits of the queries' sum differ by layer, step and sample.
    sums = cond.share(q.astype(jnp.float32).sum((1, 2, 3))) if self.fresh else jnp.zeros(b)

    def draw(x):
      return jax.random.uniform(
        jax.random.fold_in(jax.random.key(0), jax.lax.bitcast_convert_type(x, jnp.uint32)), shape
      )

    shape = (h, tiles, tiles)
    scores = jax.vmap(draw)(sums) + 2 * jnp.eye(tiles)
    ids = jnp.sort(jax.lax.top_k(scores, self.budget)[1], -1).astype(jnp.int32)
    return BlockMask(
      ids, jnp.full(ids.shape[:3], self.budget, jnp.int32), arrays.kv_len, None, block, block
    )

  def cost(self, layout, heads, head_dim, allocation=None):
    return attention_cost(heads * layout.n * self.budget * layout.n / layout.tiles, head_dim)


@dataclasses.dataclass(frozen=True)
class Warmed(Method):
  """A stateless method without a schedule, after the same dense steps that the others begin with."""

  inner: Method = RandomTiles()
  steps: int = 5

  def build(self, dims, layout, rngs):
    return self.inner.build(dims, layout, rngs)

  def tables(self, layout):
    return {"inner": self.inner.tables(layout), "dense": dense(layout)}

  def phase(self, step, steps):
    return "warmup" if step < self.steps else "run"

  def __call__(self, module, qkv, cond, tables, state):
    if cond.phase != "warmup":
      return self.inner(module, qkv, dataclasses.replace(cond, phase=""), tables["inner"], state)
    out, aux = attend(qkv, tables["dense"], cond)
    return out, state, aux

  def cost(self, layout, heads, head_dim, allocation=None):
    return self.inner.cost(layout, heads, head_dim, allocation)

  def phase_cost(self, phase, layout, heads, head_dim, allocation=None):
    if phase == "warmup":
      return attention_cost(heads * layout.n**2, head_dim)
    return self.cost(layout, heads, head_dim, allocation)


@dataclasses.dataclass(frozen=True)
class Probe(Method):
  """Dense attention that notes what lists of `budget` tiles would have done to its output, at every step of a dense run.

  Candidates are the tiles of most softmax mass (an exact search at this very step, equal heads), random ones drawn anew, and
  random ones kept. Of each the aux holds `error`, `|e|^2 / |out|^2` of this step over samples, tokens and heads, and `adds_up`,
  `|sum of e|^2 / sum of |e|^2` over the steps so far: 1 where errors of different steps are orthogonal, the number of steps
  where they are equal.
  """

  budget: int = 9
  names = ("most mass", "random", "random, fixed")

  def tables(self, layout):
    return {"dense": dense(layout), "fixed": fixed_tiles(layout)}

  def init_state(self, batch, dims, layout):
    sums = jnp.zeros((3, batch, layout.n_buffer, dims.heads, dims.head_dim))
    return {"sum": sums, "squares": jnp.zeros(3)}

  def __call__(self, module, qkv, cond, tables, state):
    arrays, (b, _, h, _) = qkv.layout, qkv.q.shape
    q, k = qkv.rotated()

    def run(mask):
      return attention(q, k, qkv.v, mask, implementation=qkv.implementation)

    out, lse = run(tables["dense"])
    search = AdaSpa(1 - self.budget / arrays.layout.tiles, adaptive=False)
    bits, found = search.find(q, k, lse, arrays, tables["fixed"])
    masks = [search.mask(cond.share(bits), arrays)]
    masks += [RandomTiles(self.budget, fresh).mask(q, cond, arrays) for fresh in (True, False)]
    valid = jnp.asarray(arrays.valid)[:, None, None]
    errors = jnp.stack([jnp.where(valid, run(mask)[0] - out, 0) for mask in masks])
    sums, squares = state["sum"] + errors, state["squares"] + jnp.square(errors).sum((1, 2, 3, 4))
    error = jnp.square(errors).sum((1, 2, 3, 4)) / jnp.square(jnp.where(valid, out, 0)).sum()
    noted = {
      "error": error,
      "adds_up": jnp.square(sums).sum((1, 2, 3, 4)) / squares,
      "recall": found["recall"],
    }
    return (
      out,
      {"sum": sums, "squares": squares},
      plain_aux(tables["dense"], arrays.layout.n, b, h) | noted,
    )


# Windows in tiles of 2 x 2 x 4 tokens, by how many tiles they hold; the first of each is the most cubic in tokens.
WINDOWS = {4: ((2, 2, 1),), 9: ((3, 3, 1), (1, 3, 3)), 18: ((3, 3, 2), (2, 3, 3)), 36: ((3, 4, 3),)}


def settings(layout, warm: int, steps: int):
  """`(method, variant, budget, Method)` of every point, in the order in which they are worth having.

  Args:
    warm: dense steps that every method begins with, of `steps`; AdaSpa's first search step is the last of them.

  `budget` is the number of key tiles per query tile after the warm-up that a point is made for; methods whose density comes in
  other steps (radial, spatial_temporal, measured freqformer) report what ran.
  """
  share, again = warm / steps, max(warm, int(0.6 * steps))
  profile = ProfileConfig(warmup=share)
  for k in WINDOWS:
    yield "adaspa", "", k, AdaSpa(1 - k / layout.tiles, warm - 1, (warm - 1, again))
    yield "random", "", k, Warmed(RandomTiles(k), warm)
    yield sliding(WINDOWS[k][0], k, warm)
  for k in WINDOWS:
    yield "block_topk", "", k, Warmed(BlockTopK(density=k / layout.tiles, coarse="none"), warm)
  for k in WINDOWS:
    decay = decay_for(layout, k / layout.tiles)
    yield "radial", f"decay={decay:.3g}", k, Warmed(Radial(decay, 0), warm)
  for k in (9, 18, 36):
    own = FreqFormer(
      allocation="measured",
      mid_tiles=k,
      window=WINDOWS[k][0],
      profile=dataclasses.replace(profile, slack=0.1),
    )
    yield "freqformer", "measured", k, own
  for frames, places, k in ((0, 0, 9), (0, 1, 18), (1, 1, 36)):
    own = SpatialTemporal(frames=frames, places=places, sink=0, profile=profile)
    yield "spatial_temporal", f"frames={frames},places={places}", k, own
  for k in WINDOWS:
    yield "random", "fixed", k, Warmed(RandomTiles(k, fresh=False), warm)
  for k in (9, 18, 36):
    yield (
      "adaspa",
      "search every step",
      k,
      AdaSpa(1 - k / layout.tiles, warm - 1, tuple(range(warm - 1, steps))),
    )
  for k in (9, 18):
    yield sliding(WINDOWS[k][1], k, warm)
    yield (
      "adaspa",
      "equal heads",
      k,
      AdaSpa(1 - k / layout.tiles, warm - 1, (warm - 1, again), adaptive=False),
    )


def sliding(window, k: int, warm: int):
  """The point of one window, in tiles."""
  return (
    "sliding_tile",
    "x".join(map(str, window)),
    k,
    Warmed(SlidingTile(window=window, unit="tiles"), warm),
  )


def decay_for(layout, density: float) -> float:
  """The radial decay whose density without sink is nearest."""
  decays = [0.02 * 1.05**i for i in range(120)]
  return min(decays, key=lambda decay: abs(radial_density(layout, decay, 0) - density))
