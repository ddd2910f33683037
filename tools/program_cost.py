"""What a traced program does: its own products, and what every Hopper kernel in it was launched with.

XLA counts nothing inside a kernel; the estimates that `kernels.hopper.launch` passes on fill that gap.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.extend import core


class Launched(NamedTuple):
  """Kernels of one name in a program.

  Attributes:
    launches: how often.
    flops, transcendentals, bytes_accessed: of all launches.
  """

  launches: int
  flops: int
  transcendentals: int
  bytes_accessed: int


class ProgramCost(NamedTuple):
  """Of one run of a program.

  Attributes:
    product_flops: of matrix products and convolutions outside kernels, multiply and add counted apart.
    kernels: by name.
  """

  product_flops: int
  kernels: dict[str, Launched]

  @property
  def flops(self) -> int:
    """Of products, in kernels and outside."""
    return self.product_flops + sum(kernel.flops for kernel in self.kernels.values())


def program_cost(fn, *args) -> ProgramCost:
  """Traces `fn(*args)` and counts; nothing is compiled or run.

  Loops count as often as they run, of branches the costliest one. Elementwise work outside kernels is not counted.

  Args:
    args: pytrees of arrays or `ShapeDtypeStruct`s. For the program of another device, call it under that device's abstract
      mesh, as `tools.offline` does.

  Raises:
    ValueError: for a loop of unknown length, or a kernel that was launched without a cost.
  """
  return _sum(jax.make_jaxpr(fn)(*args).jaxpr)


def _sum(jaxpr) -> ProgramCost:
  total = ProgramCost(0, {})
  for eqn in jaxpr.eqns:
    total = _add(total, _equation(eqn))
  return total


def _equation(eqn) -> ProgramCost:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return ProgramCost(2 * depth * math.prod(eqn.outvars[0].aval.shape), {})
  if name == "conv_general_dilated":
    kernel, spec = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
    depth = math.prod(kernel) // kernel[spec[0]]
    return ProgramCost(2 * depth * math.prod(eqn.outvars[0].aval.shape), {})
  if "cost_estimate" in params:
    return _kernel(params["name"], params["cost_estimate"])
  inner = [_sum(jaxpr) for jaxpr in _jaxprs(params)]
  if name == "cond":
    return max(inner, key=lambda cost: cost.flops)
  if name == "while" and any(cost.flops for cost in inner):
    raise ValueError(
      "a loop of unknown length holds products or kernels; count its body alone and multiply by its length."
    )
  total = ProgramCost(0, {})
  for cost in inner:
    total = _add(total, cost)
  return _times(total, params["length"]) if name == "scan" else total


def _jaxprs(params) -> Iterator:
  """What an equation runs. A custom derivative's rule is a function and not among it."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _kernel(name: str, estimate: pl.CostEstimate | None) -> ProgramCost:
  if estimate is None:
    raise ValueError(
      f"kernel {name!r} was launched without a cost; launch it by kernels.hopper.launch.launch."
    )
  return ProgramCost(
    0, {name: Launched(1, estimate.flops, estimate.transcendentals, estimate.bytes_accessed)}
  )


def _add(a: ProgramCost, b: ProgramCost) -> ProgramCost:
  kernels = dict(a.kernels)
  for name, found in b.kernels.items():
    known = kernels.get(name, Launched(0, 0, 0, 0))
    kernels[name] = Launched(*(x + y for x, y in zip(known, found, strict=True)))
  return ProgramCost(a.product_flops + b.product_flops, kernels)


def _times(cost: ProgramCost, count: int) -> ProgramCost:
  kernels = {name: Launched(*(x * count for x in found)) for name, found in cost.kernels.items()}
  return ProgramCost(cost.product_flops * count, kernels)
