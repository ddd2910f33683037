"""An op of the kernels: one definition in plain JAX, and implementations that may run in its place.

Attention, linear attention, block mass, top-k, prepare and lift are one `Op` each. An
implementation is a module; it runs a call or refuses it with a reason. A named implementation is
used or refused, never replaced. Without a name the first in order of preference that supports the
call runs it, and that choice is logged once.
"""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from absl import logging
from freqformer.kernels.core.partition import (
  by_sample_and_head,
  explicit_mesh,
  inside_shard_map,
  several_devices,
)
from freqformer.kernels.core.target import Target, current_target

# Former names, which configs, commands and result files may still hold.
ALIASES = {"pallas_mgpu": "hopper"}
_GPU_KERNELS = ("hopper", "triton")


class NoImplementation(NotImplementedError):
  """No implementation, or not the one that was named, runs a call; the message has every reason."""


@dataclasses.dataclass(frozen=True)
class Split:
  """Dimensions of a function's arrays along which devices may share its work.

  Attributes:
    operands: an entry per operand: the dimensions of its leaves as in `by_sample_and_head`, or a
      function of the operand that returns them.
    results: the dimensions of what the function returns.
  """

  operands: tuple[str | Callable, ...]
  results: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
  """An op: its name, the implementations that can run it, and its split over devices.

  An implementation's module has `forward(*operands, **settings)`; a `backward` where the op's
  gradient does not come from the definition; and, unless it runs every call,
  `unsupported(*call, target)`, which returns a reason or None.

  Attributes:
    name: in messages, e.g. "linear attention".
    implementations: their modules below `freqformer.kernels`, imported when first used, in order of
      preference. The last one is the definition: it runs every call.
    forward: how `forward` is split over devices.
    backward: how `backward` is split, where an implementation has its own.
    opaque: implementations that XLA cannot partition; they are split as said above.
    slow_on_gpu: what a GPU loses where none of its own implementations runs a call; then the choice
      is a warning.
  """

  name: str
  implementations: Mapping[str, str]
  forward: Split
  backward: Split | None = None
  opaque: tuple[str, ...] = ("hopper",)
  slow_on_gpu: str = ""

  @property
  def definition(self) -> ModuleType:
    """The module of the definition."""
    return self.module(list(self.implementations)[-1])

  def module(self, name: str) -> ModuleType:
    """Returns the module of an implementation, which may be named by an alias."""
    path = self.implementations[ALIASES.get(name, name)]
    return importlib.import_module(f"freqformer.kernels.{path}")

  def choose(
    self, *call: Any, implementation: str | None = None, target: Target | None = None
  ) -> str:
    """Returns the name of the implementation that runs a call.

    Args:
      call: what the implementations' `unsupported` reads.
      implementation: the only one to ask (an alias is resolved); None: the first that can.
      target: None for the device that is traced for.

    Raises:
      ValueError: if the name is unknown.
      NoImplementation: (a NotImplementedError) if none runs the call, with every reason.
    """
    target = current_target() if target is None else target
    names = list(self.implementations)
    if implementation is not None:
      names = [self._known(implementation)]
    reasons = []
    for name in names:
      unsupported = getattr(self.module(name), "unsupported", None)
      reason = unsupported and unsupported(*call, target)
      if reason is None:
        if implementation is None:
          _log_choice(self.name, name, target, "; ".join(reasons), self._loss(name, target))
        return name
      reasons.append(f"{name}: {reason}")
    raise NoImplementation(
      f"no implementation of {self.name} for this call on {target}: " + "; ".join(reasons)
    )

  @staticmethod
  def is_for_gpu(name: str) -> bool:
    """Tells whether an implementation is made of GPU kernels."""
    return ALIASES.get(name, name) in _GPU_KERNELS

  def _loss(self, name: str, target: Target) -> str:
    """Returns what a GPU loses by an implementation that was made for none; "" if nothing."""
    return "" if self.is_for_gpu(name) or target.platform != "cuda" else self.slow_on_gpu

  def _known(self, implementation: str) -> str:
    name = ALIASES.get(implementation, implementation)
    if name in self.implementations:
      return name
    close = difflib.get_close_matches(implementation, [*self.implementations, *ALIASES], 1)
    raise ValueError(
      f"{implementation=} is unknown; choose one of {', '.join(self.implementations)} or None for "
      "automatic choice." + (f" Did you mean {close[0]!r}?" if close else "")
    )

  def is_split(self, name: str, operands: Sequence[Any]) -> bool:
    """Returns True if `run` gives an implementation parts of its operands."""
    if name not in self.opaque or inside_shard_map():
      return False
    return several_devices() or explicit_mesh(operands) is not None

  def run(
    self, name: str, operands: Sequence[Any], direction: str = "forward", **settings: Any
  ) -> Any:
    """Runs an implementation, on several devices on each one's own samples and heads.

    Args:
      name: of the implementation, as `choose` returns it.
      operands: pytrees of arrays.
      direction: "forward" or "backward".
      settings: static arguments of the function.
    """
    function = functools.partial(getattr(self.module(name), direction), **settings)
    if not self.is_split(name, operands):
      return function(*operands)
    split = getattr(self, direction)
    dims = [
      dims(operand) if callable(dims) else dims
      for dims, operand in zip(split.operands, operands, strict=True)
    ]
    return by_sample_and_head(function, tuple(operands), tuple(dims), split.results)

  def run_as_defined(self, name: str, operands: Sequence[Any], **settings: Any) -> Any:
    """Runs an implementation forward; the gradient is the definition's, recomputed by JAX."""
    if self.module(name) is self.definition:
      return self.definition.forward(*operands, **settings)
    return _as_defined(self, name, tuple(settings.items()), *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _as_defined(op, name, settings, *operands):
  return op.run(name, operands, **dict(settings))


def _as_defined_forward(op, name, settings, *operands):
  return op.run(name, operands, **dict(settings)), operands


def _as_defined_backward(op, name, settings, operands, cotangents):
  del name
  return op.definition.backward(operands, cotangents, **dict(settings))


_as_defined.defvjp(_as_defined_forward, _as_defined_backward)


@functools.cache
def _log_choice(op: str, name: str, target: Target, reasons: str, loss: str) -> None:
  reasons = f" ({reasons})" if reasons else ""
  level = logging.WARNING if loss else logging.INFO
  loss = f", {loss}" if loss else ""
  logging.log(level, "%s runs on implementation %r for %s%s%s", op, name, target, loss, reasons)
