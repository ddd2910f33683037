"""SIGTERM and Ctrl-C ask a run to save and stop; a second signal kills it at once.

Of several processes one is enough: `jax.distributed` watches SIGTERM and makes all stop at the same
point. There only a second Ctrl-C kills.
"""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils


class StopRequest:
  """A context whose call returns True once SIGTERM or SIGINT has arrived.

  All processes of a run call it equally often, and their calls of one number return the same.
  """

  def __init__(self):
    self._requested = False
    self._signalled = False  # this very process
    self._calls = 0
    self._several = jax.process_count() > 1
    self._previous = {}

  def __enter__(self):
    for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    if self._several and not self._requested:
      self._calls += 1
      self._requested = multihost_utils.reached_preemption_sync_point(self._calls)
    return self._requested

  def _handle(self, number, frame):
    if self._signalled:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    self._signalled = True
    if self._several:
      signal.raise_signal(signal.SIGTERM)  # which is JAX's there
    else:
      self._requested = True
    logging.warning("%s: saving and stopping; once more kills", signal.Signals(number).name)
