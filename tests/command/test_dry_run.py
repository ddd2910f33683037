"""The lines of a dry run about one of several devices."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from freqformer.command.dry_run import _per_device
from freqformer.train.step import TrainState

PROGRAM = """
ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %moved = f32[500000]{0} all-to-all(%x), dimensions={0}
}
"""


def rows(batch_size, numbers=250_000, limit=5_000_000):
  """Returns the lines where 9 MB are temporary; the average is as large as the parameters."""
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
  mesh = types.SimpleNamespace(
    size=8, devices=np.array([device]), shape={"data": 2, "fsdp": 1, "context": 4}
  )
  memory = types.SimpleNamespace(temp_size_in_bytes=9_000_000)
  params = jax.ShapeDtypeStruct(
    (numbers,), np.float32, sharding=SingleDeviceSharding(jax.devices()[0])
  )
  state = TrainState(step=(), params=params, ema=params, opt_state=(), key=())
  return _per_device(mesh, state, memory, PROGRAM, batch_size)


def test_what_a_device_holds_and_exchanges():
  found = rows(2)
  assert found["exchanged"] == "in a step, results in all: all-to-all 1 times 2.0 MB"
  assert found["a device"] == (
    "1.0 MB of parameters, 1.0 MB of their average and moments, 9.0 MB temporary"
  )


@pytest.mark.parametrize(
  "batch_size, numbers, change",
  [
    (4, 250_000, "lower train.batch_size"),
    (2, 250_000, "raise mesh.context"),
    (4, 2_500_000, "raise mesh.fsdp"),
  ],
)
def test_what_to_change_where_it_does_not_fit(batch_size, numbers, change):
  assert rows(batch_size, numbers)["too much"] == f"a device has 5.0 MB: {change}"
  assert "too much" not in rows(batch_size, numbers, limit=30_000_000)
