"""Attention's packed output brought back to tokens: `weights * (tokens + U coarse)` in one pass.

`forward` below defines `lift` in plain JAX and gives its gradients. On Hopper a kernel
(`hopper_lift.py`) moves each token once, and multiplies only for heads with coarse rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from freqformer.kernels.around.prepare import multiply_tiles
from freqformer.kernels.core.cotangents import no_gradient
from freqformer.kernels.core.op import Op, Split

LIFT = Op(
  name="lift",
  implementations={"hopper": "around.hopper_lift_call", "xla": "around.lift"},
  forward=Split(("b.h.", "bh", "bh", "."), "b.h."),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Expansion:
  """Lifts by tile: a tile's rows get its matrix times its coarse tokens.

  Attributes:
    matrices: float32 `[classes, block, cells]`; padding rows and columns that a class lacks are 0.
    classes: int32 `[tiles]`, the matrix of each tile.
    starts: int32 `[tiles]`, each tile's first coarse token.
    front: static; rows before the tokens in the packed buffer.
  """

  matrices: jax.Array
  classes: jax.Array
  starts: jax.Array
  front: int = dataclasses.field(metadata={"static": True})

  @property
  def tiles(self) -> int:
    """Tiles of tokens."""
    return len(self.starts)

  @property
  def per_tile(self) -> int:
    """Coarse tokens of the largest class."""
    return self.matrices.shape[2]

  @property
  def alike(self) -> bool:
    """True if all tiles have one shape."""
    return self.matrices.shape[0] == 1

  def lift(self, packed: jax.Array, low: jax.Array) -> jax.Array:
    """Returns `[b, n, h, d]` in at least float32."""
    b, _, h, d = packed.shape
    if self.alike:  # no gather, whose gradient would be a scatter
      coarse = packed[:, : self.per_tile * self.tiles]
    else:  # behind a tile's own coarse tokens its matrix is zero
      starts = jnp.asarray(self.starts)
      coarse = packed[:, (starts[:, None] + jnp.arange(self.per_tile)).reshape(-1)]
    coarse = jnp.where(low[:, None, :, None], coarse, 0)
    coarse = coarse.reshape(b, self.tiles, self.per_tile, h, d)
    return multiply_tiles(self.matrices, self.classes, coarse)


def lift(
  packed: jax.Array,
  weights: jax.Array,
  low: jax.Array,
  expansion: Any,
  implementation: str | None = None,
) -> jax.Array:
  """Returns `[b, n, h, d]`, both resolutions' weighted sum, differentiable in packed and weights.

  Args:
    packed: `[b, front + n, h, d]`, coarse tokens first; finite everywhere.
    weights: `[b, h]`, multiplies the sum.
    low: bool `[b, h]`, heads whose coarse rows count; those of others are not read.
    expansion: an `Expansion`, or another value with its `front`, `tiles`, `per_tile` (None if the
      transform leaves the tile) and `lift`.
    implementation: of `LIFT.implementations`; None: the first that supports the call.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if the named implementation does not support the call, with the reasons.
  """
  name = LIFT.choose(packed, expansion, implementation=implementation)
  return LIFT.run_as_defined(name, (packed, weights, low, expansion))


@jax.named_scope("lift")
def forward(packed, weights, low, expansion):
  """Computes in float32 (or wider) and rounds once."""
  tokens = packed[:, expansion.front :].astype(jnp.promote_types(packed.dtype, jnp.float32))
  total = tokens + expansion.lift(packed, low)
  return (total * weights[:, None, :, None].astype(total.dtype)).astype(packed.dtype)


def backward(operands, cotangent):
  """Returns the operands' cotangents."""
  packed, weights, low, expansion = operands

  def run(packed, weights):
    return forward(packed, weights, low, expansion)

  _, pull = jax.vjp(run, packed, weights)
  return *pull(cotangent), *jax.tree.map(no_gradient, (low, expansion))
