"""SIGTERM and Ctrl-C ask a run to stop: it saves and leaves. A second signal kills it at once.

JAX's own preemption point works only under `jax.distributed`; a single process needs its own handler.
"""

import signal

from absl import logging


class StopRequest:
  """A context in which `requested` turns true on SIGTERM or SIGINT."""

  def __init__(self):
    self.requested, self._previous = False, {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    return self.requested

  def _handle(self, number, frame):
    if self.requested:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    self.requested = True
    logging.warning("%s: saving and leaving; once more kills", signal.Signals(number).name)
