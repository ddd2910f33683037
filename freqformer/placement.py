"""Places a model's arrays on the mesh that is set (`jax.set_mesh`); without one it moves nothing.

Samples are split over `data` and `fsdp`. Parameters are split over `fsdp` and made whole layer by
layer, where they are used (fully sharded data parallelism, arXiv 1910.02054). Tokens of a sample
are split over `context`, and exchanged for heads where a method attends (arXiv 2309.14509): each
device then has all tokens of some heads, so that every method runs there as it is.
"""

import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from freqformer.config import ConfigError

DATA = "data"
FSDP = "fsdp"
CONTEXT = "context"
AXES = (DATA, FSDP, CONTEXT)
SAMPLES = (DATA, FSDP)  # axes that samples are split over
# choice: numbers in a leaf below which every device has all of it.
_SMALL = 4096


def shared(path, x, devices: int) -> PartitionSpec:
  """Returns how `devices` share a leaf: matrices along the longer of their axes that divides.

  Biases and gains are everywhere. The axis of stacked layers is not divided, because a scan would
  gather all layers at once.

  Args:
    path: of the leaf in its pytree, `jax.tree_util`'s.
    x: an array, or its shape and dtype.
  """
  name = jax.tree_util.keystr(path)
  if devices == 1 or x.ndim < 2 or not ("kernel" in name or "embedding" in name):
    return PartitionSpec()
  fitting = [axis for axis in (x.ndim - 1, x.ndim - 2) if x.shape[axis] % devices == 0]
  if not fitting or math.prod(x.shape) < _SMALL:
    return PartitionSpec()
  axis = max(fitting, key=lambda axis: x.shape[axis])
  return PartitionSpec(*(FSDP if axis == place else None for place in range(x.ndim)))


def check_context(tiles: int, heads: int, devices: int | None = None):
  """Refuses to share a sample among devices that do not divide its tiles and heads.

  Args:
    heads: 0 where no layer exchanges tokens for heads.
    devices: along `context`; None: of the mesh that is set.

  Raises:
    ConfigError: says which numbers of devices would do.
  """
  devices = context_devices() if devices is None else devices
  if tiles % devices or heads % devices:
    of_heads = f" and {heads} heads" if heads else ""
    common = math.gcd(tiles, heads)
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    raise ConfigError(
      f"context={devices} devices cannot share a sample of {tiles} tiles{of_heads} evenly: "
      f"set config.mesh.context (of eval.py: --context) to one of {', '.join(map(str, fitting))}, "
      "or change model.heads, model.attention.block, the frames or the resolution."
    )


# ---- arrays outside a program -------------------------------------------------------------------


def share(tree):
  """Puts parameters, or what belongs to each, on the devices, split as `shared` has it."""
  return _each(tree, _put)


def split_batch(batch, size: int | None = None):
  """Puts arrays `[b, ...]` on the devices with their samples split, if they divide.

  Args:
    size: b, of a batch of which each process has its `own_rows`; None where each has all of it.
  """
  if not _mesh():
    return batch
  if size is None or jax.process_count() == 1:
    return jax.tree.map(lambda x: _put(_samples(len(x)), x), batch)
  placed = NamedSharding(jax.sharding.get_mesh(), _samples(size))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(placed, x, (size, *x.shape[1:])), batch
  )


def own_rows(size: int) -> list[int]:
  """Returns the numbers of the samples in a batch of so many that lie on this process's devices."""
  placed = NamedSharding(jax.sharding.get_mesh(), _samples(size))
  parts = placed.addressable_devices_indices_map((size,)).values()
  return sorted({row for (part,) in parts for row in range(size)[part]})


def everywhere(tree):
  """Puts arrays on the devices, whole on each."""
  return jax.tree.map(lambda x: _put(PartitionSpec(), x), tree) if _mesh() else tree


def _put(spec: PartitionSpec, x):
  """Returns an array on the devices; of a `ShapeDtypeStruct` one that lies there.

  Each process has all of it, or all processes its parts.
  """
  placed = NamedSharding(jax.sharding.get_mesh(), spec)
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
  if jax.process_count() > 1 and getattr(x, "is_fully_addressable", True):
    # `device_put` would send it to all other processes, to compare theirs with it.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, placed, lambda part: x[part])
  return jax.device_put(x, spec)


# ---- values inside a program ---------------------------------------------------------------------


def sharing(tree):
  """Returns parameters, or what belongs to each, split as `shared` has it."""
  return _each(tree, lambda spec, x: jax.lax.with_sharding_constraint(x, spec))


def gathered(tree):
  """Returns parameters, whole on every device; their gradients are split again."""
  return _each(tree, _gather)


def whole(tree):
  """Returns arrays, whole on every device."""
  return jax.lax.with_sharding_constraint(tree, PartitionSpec()) if _mesh() else tree


def split(x: jax.Array, context: int | None = None) -> jax.Array:
  """Returns x `[b, ...]` with its samples split over the devices, if they divide.

  Args:
    context: the axis of x, of tokens or of heads, that is split over `context`; None: none is.
  """
  if not _mesh():
    return x
  axes = [None] * x.ndim
  axes[0] = _samples(len(x))[0]
  if context is not None:
    axes[context] = CONTEXT
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def of_tokens(size: int) -> PartitionSpec:
  """Returns how arrays `[b, n, ...]` of so many samples lie, their tokens split over `context`."""
  return PartitionSpec(_samples(size)[0], CONTEXT)


def map_heads(function, arrays):
  """Returns `jax.lax.map(function, arrays)` of arrays `[h, ...]`, heads in front.

  Devices that share the heads go through their own at the same time.
  """
  devices = context_devices()
  if devices == 1:
    return jax.lax.map(function, arrays)

  def deal(x):  # [h / devices, devices, ...]
    x = x.reshape(devices, -1, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, CONTEXT))

  found = jax.lax.map(jax.vmap(function), jax.tree.map(deal, arrays))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)


def context_devices() -> int:
  """Returns the number of devices that share a sample."""
  return _mesh().get(CONTEXT, 1)


def multiple(count: int) -> int:
  """Returns the least number of samples, `count` or more, that the devices share evenly."""
  copies = _copies()
  return -(-count // copies) * copies


def _mesh() -> dict[str, int]:
  """Returns the devices along each axis of the mesh that is set; none where it is not ours."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return sizes if set(AXES) <= sizes.keys() else {}


def _copies() -> int:
  """Returns the number of devices, or groups of them, with samples of their own."""
  return math.prod(_mesh().get(axis, 1) for axis in SAMPLES)


def _samples(size: int) -> PartitionSpec:
  return PartitionSpec(None if size % _copies() else SAMPLES)


def _each(tree, function):
  """Returns `function(spec, leaf)` of every leaf, or the leaves where no mesh is set."""
  mesh = _mesh()
  if not mesh:
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, x: function(shared(path, x, mesh[FSDP]), x), tree
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(spec: PartitionSpec, x: jax.Array) -> jax.Array:
  """Returns x, whole. The gradient of a constraint alone would be whole on every device, too."""
  del spec
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _gather_forward(spec: PartitionSpec, x: jax.Array):
  return _gather(spec, x), None


def _gather_backward(spec: PartitionSpec, _, gradient):
  return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_gather_forward, _gather_backward)
