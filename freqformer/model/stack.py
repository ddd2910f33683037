"""`LayerStack`: what all video transformers share, runs of layers with any attention method.

Runs of layers with one method are one scan over stacked parameters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer.config import refusing
from freqformer.cost import DENSE
from freqformer.kernels.block_sparse.api import CHECKPOINT_NAMES
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.base import Cond
from freqformer.model.config import ModelConfig
from freqformer.model.schedule import DenseSchedule, Part
from freqformer.placement import check_context, gathered, split
from freqformer.tables.dense import dense

_keep = jax.checkpoint_policies.save_only_these_names
# All keep choices: they could flip when they are made again.
_CHOICES = ("routing", "tables")
_WITH_ATTENTION = _keep(*_CHOICES, *CHECKPOINT_NAMES)
# What a layer keeps for its backward, by `ModelConfig.remat_policy`; the rest is computed again.
POLICIES = {
  "full": _keep(*_CHOICES),
  "attention": _WITH_ATTENTION,
  "products": jax.checkpoint_policies.save_from_both_policies(
    _WITH_ATTENTION, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}


class LayerStack(nnx.Module):
  """Base of models whose layers are `self.runs`, of `stacked`, configured by `self.config`.

  A layer is called with tokens `[b, n_buffer, width]`, the condition, a `Cond`, the layout's
  arrays, its method's tables and its state, and returns tokens, the new state and the method's aux.

  Attributes:
    config: of the model.
    behind: names of the parts that come after the layers.
  """

  config: ModelConfig
  behind: ClassVar[tuple[str, ...]] = ()

  def tables(self, latent_shape, with_dense: bool = False) -> dict:
    """Returns everything static about a grid, to be passed to jit as an argument."""
    return layer_tables(self.config, latent_shape, with_dense)

  def init_state(self, batch: int, latent_shape, guided: bool = False) -> list:
    """Returns the layers' memory before the first denoising step, one stacked pytree per run.

    If `guided`, the `batch` rows are the two halves of guidance.
    """
    layout = self.config.layout(latent_shape)
    dims = self.config.dims.for_method
    states = []
    for count, method in self.config.runs():
      rows = batch // 2 if guided and method.shares_state else batch
      stack = functools.partial(_repeat, count)
      states.append(jax.tree.map(stack, method.init_state(rows, dims, layout)))
    return states

  def conditional_half(self, state: list) -> list:
    """Returns what the conditional half of guidance remembers, to run it alone."""

    def half(x):
      return x[:, : x.shape[1] // 2]

    return [
      own if method.shares_state else jax.tree.map(half, own)
      for (_, method), own in zip(self.config.runs(), state, strict=True)
    ]

  def both_halves(self, state: list) -> list:
    """Inverts `conditional_half`: the unconditional half remembers the same."""

    def twice(x):
      return jnp.concatenate([x, x], 1)

    return [
      own if method.shares_state else jax.tree.map(twice, own)
      for (_, method), own in zip(self.config.runs(), state, strict=True)
    ]

  def schedule(self, steps: int) -> list[tuple[str, ...]]:
    """Returns the phases of each evaluation of a sampling run: `ModelConfig.phases`."""
    return self.config.phases(steps)

  def run_layers(
    self, tokens, condition, cond: Cond, tables, state: list, phases=()
  ) -> tuple[jax.Array, list, list[dict]]:
    """Runs all layers on tokens in tile order.

    Args:
      tokens: `[b, n_buffer, width]`.
      condition: any pytree, which every layer is given.
      cond: its `rng` is split among the layers, its phase is that of `phases`.
      tables: of `layer_tables`.
      state: of `init_state`.
      phases: one for each of `ModelConfig.parts`, of `schedule`; empty: none, by runs of layers.

    Returns:
      The tokens, the new state, and aux: one dict per part (without phases per run of layers),
      stacked over its layers.
    """
    pieces = [[] for _ in self.runs]  # of new states
    auxes = []
    parts = self.config.parts() if phases else self.config.whole_runs()
    for part, phase in zip(parts, phases or [""] * len(parts), strict=True):
      rng = None if cond.rng is None else jax.random.fold_in(cond.rng, part.run)
      own = dataclasses.replace(cond, phase=phase, rng=rng)
      table = tables["dense"] if phase == DENSE else tables["methods"][part.run]
      tokens, new, aux = self._scan(
        part, tokens, condition, own, tables["layout"], table, state[part.run]
      )
      pieces[part.run].append(new)
      auxes.append(aux)
    return tokens, [jax.tree.map(_joined, *own) for own in pieces], auxes

  def _scan(self, part: Part, x, condition, cond: Cond, layout, tables, state):
    """Scans over the stacked layers of a part of one run, whose state is given whole."""
    graphdef, params = nnx.split(self.runs[part.run])
    depth = jax.tree.leaves(params)[0].shape[0]
    keys = None if cond.rng is None else jax.random.split(cond.rng, depth)
    if part.count < depth:
      own = (params, state, keys)
      params, state, keys = jax.tree.map(lambda x: x[part.first : part.stop], own)

    def layer(x, of_layer):
      params, state, key = of_layer
      own = dataclasses.replace(cond, rng=key)
      block = nnx.merge(graphdef, gathered(params))
      x, state, aux = block(x, condition, own, layout, tables, state)
      if cond.want_finite:
        aux = {**aux, "finite": jnp.isfinite(x).all().astype(jnp.float32)}
      return split(x, context=1), (state, aux)

    if self.config.remat and cond.train:
      policy = POLICIES[self.config.remat_policy]
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x, (state, aux) = jax.lax.scan(layer, x, (params, state, keys))
    return x, state, aux


def stacked(create: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array) -> nnx.Module:
  """Returns a layer of `create` per key `[k]`, with stacked parameters."""

  @nnx.vmap(in_axes=0, out_axes=0)
  def one(key):
    return create(nnx.Rngs(key))

  return one(keys)


def _repeat(count: int, x) -> jax.Array:
  return jnp.broadcast_to(x, (count, *x.shape))


def _joined(*arrays) -> jax.Array:
  """Returns the states of a run's layers from those of its parts."""
  return jnp.concatenate(arrays) if arrays[1:] else arrays[0]


def layer_tables(config: ModelConfig, latent_shape, with_dense: bool = False) -> dict:
  """Returns what is static about a grid: `{"layout": LayoutTables, "methods": [one per run], ...}`.

  The dense table is among it `with_dense`, and where `attention.schedule` needs it.

  Raises:
    ConfigError: a method cannot serve the grid, or devices not share it.
  """
  layout = config.layout(latent_shape)

  def is_mask(x):
    return isinstance(x, BlockMask)

  def finish(x):
    return x.with_mean() if is_mask(x) else x

  methods = []
  for _, method in config.runs():
    with refusing(f"attention method {type(method).__name__}"):
      tables = method.tables(layout)
      exchange = method.exchange(tables, layout, config.heads)
    check_context(layout.tiles, 0 if exchange else config.heads)
    if exchange is not None:
      tables = exchange
    methods.append(jax.tree.map(finish, tables, is_leaf=is_mask))
  tables = {"layout": layout.arrays(), "methods": methods}
  if with_dense or config.attention.schedule != DenseSchedule():
    check_context(layout.tiles, config.heads)
    tables["dense"] = finish(dense(layout))
  return tables
