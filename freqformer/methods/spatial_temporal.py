"""Heads that are spatial or temporal, found online (Sparse VideoGen, arXiv 2502.01776). Training-free, on any checkpoint.

A spatial head sees a few whole frames, a temporal head a few places in every frame, both the first frame. Which one a head is
is measured: the pattern with the smaller squared error on a few rows of dense attention. Ours: patterns in tiles; measured once
after a dense warm-up (`profile.every`; the paper's code: at every step). Outside sampling each call measures for itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import select
from freqformer.methods.allocation import head_shares
from freqformer.methods.base import Method, even_lists, plain_aux
from freqformer.methods.head_profile import (
  ProfileConfig,
  dense_rows,
  most_faithful,
  relative_errors,
  rows_of,
  sample_rows,
)
from freqformer.tables.dense import dense
from freqformer.tables.spatial_temporal import count_pairs, spatial_temporal


@dataclasses.dataclass(frozen=True)
class SpatialTemporal(Method):
  """Fields of the method: reach of the patterns in tiles (see `planners/spatial_temporal.py`), and when heads are measured."""

  frames: int = 0
  places: int = 1
  sink: int = 1
  profile: ProfileConfig = ProfileConfig()

  def __post_init__(self):
    if min(self.frames, self.places, self.sink) < 0:
      raise ValueError(f"{self.frames=}, {self.places=} and {self.sink=} must be at least 0.")

  def phase(self, step, steps):
    return self.profile.phase(step, steps)

  def check_run(self, steps):
    self.profile.check_run(steps)

  def init_state(self, batch, dims, layout):
    return {"choice": jnp.zeros((batch, dims.heads), jnp.int32)}

  def tables(self, layout):
    masks, rows = (
      spatial_temporal(layout, self.frames, self.places, self.sink),
      sample_rows(layout, self.profile.rows),
    )
    return {
      "masks": masks,
      "dense": dense(layout),
      "rows": rows,
      "listed": [rows_of(mask, rows) for mask in masks],
    }

  def __call__(self, module, qkv, cond, tables, state):
    arrays, (b, _, h, _) = qkv.layout, qkv.q.shape
    q, k = qkv.rotated()
    if cond.phase == "warmup":
      choice, mask = jnp.zeros((b, h), jnp.int32), tables["dense"]
    else:
      choice = (
        state["choice"] if cond.phase == "run" else self._measure(q, k, qkv.v, cond, arrays, tables)
      )
      mask = select(tables["masks"], checkpoint_name(choice, "routing"))
    out, _ = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
    aux = plain_aux(mask, arrays.layout.n, b, h, cond.want_masks)
    return out, {"choice": choice} if state else state, aux | {"choice": choice}

  def _measure(self, q, k, v, cond, arrays, tables) -> jax.Array:
    """The better pattern of each sample and head, int32 `[b, h]`: 0 spatial, 1 temporal."""
    listed = [jnp.repeat(jnp.asarray(x), arrays.layout.block, axis=-1) for x in tables["listed"]]
    exact, *outs = dense_rows(q[:, tables["rows"]], k, v, arrays.valid, listed)
    costs = jnp.stack([jnp.asarray(mask.kv_counts).sum() for mask in tables["masks"]])
    return most_faithful(
      cond.share(relative_errors(jnp.stack(outs), exact)), costs, self.profile.slack
    )

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts the tables' pairs; `allocation`: share of spatial and temporal heads, else half each."""
    share = head_shares((1, 1) if allocation is None else allocation, ("spatial", "temporal"))
    if phase == "warmup":
      return even_lists(layout, heads, layout.n**2)
    each = count_pairs(layout, self.frames, self.places, self.sink)
    return even_lists(layout, heads, float(share @ each))

  @property
  def usual_phase(self):
    return "run"

  def only_attends(self, phase):
    return phase in ("warmup", "run")
