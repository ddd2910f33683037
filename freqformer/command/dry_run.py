"""What a run would be, data or not: shapes, parameters, memory, FLOPs."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer.config import ConfigError
from freqformer.cost import model_cost, training_flops
from freqformer.data.clips import list_clips
from freqformer.data.protocol import DataConfig
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.experiment import Experiment
from freqformer.train.step import init_state, make_train_step


def abstract_model(experiment: Experiment, latent_shape, classes: int):
  """`(graphdef, abstract parameters)`: nothing is allocated."""

  def make():
    return VideoDiT(experiment.model, latent_shape, classes, nnx.Rngs(experiment.seed))

  return nnx.split(nnx.eval_shape(make))


def _classes(data: DataConfig) -> tuple[int, str]:
  """The number of classes, and what to say where it is assumed."""
  try:
    return len(list_clips(data, "train").class_names), ""
  except ConfigError:
    return 101, f", UCF-101's: assumed, {data.root} cannot be read"


def describe(experiment: Experiment, classes: int | None = None) -> str:
  """A printed page; the memory figures come from compiling the train step for this machine's device.

  Args:
    classes: how many; None counts the data's names, and where there are no data takes UCF-101's.
  """
  data, model, train, shape = (
    experiment.data,
    experiment.model,
    experiment.train,
    experiment.latent_shape,
  )
  assumed = ""
  if classes is None:
    classes, assumed = _classes(data)
  layout = model.layout(shape)
  graphdef, params = abstract_model(experiment, shape, classes)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  batch = {
    "latent": jax.ShapeDtypeStruct((train.batch_size, *shape), jnp.float32),
    "label": jax.ShapeDtypeStruct((train.batch_size,), jnp.int32),
  }
  step = (
    make_train_step(graphdef, train, classes)
    .lower(state, batch, make_tables(model, shape))
    .compile()
  )
  memory = step.memory_analysis()
  cost, dense = model_cost(model, shape), model_cost(model.with_method("dense"), shape)
  step_cost = model_cost(model, shape, training=True)
  flops = training_flops(step_cost)
  rows = [
    (
      "video",
      f"{data.frames} frames {data.resolution[0]}x{data.resolution[1]}, stride {data.stride}",
    ),
    ("latents", "x".join(map(str, shape)) + f" (codec {data.codec.name})"),
    (
      "tokens",
      f"{layout.n:,} = {'x'.join(map(str, layout.grid))}; {layout.tiles} tiles of "
      f"{'x'.join(map(str, layout.tile))} in {layout.block} rows, {layout.fill:.0%} filled",
    ),
    (
      "layers",
      ", ".join(f"{n} {type(m).__name__}" for n, m in model.runs())
      + f"; width {model.width}, {model.heads} heads",
    ),
    ("parameters", f"{count:,} with {classes} classes{assumed}"),
    (
      "state",
      f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e6:,.1f} MB (weights, EMA, moments)",
    ),
    (
      "train step",
      f"{memory.temp_size_in_bytes / 1e6:,.1f} MB temporary at batch {train.batch_size}, "
      f"{flops * train.batch_size / 1e9:,.1f} GFLOP with backward (recomputation not counted)",
    ),
    (
      "forward",
      f"{cost.total / 1e9:,.2f} GFLOP a sample, attention {cost.attention_flops / 1e9:,.2f}",
    ),
    (
      "dense model",
      f"{dense.total / 1e9:,.2f} GFLOP a sample, attention {dense.attention_flops / 1e9:,.2f}; this model's "
      f"attention has {cost.attention_flops / dense.attention_flops:.1%} of it",
    ),
  ]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
