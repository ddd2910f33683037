"""The model behind the expected column: arithmetic checked by hand, and the same work as the calls it stands for."""

import dataclasses
import json

import numpy as np

from benchmarks.gpu import expected, gates
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu.plan import FULL, SHORT

IDEAL = expected.Device(l2=1e30, hbm=1e30, block_s=0.0, launch_s=0.0)


def test_makespan():
  assert expected.makespan(np.array([3.0, 1.0]), 4) == 3.0
  assert expected.makespan(np.ones(5), 2) == 3.0  # a tail: the fifth block runs alone
  assert (
    expected.makespan(np.array([4.0, 2.0, 2.0]), 2) == 4.0
  )  # the dearest first: perfect balance
  assert expected.makespan(np.array([2.0, 2.0, 4.0]), 2) == 6.0  # the dearest last
  assert expected.makespan(np.zeros(0), 2) == 0.0


def test_without_overheads_time_is_flops_over_rate():
  """132 x 12 equal blocks: no tail."""
  work = expected.Work(12, np.full(132, 10), 0.0)
  np.testing.assert_allclose(expected.call_s([work], IDEAL), work.flops / IDEAL.tensor)
  assert work.flops == 4 * 12 * 132 * 10 * 128**3
  slow = dataclasses.replace(IDEAL, hbm=1e12)
  missing = dataclasses.replace(work, missing=0.5)
  np.testing.assert_allclose(
    expected.call_s([missing], slow), 12 * 132 * 10 * 0.5 * 64 * 1024 / 1e12
  )


def test_known_limits_of_the_hardware():
  """64-row tiles need twice the L2 rate of 128-row tiles; unsorted lists at 1M tokens are bound by device memory."""
  device = expected.Device()
  square, thin = (
    expected.Work(1, np.full(132, 8), 0.0, block_q=q, block_kv=128) for q in (128, 64)
  )

  def rate(w):
    return 4 * w.block_q * w.block_kv * w.d / w.step_s(device) * device.sms

  np.testing.assert_allclose(rate(square), device.tensor)
  assert 0.45 < rate(thin) / device.tensor < 0.55
  spec = FULL.spec("a_1m")
  loose = expected.list_work(spec, 0.004, device, ordered=False)
  assert 384e12 < rate(loose) < 430e12  # 3 TB/s times 128 FLOP per byte, and what L2 holds by luck
  tight = expected.list_work(FULL.spec("a_64k"), 0.1, device)
  np.testing.assert_allclose(rate(tight), device.tensor)
  assert tight.missing < loose.missing


def test_shared_loads_are_counted_exactly():
  device = dataclasses.replace(expected.Device(), sms=2)
  ids = np.array([[0, 1], [1, 2], [5, 6], [5, 6]])
  assert expected.missing_listed(ids, device) == (3 + 2) / 8
  spec = FULL.spec("a_64k")
  everything = expected.missing_random(
    spec, spec.layout.tiles, dataclasses.replace(expected.Device(), l2_bytes=0.0)
  )
  np.testing.assert_allclose(everything, 1 / 132)


def test_the_modelled_work_is_the_benchmarked_work():
  device = expected.Device()
  for name in ("a_64k", "a_128k", "d_32k"):
    spec = SHORT.spec(name)
    whole = gpu_masks.dense(spec)
    np.testing.assert_allclose(expected.dense_work(spec, device).pairs, whole.pairs)
    for of in (SHORT.bands, dataclasses.replace(SHORT.bands, mid_density=0.0)):
      works = expected.fused_works(spec, of, device)
      problem = gpu_masks.fused(spec, of)
      rows = np.concatenate([np.repeat(w.counts[None], w.heads, 0) for w in works])
      np.testing.assert_array_equal(rows, problem.mask.kv_counts[0])
      if name != "d_32k":  # on ragged grids the model takes the mean tile
        np.testing.assert_allclose(sum(w.pairs for w in works), problem.pairs, rtol=0.02)
  spec = SHORT.spec("a_64k")
  np.testing.assert_allclose(
    expected.list_work(spec, 0.1, device).pairs, gpu_masks.random_lists(spec, 0.1).pairs
  )


def test_every_gate_has_an_expectation_and_no_measurement(tmp_path):
  found = expected.write(tmp_path)
  written = json.loads((tmp_path / "attention_gpu_expected.json").read_text())
  assert [row["name"] for row in written] == [row["name"] for row in found]
  assert all(
    row["expected"] is True and "device" not in row and row["assumed"]["sms"] == 132
    for row in written
  )
  for row in gates.gate_rows(written, written):
    assert row["measured"] is None and np.isfinite(row["expected_value"])
  by_name = {row["name"]: row for row in written}
  assert by_name["freqformer/a_1m"]["speedup"] < 1 / by_name["freqformer/a_1m"]["density"]
  np.testing.assert_allclose(by_name["window/b_115k"]["flops"], 14.69e12, rtol=2e-3)


def test_the_committed_file_is_what_the_model_says():
  committed = json.loads((expected.rows.RESULTS / "attention_gpu_expected.json").read_text())
  fresh = {row["name"]: row for row in expected.expected_rows()}
  assert {row["name"] for row in committed} == set(fresh)
  for row in committed:
    value = "seconds" if "seconds" in row else "ratio"
    np.testing.assert_allclose(row[value], fresh[row["name"]][value], rtol=1e-6)


def test_the_documented_gates_are_what_the_model_says():
  printed = gates.table(gates.gate_rows([], expected.expected_rows()))
  text = (expected.rows.RESULTS.parent.parent / "docs" / "benchmarks.md").read_text()
  for line in printed.splitlines():
    assert line.rstrip() in text, (
      f"docs/benchmarks.md lacks {line!r}: run python -m benchmarks.gpu.expected and paste its table"
    )
