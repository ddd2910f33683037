"""FreqFormer without training: each head gets the band that serves it best, measured once on any dense checkpoint.

After a dense warm-up every band runs on every head, and a few query rows of each output are held against dense attention of the
same rows. A head gets the cheapest band whose relative squared error is at most `1 + slack` times the smallest; the choice is
per layer, sample and head, stays in the sampler's state, and both halves of guidance share it. The rule is ours. Errors of
outputs, not masses of attention: mass on coarse cells says nothing about what compressing the queries loses.
"""

import dataclasses

import jax.numpy as jnp

from freqformer.cost import Cost, attention_cost
from freqformer.methods.base import attend
from freqformer.methods.head_profile import (
  ProfileConfig,
  dense_rows,
  measuring_cost,
  most_faithful,
  relative_errors,
  sample_rows,
)
from freqformer.tables.dense import dense

_AGAIN = 16.0  # passes: norm and rotary once more for each band, and for dense attention's rows


def tables(layout, profile: ProfileConfig) -> dict:
  """What warm-up and measurement need of a grid."""
  return {"dense": dense(layout), "rows": sample_rows(layout, profile.rows)}


def phase_cost(method, phase: str, layout, heads: int, head_dim: int, allocation) -> Cost:
  """Of one step: dense in the warm-up; a measuring step runs every band on every head, without summaries, and dense attention
  on its rows."""
  if phase == "warmup":
    return attention_cost(heads * layout.n**2, head_dim)
  cost = method.cost(layout, heads, head_dim, allocation)
  if phase == "run":
    return cost
  alone = dataclasses.replace(method, summary=0)
  every = sum(
    (alone.cost(layout, heads, head_dim, band) for band in ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    Cost(),
  )
  again = Cost(linear_bytes=_AGAIN * 2.0 * layout.n * heads * head_dim)
  return cost + every + again + measuring_cost(method.profile.rows, layout.n, heads, head_dim)


def call(method, module, qkv, cond, tables, state):
  """A step that is not a plain run: dense during the warm-up, else measure and run with what was found."""
  if cond.phase == "warmup":
    out, aux = attend(qkv, tables.profile["dense"], cond)
    return out, state, aux
  (q, k), arrays = qkv.rotated(), qkv.layout
  rows, heads = tables.profile["rows"], q.shape[2]
  outs, densities = [], []
  for band in range(3):
    allocation = tuple(heads * (band == i) for i in range(3))
    alone = dataclasses.replace(method, allocation=allocation, summary=0)
    out, _, aux = alone(None, qkv, dataclasses.replace(cond, want_masks=False), tables, {})
    outs.append(out[:, rows].astype(jnp.float32))
    densities.append(aux["density"])
  exact = dense_rows(q[:, rows], k, qkv.v, arrays.valid)[0]
  errors, costs = relative_errors(jnp.stack(outs), exact), jnp.stack(densities, -1)
  choice = most_faithful(cond.share(errors), costs, method.profile.slack)
  found = {**state, "choice": choice}
  out, found, aux = method(module, qkv, dataclasses.replace(cond, phase="run"), tables, found)
  measuring = costs.sum(-1).mean() + len(rows) / arrays.layout.n
  return (
    out,
    found if state else state,
    aux | {"cost": aux["cost"] + measuring, "band_errors": errors},
  )
