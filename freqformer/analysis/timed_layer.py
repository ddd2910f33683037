"""One attention layer, counted and timed: methods against dense on the same weights, in turns."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.cost import layer_cost
from freqformer.methods.base import Cond
from freqformer.methods.routed import RoutedMethod
from freqformer.model.attention import SpectralAttention


def layer_rows(model, latent_shape, allocation=None, repeats: int = 7) -> list[dict]:
  """Times a forward layer of each of the model's methods and of dense attention, one sample.

  Args:
    model: a `ModelConfig`.
    latent_shape: `(t, y, x, c)`.
    allocation: measured share of heads per branch, rounded to whole heads.
    repeats: timings per method, interleaved; the median is reported.

  Returns:
    `{"method", "attention_flops", "linear_flops", "density", "layer_ms", "note"}` per method.
  """
  layout = model.layout(latent_shape)
  heads = model.heads
  calls = {}
  rows = []
  for name in dict.fromkeys(["dense", *(name for _, name in model.attention.runs(model.depth))]):
    method = model.attention.named(name)
    note = "every token sees every token"
    if method.branches and not isinstance(method, RoutedMethod):
      note = f"all levels: {', '.join(method.branches)}"
    elif method.branches:
      share = np.asarray(allocation if allocation is not None else method.router.prior, np.float64)
      counts = whole_heads(share / share.sum(), heads)
      method = dataclasses.replace(method, allocation=counts)
      note = "heads " + ", ".join(f"{c} {b}" for b, c in zip(method.branches, counts, strict=True))
    calls[name] = _call(model, method, layout)
    density = float(np.mean(calls[name]()[1]["density"]))
    cost = layer_cost(method, layout, heads, model.dims.head_dim)
    rows.append(
      {
        "method": name,
        "attention_flops": cost.attention_flops,
        "linear_flops": cost.linear_flops,
        "density": density,
        "note": note,
      }
    )
  times = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      clock = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append(1e3 * (time.perf_counter() - clock))
  return [{**row, "layer_ms": float(np.median(times[row["method"]]))} for row in rows]


def whole_heads(share, heads: int) -> tuple[int, ...]:
  """Rounds shares to `heads` heads by largest remainders."""
  exact = np.asarray(share) * heads
  counts = np.floor(exact).astype(int)
  for i in np.argsort(counts - exact, kind="stable")[: heads - counts.sum()]:
    counts[i] += 1
  return tuple(int(c) for c in counts)


def _call(model, method, layout):
  """Compiles a layer on random tokens: returns `() -> (out, aux)`."""
  graphdef, params = nnx.split(SpectralAttention(model.dims, method, layout, nnx.Rngs(0)))
  x = jax.random.normal(jax.random.key(0), (1, layout.n_buffer, model.width))
  cond = Cond(jnp.full(1, 0.5), jnp.ones((1, model.width)))

  @jax.jit
  def run(params, x, arrays, tables):
    out, _, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, {})
    return out, aux

  args = (params, x, *jax.tree.map(jnp.asarray, (layout.arrays(), method.tables(layout))))
  jax.block_until_ready(run(*args))
  return lambda: run(*args)
