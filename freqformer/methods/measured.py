"""FreqFormer without training: each head gets the band that serves it best on any dense checkpoint.

After a dense warm-up every band runs on every head, and a few query rows of each output are
compared with dense attention. A head gets the cheapest band whose relative squared error is at most
`1 + slack` times the smallest, per layer, sample and head, in the sampler's state; both halves of
guidance share it. Errors of outputs decide, not masses of attention: mass on coarse cells says
nothing about what compressing the queries loses.
"""

import dataclasses

import jax
import jax.numpy as jnp

from freqformer.grid.layout import TileLayout
from freqformer.methods.base import attend
from freqformer.methods.head_profile import (
  ProfileConfig,
  dense_rows,
  most_faithful,
  relative_errors,
  sample_rows,
)
from freqformer.tables.dense import dense


def tables(layout: TileLayout, profile: ProfileConfig) -> dict:
  """Returns what warm-up and measurement need of a grid: the dense table and the measured rows."""
  return {"dense": dense(layout), "rows": sample_rows(layout, profile.rows)}


def call(method, module, qkv, cond, tables, state):
  """Runs a dense step of the warm-up, or measures the heads and runs with what was found."""
  if cond.phase == "warmup":
    out, aux = attend(qkv, tables.profile["dense"], cond)
    return out, state, aux
  errors, costs = _measure(method, qkv, cond, tables)
  choice = most_faithful(cond.share(errors), costs, method.profile.slack)
  found = {**state, "choice": choice}
  out, found, aux = method(module, qkv, dataclasses.replace(cond, phase="run"), tables, found)
  measuring = costs.sum(-1).mean() + len(tables.profile["rows"]) / qkv.layout.layout.n
  aux = aux | {"cost": aux["cost"] + measuring, "band_errors": errors}
  return out, found if state else state, aux


@jax.named_scope("measuring")
def _measure(method, qkv, cond, tables):
  """Runs every band on every head: relative errors and densities, both `[b, h, bands]`."""
  q, k = qkv.rotated()
  rows = tables.profile["rows"]
  heads = q.shape[2]
  outs = []
  densities = []
  for band in range(3):
    allocation = tuple(heads * (band == i) for i in range(3))
    alone = dataclasses.replace(method, allocation=allocation, summary=0)
    out, _, aux = alone(None, qkv, dataclasses.replace(cond, want_masks=False), tables, {})
    outs.append(out[:, rows].astype(jnp.float32))
    densities.append(aux["density"])
  exact = dense_rows(q[:, rows], k, qkv.v, qkv.layout.valid)[0]
  return relative_errors(jnp.stack(outs), exact), jnp.stack(densities, -1)
