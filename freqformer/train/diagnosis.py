"""Finds where a skipped step stops being finite, for the message about a run that skips."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.config import with_numbers
from freqformer.model.leaves import flatten
from freqformer.train.step import TrainConfig, TrainState, make_gradients

_LAST = 10**9  # their place, behind the number of any layer


def first_not_finite(
  graphdef,
  config: TrainConfig,
  state: TrainState,
  batch,
  tables,
  numbers,
  posterior=None,
  dense: int = 0,
) -> str:
  """Returns a clause about the step that has led to a state, computed again from its batch.

  Forward it names the first layer, counted from 0, whose output is not finite; where all are, the
  gradient that is the first one not to be, on the way back from the last layer.

  Args:
    graphdef: as of `make_train_step`, as is `dense`; the others as of its step.
  """
  gradients = make_gradients(graphdef, config, dense, want_finite=True)

  @jax.jit
  def look(state, batch, tables, numbers, posterior):
    own = with_numbers(config, numbers)
    step = state.step - 1
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
    (loss, found), grads = gradients(
      state.params, key, batch, tables, own, posterior, step / own.steps
    )
    return {
      "batch": jnp.isfinite(batch["latent"]).all(),
      "params": _finite(state.params),
      "layers": found["finite"] == 1,
      "loss": jnp.isfinite(loss),
      "gradients": _finite(grads),
    }

  behind = nnx.merge(graphdef, state.params).behind
  return _clause(jax.device_get(look(state, batch, tables, numbers, posterior)), behind)


def _finite(params) -> dict[str, jax.Array]:
  """Returns by leaf whether it is finite: one flag, or one for each of stacked layers."""
  return {
    name: jnp.isfinite(x).all(range(1, x.ndim) if name.startswith("runs/") else None)
    for name, x in flatten(params).items()
  }


def _clause(found: dict, behind: Collection[str]) -> str:
  if not found["batch"]:
    return "the batch itself holds numbers that are not finite"
  if broken := _broken(found["params"], behind):
    return f"the parameter {broken[max(broken)]} is not finite"
  if not found["layers"].all():
    return f"the first output that is not finite is that of layer {found['layers'].argmin()}"
  if not found["loss"]:
    return "the loss is not finite, and the outputs of all layers are"
  if broken := _broken(found["gradients"], behind):
    return f"the first gradient that is not finite, on the way back, is of {broken[max(broken)]}"
  return "loss and gradients of the last step are finite"


def _broken(finite: Mapping[str, np.ndarray], behind: Collection[str]) -> dict[int, str]:
  """Returns one leaf that is not finite at each place in the model, by the order of the forward."""
  names = [name.split("/", 2) for name in finite]
  depths = {int(name[1]): len(finite["/".join(name)]) for name in names if name[0] == "runs"}
  found = {}
  for name, flags in finite.items():
    if name.startswith("runs/"):
      _, run, leaf = name.split("/", 2)
      first = sum(depth for before, depth in depths.items() if before < int(run))
      for layer in first + np.flatnonzero(~flags):
        found.setdefault(int(layer), f"layer {layer} ({leaf})")
    elif not flags:
      found.setdefault(_LAST if name.split("/")[0] in behind else -1, name)
  return found
