"""Counts of what a traced program does: its own products, and the cost of every GPU kernel.

XLA counts nothing inside a kernel; the estimates that `kernels.hopper.launch` and
`kernels.triton.triton_launch` pass on fill that gap. Elementwise work outside kernels is not
counted.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.extend import core


@dataclasses.dataclass
class Launched:
  """Kernels of one name in a program.

  Attributes:
    launches: number of launches.
    flops: of all launches.
    transcendentals: of all launches.
    bytes_accessed: of all launches.
  """

  launches: int = 0
  flops: int = 0
  transcendentals: int = 0
  bytes_accessed: int = 0


@dataclasses.dataclass
class ProgramCost:
  """The work of one run of a program.

  Attributes:
    product_flops: of matrix products and convolutions outside kernels; a multiply and an add are 2,
      also where a convolution meets padding.
    kernels: by name.
  """

  product_flops: int = 0
  kernels: dict[str, Launched] = dataclasses.field(default_factory=dict)

  @property
  def flops(self) -> int:
    """FLOPs of products, in kernels and outside."""
    return self.product_flops + sum(kernel.flops for kernel in self.kernels.values())


def program_cost(fn, *args) -> ProgramCost:
  """Traces `fn(*args)` and counts; nothing is compiled or run.

  Loops count as often as they run, of branches the costliest one.

  Args:
    fn: a function of arrays.
    args: pytrees of arrays or `ShapeDtypeStruct`s. For the program of another device, call under
      that device's abstract mesh, as `tools.offline` does.

  Raises:
    ValueError: for a loop of unknown length, or a kernel that was launched without a cost.
  """
  return _add(ProgramCost(), jax.make_jaxpr(fn)(*args).jaxpr)


def _add(found: ProgramCost, jaxpr, times: int = 1) -> ProgramCost:
  """Adds what a program does in `times` runs."""
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    inner = list(core.jaxprs_in_params(eqn.params))
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      found.product_flops += times * 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      outputs = eqn.params["dimension_numbers"].rhs_spec[0]
      found.product_flops += (
        times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
      )
    elif "cost_estimate" in eqn.params:
      _add_kernel(found, eqn.params["name"], eqn.params["cost_estimate"], times)
    elif name == "cond":
      _add(found, max(inner, key=lambda branch: _add(ProgramCost(), branch).flops), times)
    elif name == "while" and any(_add(ProgramCost(), part).flops for part in inner):
      raise ValueError(
        "a loop of unknown length holds products or kernels; count its body alone and multiply by "
        "its length."
      )
    else:
      for part in inner:
        _add(found, part, times * (eqn.params["length"] if name == "scan" else 1))
  return found


def _add_kernel(found: ProgramCost, name: str, estimate, times: int) -> None:
  if estimate is None:
    raise ValueError(
      f"kernel {name!r} was launched without a cost; launch it by kernels.hopper.launch.launch or "
      "kernels.triton.triton_launch.launch."
    )
  if not isinstance(estimate, Mapping):
    estimate = dataclasses.asdict(estimate)
  kernel = found.kernels.setdefault(name, Launched())
  kernel.launches += times
  kernel.flops += times * estimate["flops"]
  kernel.transcendentals += times * estimate.get("transcendentals", 0)  # Triton's have none
  kernel.bytes_accessed += times * estimate["bytes_accessed"]
