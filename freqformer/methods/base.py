"""The seam of a method: what an attention layer hands over, and the calls that it makes.

A method is one frozen dataclass. Its parameters live in the NNX module it builds, its static masks
in the tables it makes once per grid, its memory between denoising steps in a state that the sampler
carries. The layer knows no method by name.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr

from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.grid.rotary import angle_tables, grid_theta
from freqformer.kernels.around.prepare import Prepared, norm_and_turn, prepare
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import CallCost, uniform
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core.op import ALIASES
from freqformer.methods.parts.exchanged import attend_exchanged
from freqformer.tables.exchange import TileExchange


@dataclasses.dataclass(frozen=True)
class Dims:
  """Sizes and kind of a layer that a method's parameters depend on.

  Attributes:
    heads: of the layer.
    head_dim: channels of a head.
    cond_dim: of the timestep's embedding.
    over_heads: the norms of queries and keys are over all heads of a token together.
  """

  heads: int
  head_dim: int
  cond_dim: int
  over_heads: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cond:
  """The moment that a layer runs in. Layers of one run share all of it but `rng`.

  Attributes:
    time: `[b]`, 1 is noise.
    embedding: `[b, cond_dim]`, of the timestep, not the class: both guidance halves share it.
    progress: scalar in [0, 1], how much of the training is done; 1 in evaluation.
    rng: key for stochastic routing, or None.
    train: static; training mode of routers.
    guided: static; the batch is [conditional half, unconditional half] and both share routing and
      masks.
    soft_evaluation: static; evaluate with the soft mixture instead of the hard choice.
    phase: static; what this step does for the layer's method (`Method.phase`); in training "", or
      `DENSE` for a while (`train.dense_steps`).
    want_masks: static; aux then holds `"mask"`, the `BlockMask` that ran.
    want_finite: static; aux then holds `"finite"`, 1 or 0: is the layer's output finite?
    teacher: the dense table, or None; with it aux holds `"distance"`, the attention layer's from
      dense attention (`model.attention.distance`).
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
  want_finite: bool = dataclasses.field(default=False, metadata={"static": True})
  teacher: BlockMask | None = None

  def share(self, x: jax.Array) -> jax.Array:
    """Returns `x` `[b, ...]` with the conditional half's rows in the unconditional half, if any."""
    if not self.guided:
      return x
    half = x[: x.shape[0] // 2]
    return jnp.concatenate([half, half])


@dataclasses.dataclass(frozen=True)
class Projected:
  """Un-rotated, un-normed projections in tile order, and what finishes them.

  Attributes:
    q, k, v: `[b, n_buffer, h, d]`.
    rotate_q, rotate_k: `(x [b, m, h, d], positions [m, 3]) -> [b, m, h, d]`: QK-norm, then rotary
      at the positions.
    layout: the layout's arrays.
    implementation: of attention, or None for automatic choice.
    prepare: packs q, k and v in one pass, see `of_joint`. None where q, k and v were not projected
      together: such a value serves methods that ask for `rotated` only.
    theta: base of rotary per axis (t, y, x), as trained; empty: from the layout's own grid.
    gains: of the norms of q and k, `[d]` each, for a method that norms tokens of its own; `[h, d]`
      if `over_heads`.
    product, bias: `[b, n_buffer, 3, h, d]` and `[3, h, d]`, whose sum q, k and v are; for a method
      that reads all three in one pass. None where they were not projected together.
    order: int `[h]`, the number of each head here in the layer; None: they are in order
      (`Method.head_order`).
    over_heads: the norms are over all heads of a token together.
    shares: rotated pairs per axis (t, y, x); None: `grid.rotary.axis_pairs`.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  rotate_q: Callable
  rotate_k: Callable
  layout: LayoutTables
  implementation: str | None = None
  prepare: Callable[..., Prepared] | None = None
  theta: Sequence[float] = ()
  gains: tuple[jax.Array, jax.Array] | None = None
  product: jax.Array | None = None
  bias: jax.Array | None = None
  order: np.ndarray | None = None
  over_heads: bool = False
  shares: tuple[int, int, int] | None = None

  def __post_init__(self):
    theta = self.theta or grid_theta(self.layout.layout.grid, self.q.shape[-1])
    object.__setattr__(self, "theta", tuple(theta))

  @classmethod
  def of_joint(
    cls,
    product: jax.Array,
    bias: jax.Array,
    gains: tuple[jax.Array, jax.Array],
    layout: LayoutTables,
    implementation: str | None = None,
    theta: Sequence[float] = (),
    order: np.ndarray | None = None,
    *,
    over_heads: bool = False,
    shares: tuple[int, int, int] | None = None,
  ) -> "Projected":
    """Returns what a layer hands to its method.

    Its `prepare(cells=None, bands=None, ahead=None, *, copies=1, filtered="", pooled=False)` is
    `kernels.around.prepare.prepare` of the product; `copies` is how often each head is there.

    Args:
      product: `[b, n_buffer, 3, h, d]`, of the joint projection without its bias, which XLA may not
        fuse with the product.
      bias: `[3, h, d]`.
      gains: as the attribute.
      implementation: of attention, or None for automatic choice.
      theta: as the attribute.
      order: as the attribute.
      over_heads: as the attribute.
      shares: as the attribute.
    """

    # Both read `projected`, which is made below.
    def finish(gain, x, positions):
      with jax.named_scope("norm_rotary"):
        return norm_and_turn(x, gain, projected.angles(positions), over_heads)

    def packed(cells=None, bands=None, ahead=None, *, copies=1, **options):
      with jax.named_scope("prepare"):
        angles = projected.angles(layout.positions)
      return prepare(
        copied(product, copies, 3),
        copied(bias, copies, 1),
        tuple(copied(gain, copies, 0) for gain in gains) if over_heads else gains,
        angles,
        layout.kv_len,
        cells,
        bands,
        ahead,
        over_heads=over_heads,
        implementation=projected.other_ops_implementation,
        **options,
      )

    rotations = (functools.partial(finish, gain) for gain in gains)
    arrays = jnp.unstack(product + bias.astype(product.dtype), axis=2)
    # `packed` reads it.
    projected = cls(
      *arrays,
      *rotations,
      layout,
      implementation,
      packed,
      theta,
      gains,
      product,
      bias,
      order,
      over_heads,
      shares,
    )
    return projected

  def in_order(self, x):
    """Returns what belongs to the layer's heads `[1, h, ...]` for the heads as they are here."""
    return x if self.order is None else x[:, self.order]

  @property
  def other_ops_implementation(self) -> str | None:
    """Implementation of the layer's ops other than attention, "xla" or None (automatic).

    It is automatic beside GPU kernels of attention too: others may refuse an op's call.
    """
    name = ALIASES.get(self.implementation, self.implementation)
    return None if name in (None, "hopper", "triton") else "xla"

  def angles(self, positions) -> tuple[jax.Array, jax.Array]:
    """Returns rotary's cosines and sines at `positions` `[m, 3]` in tokens, `[m, d / 2]` each."""
    return angle_tables(positions, self.q.shape[-1], self.theta, self.shares)

  def rotated(self) -> tuple[jax.Array, jax.Array]:
    """Returns q and k finished, each token at its own position."""
    if self.prepare is not None:
      return self.prepare()[:2]
    positions = self.layout.positions
    return self.rotate_q(self.q, positions), self.rotate_k(self.k, positions)


@dataclasses.dataclass(frozen=True)
class Method:
  """Base of all methods; a subclass overrides what it needs, attributes also by properties.

  Attributes:
    shares_state: the halves of guidance have one state between them, that of the conditional half.
    usual_phase: phase of the step that most of a sampling run does: what is counted by default.
    routed: a router deals the heads, so that training and evaluation run differently.
    trains_all_branches: a training step runs every branch of every head: it costs more than an
      evaluation.
    exchanges_tiles: devices that share a sample may exchange tiles instead of heads (`exchange`).
    branches: names of what a head can be given; routing is an array over these.
    within_attention: attributes of the method's module that act on queries and keys: a gradient in
      them needs attention's backward pass, which one in routers and gates does not.
    branch_of_part: named scopes (`jax.named_scope`) of the program that only heads of one branch
      need, and that branch.
  """

  shares_state: ClassVar[bool] = False
  usual_phase: ClassVar[str] = ""
  routed: ClassVar[bool] = False
  trains_all_branches: ClassVar[bool] = False
  exchanges_tiles: ClassVar[bool] = False
  branches: ClassVar[tuple[str, ...]] = ()
  within_attention: ClassVar[tuple[str, ...]] = ()
  branch_of_part: ClassVar[dict[str, str]] = {}

  def build(self, dims: Dims, layout: TileLayout, rngs: nnx.Rngs) -> nnx.Module | None:
    """Returns the method's parameters (router, gates), or None.

    Raises:
      ConfigError: if the method cannot serve these sizes.
    """
    return None

  def tables(self, layout: TileLayout) -> Any:
    """Returns NumPy masks and matrices as a pytree, once per grid; they are arguments of jit.

    Numbers that change no shape belong here, too: trials that differ in them then compile once.
    """
    return {}

  def init_state(self, batch: int, dims: Dims, layout: TileLayout) -> Any:
    """Returns what one layer remembers between denoising steps; `{}` for most.

    The sampler carries it; its shapes never change and no checkpoint holds it.

    Args:
      batch: rows that run together; where `shares_state`, samples: with guidance half of the rows.
    """
    return {}

  def phase(self, step: int, steps: int) -> str:
    """Names what a sampling step does ("warmup", "search", ...); each phase compiles on its own."""
    return ""

  def check_run(self, steps: int) -> None:
    """Raises ConfigError if the method's schedule does not fit a run of `steps` sampling steps."""

  def refuses_dense(self, phase: str) -> str | None:
    """Returns why an evaluation of this phase cannot be dense instead (`attention.schedule`).

    None: it can, because dense attention is what the method approximates, and no later evaluation
    needs what this one finds.
    """
    return "trained parts of it take part in attention, which a dense evaluation would leave out"

  def head_order(self, layout: TileLayout, heads: int, devices: int) -> np.ndarray | None:
    """Returns the order in which devices that share a layer's heads are equally busy, int `[h]`.

    Each takes as many of them, one after the other. None: the layer's own; it is the best where
    heads cost the same, or where only the data tell.
    """
    return None

  def exchange(self, tables: Any, layout: TileLayout, heads: int) -> TileExchange | None:
    """Returns what devices that share a sample exchange instead of heads, if that is less.

    None: they exchange tokens for heads.

    Args:
      tables: of this layout.
    """
    return None

  def check_training(self, layout: TileLayout, heads: int) -> None:
    """Raises ConfigError if training on this grid cannot do what the fields ask for."""

  def __call__(self, module, qkv: Projected, cond: Cond, tables, state):
    """Runs the attention of one layer.

    Returns:
      out `[b, n_buffer, h, d]`, the new state, and aux: a dict with at least `density` `[b, h]`
      (scored pairs / n^2, as run), `cost` (scalar: pairs run over h n^2, all branches counted) and
      `loss` (scalar, added to the training loss); with `cond.want_masks` also `mask`, the
      `BlockMask` that ran.
    """
    raise NotImplementedError

  def pairs(
    self, layout: TileLayout, heads: int, allocation=None, phase: str | None = None
  ) -> CallCost:
    """Counts pairs and lists of one layer and sample at head dimension 1, without a table.

    It is exact; lists that depend on the data are taken as equally long (`even_lists`).

    Args:
      heads: of the layer.
      allocation: share of heads per branch; None: the method's own expectation.
      phase: of a sampling step; None is `usual_phase`.

    Raises:
      ConfigError: for an allocation that is invalid or not of so many heads.
    """
    raise NotImplementedError

  def only_attends(self, phase: str) -> bool:
    """Returns whether a step only attends by tables: then no program is traced, no table built.

    A table of 1M tokens is slow to build; its pairs are counted without it.
    """
    return False

  # ---- counting, the same for all methods

  def for_counting(self) -> "Method":
    """Returns the method whose program is counted; some fields choose among its results only."""
    return self

  def has_parameters(self, layout: TileLayout, heads: int, head_dim: int) -> bool:
    """Returns whether `build` makes any."""
    dims = Dims(heads, head_dim, heads * head_dim)
    module = nnx.eval_shape(lambda: self.build(dims, layout, nnx.Rngs(0)))
    return module is not None and bool(jax.tree.leaves(nnx.state(module, nnx.Param)))

  def program(self, layout: TileLayout, heads: int, head_dim: int, phase: str) -> ClosedJaxpr:
    """Traces one sampling step between a layer's projections, in the plain form of every op.

    Nothing is computed, also while another program is traced. The scope "parameters" makes these.
    """
    dims = Dims(heads, head_dim, heads * head_dim)
    state = jax.eval_shape(lambda: self.init_state(1, dims, layout))
    product = jax.ShapeDtypeStruct((1, layout.n_buffer, 3, heads, head_dim), jnp.float32)
    embedding = jax.ShapeDtypeStruct((1, dims.cond_dim), jnp.float32)

    def run(product, embedding, arrays, tables, state):
      with jax.named_scope("parameters"):
        module = self.build(dims, layout, nnx.Rngs(0))
        bias = jnp.zeros((3, heads, head_dim))
        gains = (jnp.ones(head_dim), jnp.ones(head_dim))
      cond = Cond(jnp.full(1, 0.5), embedding, phase=phase)
      projected = Projected.of_joint(product, bias, gains, arrays, implementation="xla")
      out, state, _ = self(module, projected, cond, tables, state)
      return out, state

    return jax.make_jaxpr(run)(product, embedding, layout.arrays(), self.tables(layout), state)


def copied(x: jax.Array, copies: int, axis: int) -> jax.Array:
  """Returns x with what lies along an axis so often, one after the other, as `jnp.repeat` does.

  Devices that share the axis move nothing, where `jnp.repeat` would gather.
  """
  if copies == 1:
    return x
  *before, size = x.shape[: axis + 1]
  after = x.shape[axis + 1 :]
  x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, size, copies, *after))
  return x.reshape(*before, size * copies, *after)


def even_lists(layout: TileLayout, heads: float, pairs: float) -> CallCost:
  """Returns equally long lists of `heads` heads of `pairs` pairs each; only its pairs are exact."""
  listed = pairs / (layout.tiles * (layout.fill * layout.block) ** 2)
  call = uniform(layout.tiles, listed, layout.tiles, head_dim=1, block=layout.block, heads=heads)
  return dataclasses.replace(call, pairs=float(pairs) * heads)


def attend(
  qkv: Projected, mask: BlockMask | TileExchange, cond: Cond, rotated=None
) -> tuple[jax.Array, dict]:
  """Runs every token by one table: out, and the aux of a method without routing or losses.

  `rotated` is `qkv.rotated()` where a method has it already.
  """
  b, _, h, _ = qkv.q.shape
  if isinstance(mask, TileExchange):
    out = attend_exchanged(qkv, mask)
    mask = mask.whole
  else:
    q, k = rotated or qkv.rotated()
    out, _ = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
  return out, plain_aux(mask, qkv.layout.layout.n, b, h, cond.want_masks)


def mask_density(mask: BlockMask, n: int, b: int, h: int) -> jax.Array:
  """Returns the density of a table for every sample and head, float32 `[b, h]`."""
  return jnp.broadcast_to(jnp.asarray(mask.density(n), jnp.float32), (b, h))


def plain_aux(mask: BlockMask, n: int, b: int, h: int, want_masks: bool = False) -> dict:
  """Returns the aux of a method without routing or losses."""
  density = mask_density(mask, n, b, h)
  return {
    "density": density,
    "cost": density.mean(),
    "loss": np.float32(0.0),
    **mask_aux(mask, want_masks),
  }


def mask_aux(mask: BlockMask, want_masks: bool) -> dict:
  """Returns `{"mask": mask}` on request, its lists written out, without its backward table."""
  if not want_masks:
    return {}
  bias = np.zeros(mask.kv_tiles, np.float32) if mask.kv_bias is None else mask.kv_bias
  mask = dataclasses.replace(mask, kv_indices=mask.indices(), kv_bias=bias, transposed=None)
  return {"mask": jax.tree.map(jnp.asarray, mask)}
