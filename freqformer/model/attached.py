"""Sparse attention for a model of one's own: a method beside the model, called layer by layer.

sizes = dict(heads=12, head_dim=128, layers=30, steps=50)
sparse = freqformer.attach("adaspa", grid=(21, 30, 52), **sizes)
for step in range(50):
  ...  # in each layer of the model, in the place of its attention:
    out = sparse(q, k, v, layer=layer, step=step)
sparse.stats()["density"]  # [steps, layers, heads]
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError, refusing
from freqformer.cost import DENSE
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Cond, Dims, Method, Projected, attend
from freqformer.methods.registry import method_class, parse_method, with_fields
from freqformer.tables.dense import dense

_BLOCK = 128


class Attached:
  """A method without trained parameters, with its memory of each layer of a denoising run.

  Attributes:
    method: as configured.
    layout: tiles of the token grid.
  """

  def __init__(
    self,
    method: str,
    grid: Sequence[int],
    *,
    heads: int,
    head_dim: int,
    layers: int,
    steps: int,
    guided: bool = False,
    block: int = _BLOCK,
    implementation: str | None = None,
  ):
    """Makes the method's tables.

    Args:
      method: a name with fields, e.g. "adaspa(sparsity=0.8)".
      grid: tokens (t, y, x).
      heads: of a layer.
      head_dim: channels of a head.
      layers: of the model.
      steps: of a denoising run, by which a method plans warm-up and searches.
      guided: batches are [conditional half, unconditional half]; both share lists.
      block: rows of a tile.
      implementation: of attention; None: the first that supports the calls.

    Raises:
      ConfigError: the method is unknown or needs training, or cannot serve the grid or the steps.
    """
    name, fields = parse_method(method)
    self.method: Method = with_fields(method_class(name)(), fields, name, root="")
    self._name = method
    with refusing(f"method {method}"):
      self.layout = TileLayout.fit(tuple(grid), block)
      self._tables = self.method.tables(self.layout)
      self.method.check_run(steps)
      if self.method.has_parameters(self.layout, heads, head_dim):
        raise ConfigError("it has parameters that need training; attach one that has none.")
    self._dims = Dims(heads, head_dim, heads * head_dim)
    self._layers = layers
    self._steps = steps
    self._guided = guided
    self._implementation = implementation
    self._dense = dense(self.layout)
    self._arrays = self.layout.arrays()
    self._is_detached = False
    self.reset()

  def reset(self):
    """Forgets a run: the next one begins at step 0."""
    self._states = [None] * self._layers
    self._density = np.full((self._steps, self._layers, self._dims.heads), np.nan, np.float32)

  def detach(self):
    """Makes all calls dense from here on, in the same order of tokens, and forgets the run."""
    self._is_detached = True
    self.reset()

  def stats(self) -> dict[str, np.ndarray]:
    """Returns what ran: `density`, float32 `[steps, layers, heads]`, nan where nothing did.

    It is scored pairs over all pairs, the mean over the batch.
    """
    return {"density": self._density.copy()}

  def __call__(
    self, q: jax.Array, k: jax.Array, v: jax.Array, *, layer: int, step: int
  ) -> jax.Array:
    """Returns attention `[b, n, h, d]` of tokens in raster order.

    Args:
      q: `[b, n, h, d]`, finished: behind norms and rotary, not scaled.
      k: likewise.
      v: likewise.
      layer: number of the layer.
      step: number of the denoising step; steps come in order.

    Raises:
      ConfigError: shapes, layer or step are not those that were told.
    """
    sizes = (self.layout.n, self._dims.heads, self._dims.head_dim)
    if q.ndim != 4 or q.shape[1:] != sizes or k.shape != q.shape or v.shape != q.shape:
      raise ConfigError(
        f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; attached was [b, {sizes[0]}, "
        f"{sizes[1]}, {sizes[2]}], tokens in raster order."
      )
    if not (0 <= layer < self._layers and 0 <= step < self._steps):
      raise ConfigError(
        f"{layer=} and {step=} must lie below the {self._layers} layers and {self._steps} steps "
        "that were attached."
      )
    phase = DENSE if self._is_detached else self.method.phase(step, self._steps)
    if self._states[layer] is None:
      rows = len(q) // 2 if self._guided and self.method.shares_state else len(q)
      self._states[layer] = self.method.init_state(rows, self._dims, self.layout)
    tables = self._dense if phase == DENSE else self._tables
    out, self._states[layer], density = self._run(phase)(
      q, k, v, self._arrays, tables, self._states[layer], np.float32(1 - step / self._steps)
    )
    self._density[step, layer] = density
    return out

  @functools.cache  # noqa: B019  as long as the object
  def _run(self, phase: str):
    """Returns the compiled call of a phase."""

    @jax.jit
    def run(q, k, v, arrays, tables, state, time):
      packed = (arrays.pack(x) for x in (q, k, v))
      qkv = Projected(*packed, _finished, _finished, arrays, self._implementation, None)
      qkv = dataclasses.replace(qkv, prepare=functools.partial(_prepared, qkv))
      embedding = jnp.zeros((len(q), self._dims.cond_dim))
      cond = Cond(jnp.full(len(q), time), embedding, phase=phase, guided=self._guided)
      if phase == DENSE:
        out, aux = attend(qkv, tables, cond)
      else:
        out, state, aux = self.method(None, qkv, cond, tables, state)
      return arrays.unpack(out), state, aux["density"].mean(0)

    return run


def attach(method: str, grid: Sequence[int], **options) -> Attached:
  """Returns a method to be called in a model's layers; arguments and errors as of `Attached`."""
  return Attached(method, grid, **options)


def _finished(x, positions):
  del x, positions
  raise ConfigError(_UNFINISHED)


def _prepared(qkv: Projected, *args, **options):
  """Stands in for `Projected.prepare`: of finished q and k nothing else can be made."""
  if args or any(options.values()):
    raise ConfigError(_UNFINISHED)
  return qkv.q, qkv.k, qkv.v


_UNFINISHED = (
  "this method makes tokens of its own before norms and rotary, and cannot be attached to finished "
  "q and k; take one that chooses among tokens, e.g. adaspa, block_topk(coarse=none), sliding_tile."
)
