"""Points of `benchmarks/trained/quality.py`: training-free methods and random masks as a control.

The control and the wrapper are no part of the package: nobody should generate videos with them.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask

from freqformer.methods.adaspa import AdaSpa
from freqformer.methods.base import Method, attend, even_lists, plain_aux
from freqformer.methods.block_topk import BlockTopK
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.head_profile import ProfileConfig
from freqformer.methods.radial import Radial
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.methods.spatial_temporal import SpatialTemporal
from freqformer.tables.dense import dense
from freqformer.tables.topk import fixed_tiles


@dataclasses.dataclass(frozen=True)
class RandomTiles(Method):
  """Random lists of key tiles, the own one among them, as in all methods here.

  Attributes:
    budget: key tiles per list.
    fresh: draw anew in every layer, step, sample and head (errors then average out over a run);
      otherwise one list per head and query tile for the whole run, as a mask that is searched once.
  """

  budget: int = 9
  fresh: bool = True

  def __call__(self, module, qkv, cond, tables, state):
    b, _, h, _ = qkv.q.shape
    q, k = qkv.rotated()
    mask = self.mask(q, cond, qkv.layout)
    out, _ = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
    return out, state, plain_aux(mask, qkv.layout.n, b, h, cond.want_masks)

  def mask(self, q, cond, arrays) -> BlockMask:
    """Draws lists for every sample and head of `q` `[b, n_buffer, h, d]`."""
    b, _, h, _ = q.shape
    tiles = arrays.tiles
    # The seam hands out no random key in sampling. The bits of the queries' sum serve as one: they
    # differ by layer, step and sample.
    sums = cond.share(q.astype(jnp.float32).sum((1, 2, 3))) if self.fresh else jnp.zeros(b)

    def draw(x):
      bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
      return jax.random.uniform(jax.random.fold_in(jax.random.key(0), bits), (h, tiles, tiles))

    scores = jax.vmap(draw)(sums) + 2 * jnp.eye(tiles)
    ids = jnp.sort(jax.lax.top_k(scores, self.budget)[1], -1).astype(jnp.int32)
    counts = jnp.full(ids.shape[:3], self.budget, jnp.int32)
    return BlockMask(ids, counts, arrays.kv_len, None, arrays.block, arrays.block)

  def pairs(self, layout, heads, allocation=None, phase=None):
    return even_lists(layout, heads, layout.n * self.budget * layout.n / layout.tiles)

  def only_attends(self, phase):
    return True


@dataclasses.dataclass(frozen=True)
class Warmed(Method):
  """A stateless method without a schedule, after the dense steps that the others begin with."""

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

  @property
  def usual_phase(self):
    return "run"

  def pairs(self, layout, heads, allocation=None, phase=None):
    if phase == "warmup":
      return even_lists(layout, heads, layout.n**2)
    return self.inner.pairs(layout, heads, allocation)


@dataclasses.dataclass(frozen=True)
class Probe(Method):
  """Dense attention that also measures the errors that lists of `budget` tiles would have made.

  Candidates are the tiles of most softmax mass (an exact search at this very step, equal heads),
  random ones drawn anew, and random ones kept. For each the aux holds `error`, `|e|^2 / |out|^2`
  of this step over samples, tokens and heads, and `adds_up`, `|sum of e|^2 / sum of |e|^2` over the
  steps so far: 1 if errors of different steps are orthogonal, the number of steps if all are equal.
  """

  budget: int = 9
  names = ("most mass", "random", "random, fixed")

  def tables(self, layout):
    return {"dense": dense(layout), "fixed": fixed_tiles(layout)}

  def init_state(self, batch, dims, layout):
    sums = jnp.zeros((3, batch, layout.n_buffer, dims.heads, dims.head_dim))
    return {"sum": sums, "squares": jnp.zeros(3)}

  def __call__(self, module, qkv, cond, tables, state):
    arrays = qkv.layout
    b, _, h, _ = qkv.q.shape
    q, k = qkv.rotated()

    def run(mask):
      return attention(q, k, qkv.v, mask, implementation=qkv.implementation)

    out, lse = run(tables["dense"])
    search = AdaSpa(1 - self.budget / arrays.tiles, adaptive=False)
    bits, found = search.find(q, k, lse, arrays, tables["fixed"])
    masks = [search.mask(cond.share(bits), arrays)]
    masks += [RandomTiles(self.budget, fresh).mask(q, cond, arrays) for fresh in (True, False)]
    valid = jnp.asarray(arrays.valid)[:, None, None]
    errors = jnp.stack([jnp.where(valid, run(mask)[0] - out, 0) for mask in masks])
    norms = jnp.square(errors).sum((1, 2, 3, 4))
    state = {"sum": state["sum"] + errors, "squares": state["squares"] + norms}
    aux = plain_aux(tables["dense"], arrays.n, b, h) | {
      "error": norms / jnp.square(jnp.where(valid, out, 0)).sum(),
      "adds_up": jnp.square(state["sum"]).sum((1, 2, 3, 4)) / state["squares"],
      "recall": found["recall"],
    }
    return out, state, aux


# Windows in tiles of 2 x 2 x 4 tokens by the number of tiles that they hold; the first of each is
# the most cubic in tokens.
# Those that are not centred run as in the rows on record: `deal="as_is"`.
WINDOWS = {4: ((2, 2, 1),), 9: ((3, 3, 1), (1, 3, 3)), 18: ((3, 3, 2), (2, 3, 3)), 36: ((3, 4, 3),)}


@dataclasses.dataclass(frozen=True)
class Setting:
  """One point of the study.

  Attributes:
    method: name of the method.
    variant: name of its form; "" for the usual one.
    budget: key tiles per query tile after the warm-up. Methods whose density comes in other steps
      (radial, spatial_temporal, measured freqformer) report what ran.
    config: the method.
  """

  method: str
  variant: str
  budget: int
  config: Method

  @property
  def name(self) -> str:
    """Name of its row."""
    return point_name(self.method, self.variant, self.budget)


def point_name(method: str, variant: str, budget: int) -> str:
  """Formats the name of a point: `radial(decay=0.1)/9`."""
  return f"{method}{f'({variant})' if variant else ''}/{budget}"


def settings(layout, warm: int, steps: int) -> Iterator[Setting]:
  """Yields every point, the most informative first.

  Args:
    layout: the tiles.
    warm: dense steps that every method begins with; AdaSpa's first search step is the last of them.
    steps: of the run.
  """
  again = max(warm, int(0.6 * steps))
  profile = ProfileConfig(warmup=warm / steps)

  def adaspa(k, variant="", search=(warm - 1, again), **fields):
    return Setting(
      "adaspa", variant, k, AdaSpa(1 - k / layout.tiles, warm - 1, tuple(search), **fields)
    )

  def warmed(method, variant, k, inner):
    return Setting(method, variant, k, Warmed(inner, warm))

  def sliding(k, window):
    inner = SlidingTile(window=window, unit="tiles", deal="as_is")
    return warmed("sliding_tile", "x".join(map(str, window)), k, inner)

  for k in WINDOWS:
    yield adaspa(k)
    yield warmed("random", "", k, RandomTiles(k))
    yield sliding(k, WINDOWS[k][0])
  for k in WINDOWS:
    yield warmed("block_topk", "", k, BlockTopK(density=k / layout.tiles, coarse="none"))
  for k in WINDOWS:
    decay = decay_for(layout, k / layout.tiles)
    yield warmed("radial", f"decay={decay:.3g}", k, Radial(decay, 0))
  for k in (9, 18, 36):
    slack = dataclasses.replace(profile, slack=0.1)
    own = FreqFormer(
      allocation="measured", mid_tiles=k, window=WINDOWS[k][0], deal="as_is", profile=slack
    )
    yield Setting("freqformer", "measured", k, own)
  for frames, places, k in ((0, 0, 9), (0, 1, 18), (1, 1, 36)):
    own = SpatialTemporal(frames=frames, places=places, sink=0, profile=profile)
    yield Setting("spatial_temporal", f"frames={frames},places={places}", k, own)
  for k in WINDOWS:
    yield warmed("random", "fixed", k, RandomTiles(k, fresh=False))
  for k in (9, 18, 36):
    yield adaspa(k, "search every step", range(warm - 1, steps))
  for k in (9, 18):
    yield sliding(k, WINDOWS[k][1])
    yield adaspa(k, "equal heads", adaptive=False)


def decay_for(layout, density: float) -> float:
  """Returns the radial decay whose density without sink is nearest."""
  decays = [0.02 * 1.05**i for i in range(120)]

  def distance(decay):
    return abs(float(Radial(decay, 0).mask(layout).density(layout.n)[0, 0]) - density)

  return min(decays, key=distance)
