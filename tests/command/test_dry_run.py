"""The lines of a dry run about one of several devices."""

import types

import numpy as np
import pytest

from freqformer.command.dry_run import _per_device

PROGRAM = """
ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %moved = f32[1000]{0} all-to-all(%x), dimensions={0}
}
"""


def rows(batch_size, temporary=9_000_000, limit=5_000_000):
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
  mesh = types.SimpleNamespace(
    size=8, devices=np.array([device]), shape={"data": 2, "fsdp": 1, "context": 4}
  )
  memory = types.SimpleNamespace(temp_size_in_bytes=temporary)
  return _per_device(mesh, {}, memory, PROGRAM, batch_size)


def test_what_a_device_exchanges():
  found = rows(2)
  assert found["exchanged"] == "in a step, results in all: all-to-all 1 times 0.0 MB"
  assert found["a device"].endswith("9.0 MB temporary")


@pytest.mark.parametrize(
  "batch_size, change", [(4, "lower train.batch_size"), (2, "raise mesh.context")]
)
def test_what_to_change_where_it_does_not_fit(batch_size, change):
  assert rows(batch_size)["too much"] == f"a device has 5.0 MB: {change}"
  assert "too much" not in rows(batch_size, limit=10_000_000)
