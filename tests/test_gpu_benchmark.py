"""The GPU benchmark's driver, rehearsed on a CPU with a stand-in for the kernel: whole rows, right errors, honest gates."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gates, gpu_attention, gpu_launches, gpu_masks, gpu_oracle, gpu_run, gpu_timing
from benchmarks.gpu_plan import FULL, REHEARSAL, SHORT
from benchmarks.gpu_rows import Deadline, Store
from benchmarks.gpu_timing import Call, Effort
from kernels.attention import attention
from tests.attention_suite import CASES, draw_inputs, draw_mask, oracle

ONCE = Effort(samples=2, slow_samples=1, chain_s=0.0, turns=1)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """A short rehearsal of every part: the session and its folder."""
  folder = tmp_path_factory.mktemp("rehearsal")
  run = gpu_run.main(minutes=5, out=str(folder), implementation="reference", rehearse=True, plan=SHORT)
  return run, folder


# ---- the whole driver ----------------------------------------------------------------------------------------------------


def test_every_part_writes_correct_rows(rehearsed):
  run, folder = rehearsed
  found = json.loads((folder / "attention_gpu_rehearsal.json").read_text())
  by_name = {row["name"]: row for row in found}
  assert not [row for row in found if "error" in row]
  assert all(row["rehearsal"] and row["code"] and row["commit"] and row["device"] == "cpu" for row in found)
  for name in (
    "ceiling/matmul",
    "cudnn/a_64k",
    "dense/a_64k",
    "lists_d10/a_64k",
    "lists_d10_unsorted/a_64k",
    "lists_d10_16x8/a_64k",
    "fused_over_separate/a_64k",
    "backward_lists_d10/a_64k",
    "backward_dense/a_16k",
    "window/b_115k",
    "freqformer/a_64k",
    "fixed4k/a_1m",
    "around/a_64k",
    "lists_d10/d_32k",
  ):
    assert name in by_name, name
  timed = [row for row in found if "tflops" in row and not row["name"].startswith("ceiling")]
  for row in timed:
    assert row["name"].startswith("cudnn_backward") or row["correct"], row
    assert row["flops"] > 0 and row["clock"] == "wall" and row["timing_note"].endswith("wall clock only")
    assert row["implementation"] == ("cudnn" if row["name"].startswith("cudnn") else "reference")
  assert (folder / "attention_gpu_rehearsal.png").stat().st_size > 10_000


def test_ratios_come_from_the_rows_they_name(rehearsed):
  run, _ = rehearsed
  by_name = {row["name"]: row for row in run.store.all()}
  row, dense = by_name["lists_d10/a_64k"], by_name["cudnn/a_64k"]
  assert row["dense_row"] == dense["name"]
  np.testing.assert_allclose(row["speedup"], dense["all_heads_seconds"] / row["seconds"])
  np.testing.assert_allclose(row["retained"], row["speedup"] * row["density"])
  spec = SHORT.spec("a_64k")
  np.testing.assert_allclose(row["flops"], 4 * row["density"] * spec.n**2 * spec.heads * spec.head_dim)
  million = by_name["cudnn/a_1m"]
  assert million["heads"] == 1 and "one head" in million["note"]
  np.testing.assert_allclose(million["all_heads_seconds"], 4 * million["seconds"])
  launches = by_name["fused_over_separate/a_64k"]
  best = min(launches["separate_wall_s"].values())
  assert set(launches["separate_wall_s"]) == {"sequential", "concurrent"}
  np.testing.assert_allclose(launches["ratio"], best / launches["fused_wall_s"])


def test_a_second_run_measures_nothing_again(rehearsed, monkeypatch):
  run, _ = rehearsed
  again = gpu_attention.Session(SHORT, run.store, Deadline(60), "xla")
  monkeypatch.setattr(again, "describe", None)  # whatever would be measured would fail
  before = [row for row in run.store.all() if not row["name"].startswith("gate")]
  gpu_run.run_parts(again, [p for p in gpu_run.PARTS if p is not gpu_run.torch])
  assert [row for row in run.store.all() if not row["name"].startswith("gate")] == before
  assert not again.skipped


def test_rows_of_other_code_are_measured_anew(rehearsed, tmp_path):
  run, _ = rehearsed
  store = Store(tmp_path / "rows.json", dict(run.store.context), rehearsal=True)
  store.add({"name": "a", "value": 1})
  assert store.get("a")["value"] == 1
  store.add({"name": "b", "error": "out of memory"})
  assert store.get("b") is None
  newer = Store(store.path, store.context | {"code": "other"})
  assert newer.get("a") is None and newer.all() == []


def test_the_deadline_stops_it(tmp_path):
  store = Store.open(tmp_path, "late", "command", rehearsal=True)
  run = gpu_attention.Session(SHORT, store, Deadline(0), "xla")
  gpu_run.run_parts(run, (gpu_run.dense_mode, gpu_run.lists, gpu_run.torch))
  assert run.skipped == ["dense/a_64k", "lists_d10/a_64k", "torch_*"]
  assert all(row["name"].startswith("gate") and row["measured"] is None for row in store.all())
  assert "no time for: dense/a_64k" in gpu_run.report(run)


def test_a_failing_kernel_is_a_row_that_says_so(tmp_path):
  store = Store.open(tmp_path, "failing", "command", rehearsal=True)
  run = gpu_attention.Session(SHORT, store, Deadline(60), "no_such_backend")
  gpu_run.run_parts(run, (gpu_run.lists,))
  (row,) = [row for row in store.all() if row["name"].startswith("lists")]
  assert "no_such_backend" in row["error"] and store.get(row["name"]) is None


def test_a_rehearsal_never_writes_among_measured_rows():
  with pytest.raises(ValueError, match="measures nothing"):
    gpu_run.main(minutes=1, out=str(gpu_run.rows.RESULTS), implementation=None, rehearse=True)


def test_devices_have_files_of_their_own():
  assert gpu_run.device_slug("NVIDIA H100 80GB HBM3") == "h100"
  assert gpu_run.device_slug("NVIDIA A100-SXM4-40GB") == "a100-sxm4-40gb"
  assert gpu_run.device_slug("cpu") == "cpu"


def test_both_plans_have_the_same_parts_and_every_gate_its_rows():
  """A gate that reads a row which the plan never makes could never be met."""
  names = {f"dense/{n}" for n in FULL.dense} | {f"window/{FULL.window}"} | {f"around/{n}" for n in FULL.around}
  names |= {f"lists_d{round(100 * d):02d}/{n}" for n, d in FULL.lists}
  names |= {f"backward_lists_d{round(100 * d):02d}/{n}" for n, d in FULL.backward}
  names |= {f"fused_over_separate/{n}" for n in FULL.launches}
  names |= {f"freqformer/{n}" for n in FULL.fused} | {f"fixed4k/{n}" for n in FULL.fixed}
  assert {row for gate in gates.GATES for row in gate.rows} <= names
  assert set(REHEARSAL.specs) <= set(FULL.specs)
  for part in ("dense", "lists", "fused", "fixed", "backward", "rest", "launches"):
    assert getattr(REHEARSAL, part) == getattr(FULL, part)


# ---- tables --------------------------------------------------------------------------------------------------------------


def test_random_lists_are_tables():
  spec = SHORT.spec("a_64k")
  mask = gpu_masks.random_lists(spec, 0.3).mask.check()
  own = np.arange(mask.q_tiles)[None, None, :, None]
  assert (mask.kv_indices == own).any(-1).all() and not (mask.kv_indices[0, 0] == mask.kv_indices[0, 1]).all()
  loose = gpu_masks.random_lists(spec, 0.3, ordered=False).mask.kv_indices
  assert (np.diff(loose, axis=-1) < 0).any()
  np.testing.assert_array_equal(np.sort(loose, -1), mask.kv_indices)


def test_pairs_equal_brute_force():
  for problem in (
    gpu_masks.dense(SHORT.spec("d_32k")),
    gpu_masks.random_lists(SHORT.spec("d_32k"), 0.3),
    gpu_masks.fused(SHORT.spec("a_64k"), SHORT.bands),
    gpu_masks.window(SHORT.spec("b_115k"), (3, 4, 4), (3, 3, 3), 3),
  ):
    mask = problem.mask
    valid = np.arange(mask.block_q) < np.asarray(mask.kv_len)[:, None]
    seen = np.broadcast_to(mask.to_dense(), (1, problem.heads, problem.rows, problem.rows))
    assert problem.pairs == int(seen[:, :, valid.reshape(-1)].sum()), problem.what


def test_the_window_of_the_gate_has_the_published_density():
  problem = gpu_masks.window(FULL.spec("b_115k"), FULL.window_tile, FULL.window_extent, FULL.window_refine)
  assert (problem.mask.block_q, problem.mask.block_kv) == (128, 128) and problem.rows == 115200
  np.testing.assert_allclose(problem.density, 0.09)
  assert problem.what == "3-D window 18x24x24"


def test_one_launch_and_three_do_the_same_work():
  """Heads of the fused call equal the calls band by band, on the same inputs."""
  spec, bands = SHORT.spec("a_64k"), SHORT.bands
  whole, parts = gpu_masks.fused(spec, bands), gpu_masks.separate(spec, bands)
  assert whole.pairs == sum(part.pairs for part in parts)
  q, k, v = whole.inputs()
  out = attention(q, k, v, whole.mask)[0]
  first, coarse = 0, whole.rows - spec.layout.n_buffer
  for part, band in zip(parts, bands.heads(spec), strict=True):
    heads, rows = slice(first, first + band), slice(0, coarse) if first == 0 else slice(coarse, None)
    mask = part.mask
    if part.what.startswith("mid"):  # drawn for all heads in one, for its own in the other: take the fused call's lists
      ids = whole.mask.kv_indices[:, heads, coarse // spec.block :, : mask.max_kv] - coarse // spec.block
      mask = dataclasses.replace(mask, kv_indices=ids)
    got = attention(*(x[:, rows, heads] for x in (q, k, v)), mask)[0]
    n = bands.n_coarse(spec) if first == 0 else None
    np.testing.assert_allclose(
      np.asarray(out[:, rows, heads], np.float32)[:, :n], np.asarray(got, np.float32)[:, :n], atol=2e-2
    )
    first += band


def test_separate_calls_run_what_their_tables_say():
  call = gpu_launches.separate_call(SHORT.spec("a_64k"), SHORT.bands, "xla")
  first, rest, masks = call.args
  for got, x, m, q in zip(call(), rest, masks, (first, rest[1][0], rest[2][0]), strict=True):
    np.testing.assert_allclose(
      np.asarray(got[0], np.float32), np.asarray(attention(q, x[-2], x[-1], m)[0], np.float32), atol=2e-2
    )


# ---- oracle and timing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_sampled_rows_equal_the_suite_s_oracle(case):
  mask, (q, k, v, d_out, d_lse) = draw_mask(case, 0), draw_inputs(case, 0, jnp.float32)
  want = oracle(q, k, v, mask, d_out, d_lse)
  d_lse = jnp.asarray(d_lse, jnp.float32)
  where = gpu_oracle.pick_rows(mask, q.shape, 20)
  s, h, r = where.T
  out, lse, dq = gpu_oracle.query_rows(q, k, v, mask, where, jnp.asarray(d_out), d_lse)
  found = tuple(jnp.asarray(x, jnp.float32) for x in want[:2])
  where = gpu_oracle.pick_rows(mask, k.shape, 20, keys=True)
  ks, kh, kr = where.T
  dk, dv = gpu_oracle.key_rows((q, k, v), mask, found, (jnp.asarray(d_out), d_lse), where)
  pairs = [(out, want[0][s, r, h]), (lse, want[1][s, h, r]), (dq, want[2][s, r, h])]
  for got, exact in [*pairs, (dk, want[3][ks, kr, kh]), (dv, want[4][ks, kr, kh])]:
    assert gpu_oracle.Error.of(got, exact).relative < 3e-6


def test_wrong_results_are_called_wrong():
  case = dataclasses.replace(CASES[1], d=64)
  mask, (q, k, v, *_) = draw_mask(case, 0), (jnp.asarray(x) for x in draw_inputs(case, 0, jnp.bfloat16))
  out, lse = attention(q, k, v, mask)
  check = lambda out, lse: gpu_oracle.forward_error((q, k, v), mask, (out, lse))["correct"]
  assert check(out, lse)
  assert not check(out * 1.05, lse)
  assert not check(out, lse + 0.1)
  assert not check(out.at[:, case.block_q].set(jnp.nan).at[:, -case.block_q :].set(jnp.nan), lse)
  assert not check(out, jnp.where(jnp.isneginf(lse), 0.0, lse))


def test_wrong_gradients_are_called_wrong():
  case = dataclasses.replace(CASES[1], d=64)
  mask = draw_mask(case, 0)
  q, k, v, d_out, d_lse = (jnp.asarray(x) for x in draw_inputs(case, 0, jnp.bfloat16))
  d_lse = d_lse.astype(jnp.float32)
  found, pullback = jax.vjp(lambda *a: attention(*a, mask), q, k, v)
  alive = jnp.isfinite(found[1])
  cotangents = (jnp.where(alive.transpose(0, 2, 1)[..., None], d_out, 0), jnp.where(alive, d_lse, 0))
  check = lambda grads: gpu_oracle.backward_error((q, k, v), mask, found, cotangents, grads)["correct"]
  grads = pullback(cotangents)
  assert check(grads)
  for i in range(3):
    assert not check([g * 1.05 if i == j else g for j, g in enumerate(grads)])
  # What a kernel that drops the LSE's cotangent would give.
  assert not check(pullback((cotangents[0], jnp.zeros_like(d_lse))))


def test_a_chain_runs_every_call_on_the_one_before():
  """x -> x + 1 with its first element replaced by the last result's: after n calls that element is its start plus n."""
  state = (jnp.zeros(3), jnp.zeros(3))
  x, result = gpu_timing._chained(lambda x: x + 1, 5, state)
  np.testing.assert_array_equal(x, [5, 0, 0])
  np.testing.assert_array_equal(result, [5, 1, 1])


def test_measuring_keeps_arguments_and_counts_samples():
  x = jnp.ones((4, 4))
  call = Call(lambda x, y: (x @ y, x.sum()), (x, x))
  effort = Effort(samples=6, slow_samples=2, slow_s=0.0, chain_s=0.0, turns=3)
  found = gpu_timing.measure({"a": call, "b": call}, effort)
  np.testing.assert_array_equal(x, 1)  # chains give away copies, not the caller's array
  for measured in found.values():
    assert measured.wall.row()["calls"] == 2 and "2 samples" in measured.note and measured.device is None
  assert gpu_timing.measure({"a": call}, dataclasses.replace(effort, slow_s=9.0))["a"].wall.row()["calls"] == 6
  with pytest.raises(ValueError, match="counts must be"):
    Effort(samples=0)


def _fake_profiler(monkeypatch, kernels):
  """CUPTI's interface with made-up kernels; `kernels` may raise."""
  from jax.experimental.mosaic.gpu import profiler

  def measure(f, aggregate, iterations):
    assert not aggregate
    return lambda *args: (f(*args), kernels() if iterations == 1 else [kernels() for _ in range(iterations)])

  monkeypatch.setattr(profiler, "measure", measure)


@pytest.mark.parametrize("in_flight", [1, 1 << 20])
def test_device_time_is_the_sum_of_a_call_s_kernels(monkeypatch, in_flight):
  _fake_profiler(monkeypatch, lambda: [("attention", 2.0), ("copy", 0.5), ("copy", 0.25)])
  monkeypatch.setattr(gpu_timing, "_IN_FLIGHT", in_flight)
  device, kernels, note = gpu_timing.device_times(Call(jnp.sin, (jnp.ones(8),)), 5)
  np.testing.assert_allclose(device.times, [2.75e-3] * 5)
  assert kernels == {"attention": 2.0, "copy": 0.75} and not note


def test_a_broken_profiler_costs_the_device_time_only(monkeypatch):
  def broken():
    raise RuntimeError("no CUPTI here")

  _fake_profiler(monkeypatch, broken)
  effort = dataclasses.replace(ONCE, samples=1)
  measured = gpu_timing.measure({"a": Call(jnp.sin, (jnp.ones(2),))}, effort, kernels=True)["a"]
  row = measured.row()
  assert measured.device is None and "no CUPTI here" in row["timing_note"]
  assert row["clock"] == "wall" and row["seconds"] == row["wall"]["median_s"]


# ---- gates ---------------------------------------------------------------------------------------------------------------


def test_gates_take_the_worst_row_and_wait_for_all():
  gate = gates.Gate("g", ("a", "b"), "retained", "", ">=", 0.85, 0.94)
  rows = lambda *values, **more: [{"name": n, "retained": x, **more} for n, x in zip("ab", values, strict=False)]
  (whole,) = gates.gate_rows(rows(0.95, 0.9), gates=(gate,))
  assert (whole["measured"], whole["passed"], whole["record_met"]) == (0.9, True, False)
  (part,) = gates.gate_rows(rows(0.99), gates=(gate,))
  assert part["passed"] is None and part["missing"] == ["b"] and "incomplete" in gates.table([part])
  (wrong,) = gates.gate_rows(rows(0.99, 0.99, correct=False), gates=(gate,))
  assert wrong["passed"] is None and wrong["measured"] is None
  (missed,) = gates.gate_rows(rows(0.99, 0.5), gates=(gate,))
  assert missed["passed"] is False and "MISSED" in gates.table([missed])


def test_expected_values_never_count_as_measured():
  gate = gates.Gate("g", ("a",), "seconds", "ms", "<=", 28.0, 25.4, 1e3)
  modelled = [{"name": "a", "seconds": 0.02, "expected": True}]
  (row,) = gates.gate_rows(modelled, modelled, (gate,))
  assert row["measured"] is None and row["passed"] is None and row["expected_value"] == 20.0
  (row,) = gates.gate_rows([{"name": "a", "seconds": 0.03}], [{"name": "a", "seconds": 0.02}], (gate,))
  assert row["measured"] == 30.0 and row["expected_value"] is None
