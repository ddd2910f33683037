"""SIGTERM and Ctrl-C ask a run to save and stop; a second signal kills it at once.

JAX's own preemption point works only under `jax.distributed`.
"""

import signal

from absl import logging


class StopRequest:
  """A context whose call returns True once SIGTERM or SIGINT has arrived."""

  def __init__(self):
    self._requested = False
    self._previous = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    return self._requested

  def _handle(self, number, frame):
    if self._requested:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    self._requested = True
    logging.warning("%s: saving and stopping; once more kills", signal.Signals(number).name)
