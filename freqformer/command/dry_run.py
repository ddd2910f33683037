"""Describes a run without its data: shapes, parameters, memory, FLOPs."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer import placement
from freqformer.analysis.hlo_bytes import collectives
from freqformer.config import ConfigError, numbers
from freqformer.cost import model_cost, step_cost
from freqformer.data.sources import class_names
from freqformer.model.architectures import make_model
from freqformer.pages.cost import counted
from freqformer.pages.text import aligned
from freqformer.train import mesh as meshes
from freqformer.train.experiment import Experiment
from freqformer.train.step import init_state, make_train_step

_UCF101_CLASSES = 101


def describe(experiment: Experiment) -> str:
  """Returns a page of text; its memory figures come from compiling the train step for this device.

  Without data there are as many classes as in UCF-101.
  """
  data = experiment.data
  model = experiment.model
  batch_size = experiment.train.batch_size
  shape = experiment.latent_shape
  layout = model.layout(shape)
  assumed = ""
  try:
    names = class_names(data)
  except ConfigError:
    names = [""] * _UCF101_CLASSES
    assumed = f", UCF-101's: assumed, {data.root} cannot be read"
  condition = experiment.conditioned_on(names)

  abstract = nnx.eval_shape(lambda: make_model(model, shape, nnx.Rngs(0), **condition))
  graphdef, params = nnx.split(abstract)
  state = jax.eval_shape(lambda p: init_state(p, experiment.train, 0), params)
  batch = {
    "latent": jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32),
    "label": abstract.null(batch_size),
  }
  step = make_train_step(graphdef, experiment.train)
  mesh = experiment.make_mesh()
  with jax.set_mesh(mesh):
    tables = abstract.tables(shape, with_dense=experiment.train.attends_densely)
    tables = placement.everywhere(tables)
    placed = placement.share(state)
    own = placement.everywhere(numbers(experiment.train))
    compiled = step.lower(placed, placement.split_batch(batch), tables, own).compile()
  memory = compiled.memory_analysis()
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

  cost = model_cost(model, shape)
  dense = model_cost(model.with_method("dense"), shape)
  step_flops = step_cost(model, shape, **experiment.train.counted).total * batch_size
  told = f"{len(names)} classes{assumed}"
  if data.condition != "class":
    told = f"data.condition={data.condition!r}"
  runs = ", ".join(f"{count} {type(method).__name__}" for count, method in model.runs())
  rows = {
    **data.facts(),
    "devices": meshes.describe(mesh),
    "tokens": f"{layout.n:,} = {_by(layout.grid)}; {layout.tiles} tiles of {_by(layout.tile)} in "
    f"{layout.block} rows, {layout.fill:.0%} filled",
    "layers": f"{runs}; width {model.width}, {model.heads} heads",
    "parameters": f"{parameters:,} with {told}",
    "state": f"{state_bytes / 1e6:,.1f} MB (weights, EMA, moments)",
    **_per_device(mesh, placed, memory, compiled.as_text(), batch_size),
    "train step": f"{memory.temp_size_in_bytes / 1e6:,.1f} MB temporary at batch {batch_size}, "
    f"{step_flops / 1e9:,.1f} GFLOP with backward (recomputation not counted)",
    "forward": f"{cost.total / 1e9:,.2f} GFLOP a sample, "
    f"attention {cost.attention_flops / 1e9:,.2f}",
    "dense model": f"{dense.total / 1e9:,.2f} GFLOP a sample, "
    f"attention {dense.attention_flops / 1e9:,.2f}; this model's attention has "
    f"{cost.attention_flops / dense.attention_flops:.1%} of it",
    "sampling": _sampling(experiment),
  }
  return aligned(list(rows.items()))


def _sampling(experiment: Experiment) -> str:
  """Returns what a run of the sampler costs, or why there is none of so many steps."""
  try:
    counts = counted(experiment)["sampling"]
  except ConfigError as error:
    return f"refused: {error}"
  own, dense = (counts[name]["total_flops"] for name in ("own", "dense"))
  evaluations = len(experiment.sample.guided())
  return (
    f"{own / 1e9:,.1f} GFLOP a sample in {evaluations} evaluations, {own / dense:.1%} of the dense "
    "model's"
  )


def _per_device(mesh, state, memory, program: str, batch_size: int) -> dict[str, str]:
  """Returns what one of several devices holds and exchanges, and what to do if that is too much."""
  if mesh.size == 1:
    return {}
  held = _bytes_of_a_device(state)
  parameters = _bytes_of_a_device(state.params)
  exchanged = ", ".join(
    f"{kind} {runs} times {moved / 1e6:,.1f} MB"
    for kind, (runs, moved) in collectives(program).items()
  )
  rows = {
    "a device": f"{parameters / 1e6:,.1f} MB of parameters, "
    f"{(held - parameters) / 1e6:,.1f} MB of their average and moments, "
    f"{memory.temp_size_in_bytes / 1e6:,.1f} MB temporary",
    "exchanged": f"in a step, results in all: {exchanged}" if exchanged else "nothing",
  }
  limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
  if limit and held + memory.temp_size_in_bytes > limit:
    change = "raise mesh.fsdp"
    if memory.temp_size_in_bytes > held:
      several = batch_size > mesh.shape["data"] * mesh.shape["fsdp"]
      change = "lower train.batch_size" if several else "raise mesh.context"
    rows["too much"] = f"a device has {limit / 1e6:,.1f} MB: {change}"
  return rows


def _bytes_of_a_device(tree) -> int:
  """Returns the bytes of placed arrays, or of their shapes, on one of the devices."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _by(sizes) -> str:
  return "x".join(map(str, sizes))
