"""Where a model's arrays lie on the mesh that is set (`jax.set_mesh`); without one, nowhere else.

Samples are split over both axes of the mesh. Parameters are split over `fsdp` and made whole layer
by layer, where they are used (fully sharded data parallelism, arXiv 1910.02054).
"""

import functools
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

DATA = "data"
FSDP = "fsdp"
AXES = (DATA, FSDP)
SAMPLES = PartitionSpec(AXES)
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


# ---- arrays outside a program -------------------------------------------------------------------


def share(tree):
  """Puts parameters, or what belongs to each, on the devices, split as `shared` has it."""
  return _each(tree, _put)


def split_batch(batch):
  """Puts arrays `[b, ...]` on the devices with their samples split, if they divide."""
  if not _mesh():
    return batch
  return jax.tree.map(lambda x: _put(_samples(x), x), batch)


def everywhere(tree):
  """Puts arrays on the devices, whole on each."""
  return jax.device_put(tree, PartitionSpec()) if _mesh() else tree


def _put(spec: PartitionSpec, x):
  """Returns an array on the devices; of a `ShapeDtypeStruct` one that lies there."""
  if isinstance(x, jax.ShapeDtypeStruct):
    placed = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
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


def split(x: jax.Array) -> jax.Array:
  """Returns x `[b, ...]` with its samples split over the devices, if they divide."""
  return jax.lax.with_sharding_constraint(x, _samples(x)) if _mesh() else x


def multiple(count: int) -> int:
  """Returns the least number of samples, `count` or more, that the devices share evenly."""
  devices = math.prod(_mesh().values())
  return -(-count // devices) * devices


def _mesh() -> dict[str, int]:
  """Returns the devices along each axis of the mesh that is set; none where it is not ours."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return sizes if set(AXES) <= sizes.keys() else {}


def _samples(x) -> PartitionSpec:
  return PartitionSpec() if x.shape[0] % math.prod(_mesh().values()) else SAMPLES


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
