"""The seam of a method: what an attention layer hands over, and the five calls that it makes.

A method is one frozen dataclass. Its parameters live in the NNX module it builds, its static masks in the tables it makes
once per grid, its memory between denoising steps in a state that the sampler carries. The layer knows no method by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr

from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import CallCost, uniform


@dataclasses.dataclass(frozen=True)
class Dims:
  """Sizes that a method's parameters depend on."""

  heads: int
  head_dim: int
  cond_dim: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cond:
  """What a layer knows about the moment it runs in. Layers of one run share all of it but `rng`.

  Attributes:
    time: `[b]`, 1 is noise.
    embedding: `[b, cond_dim]`, the timestep's embedding (without the class, so that both guidance halves share it).
    progress: scalar in [0, 1], how much of the training is done; 1 in evaluation.
    rng: key for stochastic routing, or None.
    train: static; training mode of routers.
    guided: static; the batch is [conditional half, unconditional half] and both share routing and masks.
    soft_evaluation: static; evaluate with the soft mixture instead of the hard choice.
    phase: static; what this sampling step does for the layer's method (`Method.phase`); "" in training.
    want_masks: static; aux then holds `"mask"`, the `BlockMask` that ran.
  """

  time: jax.Array
  embedding: jax.Array
  progress: jax.Array | float = 1.0
  rng: jax.Array | None = None
  train: bool = dataclasses.field(default=False, metadata={"static": True})
  guided: bool = dataclasses.field(default=False, metadata={"static": True})
  soft_evaluation: bool = dataclasses.field(default=False, metadata={"static": True})
  phase: str = dataclasses.field(default="", metadata={"static": True})
  want_masks: bool = dataclasses.field(default=False, metadata={"static": True})

  def share(self, x: jax.Array) -> jax.Array:
    """Gives the unconditional half (if there is one) the conditional half's rows of `x` `[b, ...]`."""
    if not self.guided:
      return x
    half = x[: x.shape[0] // 2]
    return jnp.concatenate([half, half])


@dataclasses.dataclass(frozen=True)
class Projected:
  """Un-rotated, un-normed projections in tile order, and what finishes them.

  Attributes:
    q, k, v: `[b, n_buffer, h, d]`.
    rotate_q, rotate_k: `(x [b, m, h, d], positions [m, 3]) -> [b, m, h, d]`: QK-norm, then rotary at the positions.
    layout: the layout's arrays.
    implementation: attention backend, or None for automatic choice.
    prepare: where a kernel does it in one pass, `kernels.around.prepare.prepare` from its argument `cells` on; else None.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  rotate_q: Callable
  rotate_k: Callable
  layout: LayoutTables
  implementation: str | None = None
  prepare: Callable | None = None

  @property
  def beside(self) -> str | None:
    """Backend of the layer's other ops: "xla" where a portable one was named for attention; None (the device's own) else."""
    return None if self.implementation in (None, "pallas_mgpu") else "xla"

  def rotated(self) -> tuple[jax.Array, jax.Array]:
    """q and k finished, each token at its own position."""
    if self.prepare is not None:
      return self.prepare()[:2]
    return self.rotate_q(self.q, self.layout.positions), self.rotate_k(
      self.k, self.layout.positions
    )


@dataclasses.dataclass(frozen=True)
class Method:
  """Base of all methods; a subclass overrides what it needs."""

  def build(self, dims: Dims, layout: TileLayout, rngs: nnx.Rngs) -> nnx.Module | None:
    """The method's parameters (router, gates), or None.

    Raises:
      ConfigError: if the method cannot serve these sizes.
    """
    return None

  def tables(self, layout: TileLayout) -> Any:
    """Static masks and matrices as a pytree of NumPy arrays: made once per grid, passed to jit as arguments."""
    return {}

  def init_state(self, batch: int, dims: Dims, layout: TileLayout) -> Any:
    """What one layer remembers between denoising steps; `{}` for most.

    The sampler carries it, one entry per layer, from step to step; its shapes never change and no checkpoint holds it.

    Args:
      batch: rows that run together; where `shares_state`, samples: with guidance half of the rows.
    """
    return {}

  @property
  def shares_state(self) -> bool:
    """Whether the halves of guidance have one state between them, that of the conditional half."""
    return False

  def phase(self, step: int, steps: int) -> str:
    """What sampling step `step` of `steps` does ("warmup", "search", "reuse", ...): each phase is its own compiled step."""
    return ""

  def check_run(self, steps: int) -> None:
    """Raises ConfigError if the method's schedule does not fit a run of `steps` sampling steps."""

  def __call__(self, module, qkv: Projected, cond: Cond, tables, state):
    """Attention of one layer.

    Returns:
      out `[b, n_buffer, h, d]`, the new state, and aux: a dict with at least `density` `[b, h]` (scored pairs / n^2, as
      run), `cost` (scalar: pairs run over h n^2, all branches counted) and `loss` (scalar, added to the training loss);
      with `cond.want_masks` also `mask`, the `BlockMask` that ran.
    """
    raise NotImplementedError

  def pairs(
    self, layout: TileLayout, heads: int, allocation=None, phase: str | None = None
  ) -> CallCost:
    """Counts the attention of one layer and sample exactly, without a table.

    Args:
      layout: of the grid.
      heads: of the layer.
      allocation: share of heads per branch, for methods that have some; None: the method's own
        expectation.
      phase: of a sampling step; None is `usual_phase`.

    Returns:
      pairs and lists of all attention calls of the layer, at head dimension 1. Lists that depend on
      the data are taken as equally long (`even_lists`).

    Raises:
      ConfigError: for an allocation that is invalid or not of so many heads.
    """
    raise NotImplementedError

  @property
  def usual_phase(self) -> str:
    """The phase of the step that most of a sampling run does: what is counted by default."""
    return ""

  def only_attends(self, phase: str) -> bool:
    """Whether a step does nothing but attend by tables: no program is then traced, no table built.

    At 1M tokens radial's table takes 12 s to build, its pairs a few milliseconds to count.
    """
    return False

  @property
  def routed(self) -> bool:
    """Whether a router deals the heads, so that training and evaluation run differently."""
    return False

  @property
  def trains_all_branches(self) -> bool:
    """Whether a training step runs every branch of every head, and so costs more than an evaluation."""
    return False

  @property
  def branches(self) -> tuple[str, ...]:
    """Names of what a head can be given; routing is an array over these."""
    return ()

  @property
  def branch_of_part(self) -> dict[str, str]:
    """Named scopes (`jax.named_scope`) of the program that only heads of one branch need."""
    return {}

  # ---- counting, the same for all methods ----------------------------------------------------------

  def for_counting(self) -> "Method":
    """Returns the method whose program is counted; some fields choose among its results only."""
    return self

  def program(self, layout: TileLayout, heads: int, head_dim: int, phase: str) -> ClosedJaxpr:
    """Traces one sampling step between a layer's projections, in the plain form of every op.

    Nothing is computed, and it works while another program is traced. Parameters are made in the
    scope "parameters".
    """
    dims = Dims(heads, head_dim, heads * head_dim)
    state = jax.eval_shape(lambda: self.init_state(1, dims, layout))
    x = jax.ShapeDtypeStruct((1, layout.n_buffer, heads, head_dim), jnp.float32)
    embedding = jax.ShapeDtypeStruct((1, dims.cond_dim), jnp.float32)

    def run(q, k, v, embedding, arrays, tables, state):
      with jax.named_scope("parameters"):
        module = self.build(dims, layout, nnx.Rngs(0))
      cond = Cond(jnp.full(1, 0.5), embedding, phase=phase)
      # Norm and rotary are elementwise, hence in no count of products.
      projected = Projected(q, k, v, _unchanged, _unchanged, arrays, implementation="xla")
      out, state, _ = self(module, projected, cond, tables, state)
      return out, state

    return jax.make_jaxpr(run)(x, x, x, embedding, layout.arrays(), self.tables(layout), state)


def _unchanged(x: jax.Array, positions: jax.Array) -> jax.Array:
  return x


def even_lists(layout: TileLayout, heads: float, pairs: float) -> CallCost:
  """Returns the lists of `heads` heads of `pairs` scored pairs each: all equally long.

  It is exact for dense attention where tiles are equally full; in general only its pairs are.
  """
  listed = pairs / (layout.tiles * (layout.fill * layout.block) ** 2)
  call = uniform(layout.tiles, listed, layout.tiles, head_dim=1, block=layout.block, heads=heads)
  return dataclasses.replace(call, pairs=float(pairs) * heads)


def attend(qkv: Projected, mask, cond: Cond):
  """Every token by one table: out and the aux of a method without routing or losses."""
  q, k = qkv.rotated()
  out, _ = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
  return out, plain_aux(mask, qkv.layout.layout.n, q.shape[0], q.shape[2], cond.want_masks)


def mask_density(mask, n: int, b: int, h: int) -> jax.Array:
  """Density of a table for every sample and head, float32 `[b, h]`."""
  return jnp.broadcast_to(jnp.asarray(mask.density(n), jnp.float32), (b, h))


def plain_aux(mask, n: int, b: int, h: int, want_masks: bool = False) -> dict:
  """The aux of a method without routing or losses."""
  density = mask_density(mask, n, b, h)
  return {
    "density": density,
    "cost": density.mean(),
    "loss": np.float32(0.0),
    **mask_aux(mask, want_masks),
  }


def mask_aux(mask, want_masks: bool) -> dict:
  """`{"mask": mask}` on request, without its backward table; lists are written out, so that no leaf is None."""
  if not want_masks:
    return {}
  bias = np.zeros(mask.kv_tiles, np.float32) if mask.kv_bias is None else mask.kv_bias
  mask = dataclasses.replace(mask, kv_indices=mask.indices(), kv_bias=bias, transposed=None)
  return {"mask": jax.tree.map(jnp.asarray, mask)}
