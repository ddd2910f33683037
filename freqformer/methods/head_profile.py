"""Measures which pattern suits a head, as Sparse VideoGen does (arXiv 2502.01776).

Shared by the training-free methods that deal heads by what they measure. A few query rows are drawn
once per grid with a fixed seed; each candidate's output there is compared with dense attention's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError, require
from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.placement import map_heads


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Schedule and size of the measurement.

  Attributes:
    warmup: share of the run's steps that are dense before the first measurement.
    every: steps between measurements; 0: once, 1: each after the warm-up (Sparse VideoGen's).
    rows: query rows measured on.
    slack: a head gets the cheapest pattern whose error is at most `1 + slack` times the smallest;
      0: the most faithful.
  """

  warmup: float = 0.2
  every: int = 0
  rows: int = 64
  slack: float = 0.0

  def __post_init__(self):
    require(self, "warmup", least=0, below=1)
    require(self, "every slack", least=0)
    require(self, "rows", least=1)

  def warm_steps(self, steps: int) -> int:
    """Returns the dense steps of a run of `steps`."""
    return int(self.warmup * steps + 0.5)

  def phase(self, step: int, steps: int) -> str:
    """Names a sampling step: "warmup" (dense), "profile" (measure, then run) or "run"."""
    after = step - self.warm_steps(steps)
    if after < 0:
      return "warmup"
    return "profile" if after == 0 or (self.every and after % self.every == 0) else "run"

  def refuses_dense(self, phase: str) -> str | None:
    """Returns why an evaluation of this phase cannot be dense instead, None if it can."""
    if phase == "profile":
      return "it measures heads there (profile), and later evaluations need what it finds"
    return None

  def check_run(self, steps: int):
    """Raises ConfigError if a run of `steps` steps ends before heads are measured."""
    if (warm := self.warm_steps(steps)) >= steps:
      raise ConfigError(
        f"profile.warmup={self.warmup} makes {warm} of {steps} sampling steps dense, so that no "
        "head is ever measured; lower it or take more steps."
      )


def sample_rows(layout: TileLayout, count: int) -> np.ndarray:
  """Draws ascending buffer rows of `count` tokens (at most all), int32, the same at every call."""
  order = np.random.default_rng(0).permutation(layout.n)[:count]
  return np.sort(layout.arrays().scatter[order]).astype(np.int32)


def rows_of(mask: BlockMask, rows: np.ndarray) -> np.ndarray:
  """Returns the key tiles that query rows list under one head's table: bool `[rows, kv_tiles]`."""
  tiles = rows // mask.block_q
  part = BlockMask(
    mask.indices()[:, :, tiles],
    mask.kv_counts[:, :, tiles],
    mask.kv_len,
    None,
    mask.block_q,
    mask.block_kv,
  )
  return part.to_tiles()[0, 0]


@jax.named_scope("scores")
def dense_rows(q: jax.Array, k: jax.Array, v: jax.Array, valid, listed=()) -> jax.Array:
  """Computes dense attention of a few rows, and of the same rows under each of some patterns.

  Args:
    q: `[b, rows, h, d]`, normed and rotated.
    k, v: `[b, n_buffer, h, d]`, k normed and rotated.
    valid: bool `[n_buffer]`, False in padding rows.
    listed: bool arrays `[rows, n_buffer]`, a pattern each.

  Returns:
    float32 `[1 + patterns, b, rows, h, d]`; scores of one head are in memory at a time.
  """
  valid = jnp.asarray(valid)
  seen = [valid, *(valid & pattern for pattern in listed)]

  def head(args):
    q, k, v = (x.astype(jnp.float32) for x in args)
    scores = jnp.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
    v = jnp.where(valid[:, None], v, 0)
    outs = []
    for pattern in seen:
      p = jax.nn.softmax(jnp.where(pattern, scores, -jnp.inf))
      outs.append(jnp.einsum("bij,bjd->bid", p, v))
    return jnp.stack(outs)

  by_head = tuple(jax.lax.stop_gradient(x).transpose(2, 0, 1, 3) for x in (q, k, v))
  return map_heads(head, by_head).transpose(1, 2, 3, 0, 4)


def relative_errors(outs: jax.Array, exact: jax.Array) -> jax.Array:
  """Returns `|out - exact|^2 / |exact|^2`, `[b, h, c]`, of `outs` `[c, b, rows, h, d]`."""
  error = jnp.square(outs - exact).sum((2, 4)) / jnp.maximum(jnp.square(exact).sum((1, 3)), 1e-30)
  return error.transpose(1, 2, 0)


def most_faithful(errors: jax.Array, costs: jax.Array, slack: float = 0.0) -> jax.Array:
  """Chooses the cheapest candidate whose error is at most `1 + slack` times the smallest.

  Args:
    errors, costs: `[b, h, c]`; costs are broadcast to that.

  Returns:
    int32 `[b, h]`.
  """
  close = errors <= (1 + slack) * errors.min(-1, keepdims=True)
  return jnp.where(close, costs, jnp.inf).argmin(-1).astype(jnp.int32)
