"""Who runs a call: the first of an ordered list of backends that does not refuse it, or the one that was named."""

import functools
from collections.abc import Callable, Iterable

from absl import logging
from freqformer.kernels.core.target import Target


class NoBackend(NotImplementedError):
  """No backend, or not the one that was named, runs a call; the message holds every reason."""


def choose(
  what: str, names: Iterable[str], unsupported: Callable, implementation: str | None, target: Target
) -> str:
  """The name of the backend that runs a call; says once which and why, where nobody named one.

  Args:
    what: "attention", for people.
    names: backends in order of preference.
    unsupported: `name -> reason or None`; raises ValueError for an unknown name.
    implementation: the only one to ask, or None.

  Raises:
    NoBackend: (a NotImplementedError) if nobody supports the call, with every reason.
  """
  reasons = []
  for name in names if implementation is None else (implementation,):
    reason = unsupported(name)
    if reason is None:
      if implementation is None:
        _log_choice(what, name, target, "; ".join(reasons))
      return name
    reasons.append(f"{name}: {reason}")
  raise NoBackend(f"no {what} backend for this call on {target}: " + "; ".join(reasons))


@functools.cache
def _log_choice(what, name, target, reasons):
  logging.info(
    "%s runs on backend %r for %s%s", what, name, target, f" ({reasons})" if reasons else ""
  )
