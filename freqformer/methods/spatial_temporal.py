"""Spatial and temporal heads, told apart online (Sparse VideoGen, arXiv 2502.01776). Training-free.

A spatial head sees a few whole frames, a temporal head a few places in every frame; both see the
first frame. A head gets the pattern with the smaller squared error on a few rows of dense
attention. Runs on any checkpoint. Outside sampling each call measures for itself.
"""

# choice: patterns are made of tiles, not tokens; heads are measured once, after a dense warm-up
# (`profile.every`), where the paper's code measures at every step.

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from freqformer.config import require
from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask, select
from freqformer.methods.allocation import head_shares
from freqformer.methods.base import Method, attend, even_lists
from freqformer.methods.head_profile import (
  ProfileConfig,
  dense_rows,
  most_faithful,
  relative_errors,
  rows_of,
  sample_rows,
)
from freqformer.tables.counting import axis_lengths
from freqformer.tables.dense import dense
from freqformer.tables.where import tiles_where


@dataclasses.dataclass(frozen=True)
class SpatialTemporal(Method):
  """Fields of the method.

  Attributes:
    frames: a spatial head sees every tile up to this many frames of tiles away.
    places: a temporal head sees, in every frame of tiles, tiles up to this many rows and columns
      away.
    sink: first frames of tiles that both see whole.
    profile: when heads are measured, and on how many rows.
  """

  frames: int = 0
  places: int = 1
  sink: int = 1
  profile: ProfileConfig = ProfileConfig()

  usual_phase = "run"

  def __post_init__(self):
    require(self, "frames places sink", least=0)

  def phase(self, step, steps):
    return self.profile.phase(step, steps)

  def check_run(self, steps):
    self.profile.check_run(steps)

  def refuses_dense(self, phase):
    return self.profile.refuses_dense(phase)

  def init_state(self, batch, dims, layout):
    return {"choice": jnp.zeros((batch, dims.heads), jnp.int32)}

  def tables(self, layout):
    masks = spatial_temporal(layout, self.frames, self.places, self.sink)
    rows = sample_rows(layout, self.profile.rows)
    return {
      "masks": masks,
      "dense": dense(layout),
      "rows": rows,
      "listed": [rows_of(mask, rows) for mask in masks],
    }

  def __call__(self, module, qkv, cond, tables, state):
    b, _, h, _ = qkv.q.shape
    q, k = qkv.rotated()
    if cond.phase == "warmup":
      choice = jnp.zeros((b, h), jnp.int32)
      mask = tables["dense"]
    else:
      choice = state["choice"] if cond.phase == "run" else self._measure(q, k, qkv, cond, tables)
      mask = select(tables["masks"], checkpoint_name(choice, "routing"))
    out, aux = attend(qkv, mask, cond, (q, k))
    return out, {"choice": choice} if state else state, aux | {"choice": choice}

  def _measure(self, q, k, qkv, cond, tables) -> jax.Array:
    """Returns the better pattern per sample and head, int32 `[b, h]`: 0 spatial, 1 temporal."""
    listed = [jnp.repeat(jnp.asarray(x), qkv.layout.block, axis=-1) for x in tables["listed"]]
    exact, *outs = dense_rows(q[:, tables["rows"]], k, qkv.v, qkv.layout.valid, listed)
    errors = cond.share(relative_errors(jnp.stack(outs), exact))
    listed_tiles = jnp.stack([jnp.asarray(mask.kv_counts).sum() for mask in tables["masks"]])
    return most_faithful(errors, listed_tiles, self.profile.slack)

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts the tables' pairs; `allocation`: shares of spatial and temporal heads, else halves."""
    share = head_shares((1, 1) if allocation is None else allocation, ("spatial", "temporal"))
    if phase == "warmup":
      return even_lists(layout, heads, layout.n**2)
    each = count_pairs(layout, self.frames, self.places, self.sink)
    return even_lists(layout, heads, float(share @ each))

  def only_attends(self, phase):
    return phase in ("warmup", "run")


def spatial_temporal(
  layout: TileLayout, frames: int = 1, places: int = 1, sink: int = 1
) -> tuple[BlockMask, BlockMask]:
  """Builds the tables (spatial, temporal); arguments as in `SpatialTemporal`."""

  def spatial(q, k):
    return (np.abs(q[0] - k[0]) <= frames) | (k[0] < sink)

  def temporal(q, k):
    return (np.maximum(np.abs(q[1] - k[1]), np.abs(q[2] - k[2])) <= places) | (k[0] < sink)

  return tiles_where(layout, spatial), tiles_where(layout, temporal)


def count_pairs(
  layout: TileLayout, frames: int = 1, places: int = 1, sink: int = 1
) -> tuple[int, int]:
  """Scored pairs of the two tables of one head: products of what tiles along each axis see."""
  t, y, x = axis_lengths(layout)
  plane = int(y.sum() * x.sum())  # tokens of a frame
  spatial = _seen(t, frames, sink) * plane**2
  temporal = (
    int(t.sum() * t[sink:].sum()) * _seen(y, places) * _seen(x, places)
    + layout.n * int(t[:sink].sum()) * plane
  )
  return spatial, temporal


def _seen(lengths: np.ndarray, reach: int, sink: int = 0) -> int:
  """Counts token pairs on an axis with tiles at most `reach` apart or the second in `sink`."""
  tiles = len(lengths)
  at = np.arange(tiles)
  sums = np.concatenate([[0], np.cumsum(lengths)])
  low = np.maximum(at - reach, 0)
  high = np.minimum(at + reach + 1, tiles)
  first = min(sink, tiles)
  # Tokens of the first tiles that are near as well: they count once.
  again = np.maximum(sums[np.minimum(high, first)] - sums[np.minimum(low, first)], 0)
  return int(lengths @ (sums[high] - sums[low] - again)) + int(sums[-1] * sums[first])
