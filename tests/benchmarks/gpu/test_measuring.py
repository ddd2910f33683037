"""Tables, sampled oracle, chains of calls, device time: what the GPU benchmark measures with."""

import dataclasses
import functools
import json
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention

from benchmarks import timing
from benchmarks.gpu import cases, launches, masks, oracle, peers, torch_peers
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.gpu.timing import Call, Effort
from tests.benchmarks.gpu.helpers import tiny_bench
from tests.kernels.block_sparse import suite
from tests.kernels.block_sparse.suite import CASES, draw_inputs, draw_mask
from tools import offline

BANDS = cases.BANDS


# ---- tables --------------------------------------------------------------------------------------


def test_random_lists_are_tables():
  spec = TINY.specs["a_64k"]
  mask = masks.random_lists(spec, 0.3).mask.check()
  own = np.arange(mask.q_tiles)[None, None, :, None]
  assert (mask.kv_indices == own).any(-1).all()
  assert not (mask.kv_indices[0, 0] == mask.kv_indices[0, 1]).all()
  loose = masks.random_lists(spec, 0.3, ordered=False).mask.kv_indices
  assert (np.diff(loose, axis=-1) < 0).any()
  np.testing.assert_array_equal(np.sort(loose, -1), mask.kv_indices)


def test_pairs_equal_brute_force():
  specs = TINY.specs
  for problem in (
    masks.dense(specs["d_32k"]),
    masks.random_lists(specs["d_32k"], 0.3),
    masks.fused(specs["a_64k"], BANDS),
    masks.window(specs["b_115k"], TINY.window_tile),
  ):
    mask = problem.mask
    valid = np.arange(mask.block_q) < np.asarray(mask.kv_len)[:, None]
    seen = np.broadcast_to(mask.to_dense(), (1, problem.heads, problem.rows, problem.rows))
    assert problem.pairs == int(seen[:, :, valid.reshape(-1)].sum())


def test_the_window_of_the_gate_has_the_published_density():
  problem = masks.window(FULL.specs["b_115k"], FULL.window_tile)
  assert (problem.mask.block_q, problem.mask.block_kv) == (128, 128) and problem.rows == 115200
  np.testing.assert_allclose(problem.density, 0.09)


def test_one_launch_and_three_do_the_same_work():
  """Heads of the fused call equal the calls band by band, on the same inputs."""
  spec = TINY.specs["a_64k"]
  whole = masks.fused(spec, BANDS)
  parts = masks.separate(spec, BANDS)
  assert whole.pairs == sum(part.pairs for part in parts)
  q, k, v = whole.inputs()
  attend = functools.partial(attention, implementation="reference")
  out = attend(q, k, v, whole.mask)[0]
  coarse = whole.rows - spec.layout.n_buffer
  coarse_tiles = coarse // spec.block
  first = 0
  for part, band in zip(parts, BANDS.heads(spec), strict=True):
    low = first == 0
    heads = slice(first, first + band)
    rows = slice(0, coarse) if low else slice(coarse, None)
    mask = part.mask
    if part is parts[1]:
      # Drawn for all heads in one call, for its own in the other: take the fused call's lists.
      ids = whole.mask.kv_indices[:, heads, coarse_tiles:, : mask.max_kv] - coarse_tiles
      mask = dataclasses.replace(mask, kv_indices=ids)
    got = attend(*(x[:, rows, heads] for x in (q, k, v)), mask)[0]
    n = BANDS.n_coarse(spec) if low else None
    found = np.asarray(out[:, rows, heads], np.float32)[:, :n]
    np.testing.assert_allclose(found, np.asarray(got, np.float32)[:, :n], atol=2e-2)
    first += band


def test_separate_calls_are_one_per_band():
  spec = TINY.specs["a_64k"]
  call = launches.separate_call(spec, BANDS, "xla")
  found = [out.shape for out, _ in jax.eval_shape(call.f, *call.args)]
  parts = masks.separate(spec, BANDS)
  assert sorted(found) == sorted((1, part.rows, part.heads, spec.head_dim) for part in parts)


# ---- oracle and timing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  ["per_batch_per_head", "shared_by_heads", "bias", "rectangular_tiles_2", "every_tile_in_order"],
)
def test_sampled_rows_equal_the_suite_s_oracle(name):
  case = next(case for case in CASES if case.name == name)
  mask = draw_mask(case, 0)
  q, k, v, d_out, d_lse = draw_inputs(case, 0, jnp.float32)
  out, lse, dq, dk, dv = suite.oracle(q, k, v, mask, d_out, d_lse)
  cotangents = (jnp.asarray(d_out), jnp.asarray(d_lse, jnp.float32))
  where = oracle.pick_rows(mask, q.shape, 20)
  s, h, r = where.T
  rows = oracle.query_rows((q, k, v), mask, where, cotangents)
  pairs = list(zip(rows, (out[s, r, h], lse[s, h, r], dq[s, r, h]), strict=True))
  found = tuple(jnp.asarray(x, jnp.float32) for x in (out, lse))
  where = oracle.pick_rows(mask, k.shape, 20, keys=True)
  s, h, r = where.T
  rows = oracle.key_rows((q, k, v), mask, found, cotangents, where)
  for got, exact in [*pairs, *zip(rows, (dk[s, r, h], dv[s, r, h]), strict=True)]:
    assert oracle.relative_error(got, exact) < 3e-6


@pytest.fixture(scope="module")
def call():
  """A call in bfloat16 with its gradients: the inputs, table, results, cotangents and rule."""
  case = dataclasses.replace(CASES[1], d=64)
  mask = draw_mask(case, 0)
  *qkv, d_out, d_lse = (jnp.asarray(x) for x in draw_inputs(case, 0, jnp.bfloat16))
  found, rule = jax.vjp(lambda *a: attention(*a, mask), *qkv)
  alive = jnp.isfinite(found[1])
  d_out = jnp.where(alive.transpose(0, 2, 1)[..., None], d_out, 0)
  return tuple(qkv), mask, found, (d_out, jnp.where(alive, d_lse.astype(jnp.float32), 0)), rule


def test_wrong_results_are_called_wrong(call):
  qkv, mask, (out, lse), *_ = call

  def correct(out, lse):
    return oracle.forward_error(qkv, mask, (out, lse))["correct"]

  assert correct(out, lse)
  assert not correct(out * 1.05, lse)
  assert not correct(out, lse + 0.1)
  lost = out.at[:, mask.block_q].set(jnp.nan).at[:, -mask.block_q :].set(jnp.nan)
  assert not correct(lost, lse)
  assert not correct(out, jnp.where(jnp.isneginf(lse), 0.0, lse))


def test_wrong_gradients_are_called_wrong(call):
  qkv, mask, found, (d_out, d_lse), rule = call

  def correct(grads):
    return oracle.backward_error(qkv, mask, found, (d_out, d_lse), grads)["correct"]

  grads = rule((d_out, d_lse))
  assert correct(grads)
  for i in range(3):
    assert not correct([g * 1.05 if i == j else g for j, g in enumerate(grads)])
  # A kernel that drops the LSE's cotangent would give these.
  assert not correct(rule((d_out, jnp.zeros_like(d_lse))))


def test_a_chain_runs_every_call_on_the_one_before():
  """x -> x + 1 with its first element replaced by the last result's: it counts the calls."""
  state = (jnp.zeros(3), jnp.zeros(3))
  x, result = gpu_timing.chained(lambda x: x + 1, 5, state)
  np.testing.assert_array_equal(x, [5, 0, 0])
  np.testing.assert_array_equal(result, [5, 1, 1])


def test_measuring_keeps_arguments_and_counts_samples():
  x = jnp.ones((4, 4))
  call = Call(lambda x, y: (x @ y, x.sum()), (x, x))
  effort = Effort(samples=6, slow_samples=2, slow_s=0.0, chain_s=0.0, turns=3)
  found = gpu_timing.measure({"a": call, "b": call}, effort)
  np.testing.assert_array_equal(x, 1)  # chains give away copies, not the caller's array
  for measured in found.values():
    assert measured.wall.row()["calls"] == 2 and measured.device is None
    assert "2 samples" in measured.note
  quick = gpu_timing.measure({"a": call}, dataclasses.replace(effort, slow_s=9.0))["a"]
  assert quick.wall.row()["calls"] == 6


def _fake_profiler(monkeypatch, kernels):
  """CUPTI's interface with made-up kernels; `kernels` may raise."""
  from jax.experimental.mosaic.gpu import profiler

  def measure(f, aggregate, iterations):
    assert not aggregate

    def run(*args):
      found = [kernels() for _ in range(iterations)]
      return f(*args), found[0] if iterations == 1 else found

    return run

  monkeypatch.setattr(profiler, "measure", measure)


@pytest.mark.parametrize("in_flight", [1, 1 << 20])
def test_device_time_is_the_sum_of_a_call_s_kernels(monkeypatch, in_flight):
  _fake_profiler(monkeypatch, lambda: [("attention", 2.0), ("copy", 0.5), ("copy", 0.25)])
  monkeypatch.setattr(gpu_timing, "_BYTES_IN_FLIGHT", in_flight)
  call = Call(jnp.sin, (jnp.ones(8),))
  measured = gpu_timing.device_times(call, timing.Timing((1.0,)), 5)
  np.testing.assert_allclose(measured.device.times, [2.75e-3] * 5)
  assert measured.kernels == pytest.approx({"attention": 2.0, "copy": 0.75}) and not measured.note


def test_a_broken_profiler_costs_the_device_time_only(monkeypatch):
  def broken():
    raise RuntimeError("no CUPTI here")

  _fake_profiler(monkeypatch, broken)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  calls = {"a": Call(jnp.sin, (jnp.ones(2),))}
  measured = gpu_timing.measure(calls, TINY.effort)["a"]
  row = measured.row()
  assert measured.device is None and "no CUPTI here" in row["timing_note"]
  assert row["clock"] == "wall" and row["seconds"] == row["wall"]["median_s"]


def test_a_chain_for_the_device_keeps_the_kernel_in_its_loop():
  """Compiled for an absent H100: XLA neither hoists the kernel out of the loop nor drops it."""
  spec = dataclasses.replace(FULL.specs["a_16k"], heads=2)
  problem = masks.random_lists(spec, 0.1)
  x = jax.ShapeDtypeStruct((1, problem.rows, 2, 128), jnp.bfloat16)
  results = (x, jax.ShapeDtypeStruct((1, 2, problem.rows), jnp.float32))
  ours = functools.partial(launches.attend, implementation="pallas_mgpu")
  chain = jax.jit(functools.partial(gpu_timing.chained, ours, 4), donate_argnums=0)
  compiled = offline.compile_for(lambda *a: chain(*a), (x, results), x, x, problem.mask)
  computation = None
  holds = []
  for text in compiled.compiled.as_text().splitlines():
    if text.endswith("{") and not text.startswith(" "):
      computation = text
    if " custom-call(" in text and "mosaic" in text.lower():
      holds.append(computation)
  assert len(holds) == len(compiled.kernels) == 1 and not holds[0].startswith("ENTRY")


# ---- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_torch_rows_survive_a_child_that_is_cut_short(monkeypatch, late):
  lines = 'warning: slow\n{"name": "torch_a", "seconds": 1.0}\n{"name": "torch_b", "error": "x"}\n'

  def answer(*_, **__):
    if late:
      raise subprocess.TimeoutExpired("torch", 9, output=lines.encode())
    return subprocess.CompletedProcess([], 0, lines, "")

  monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(peers.subprocess, "run", answer)
  assert [row["name"] for row in peers.torch_rows([], 9)] == ["torch_a", "torch_b"]
  failed = subprocess.CompletedProcess([], 1, "", "no GPU")
  monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: failed)
  with pytest.raises(RuntimeError, match="gave no rows: no GPU"):
    peers.torch_rows([], 9)
  monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match="torch is not installed"):
    peers.torch_rows([], 9)


class _NoTorch:
  """Stands for `torch_peers.Torch`, where there is no torch."""

  cuda = False
  torch = types.SimpleNamespace(__version__="2")
  emit = torch_peers.Torch.emit

  def seconds(self, run):
    run()
    return timing.Timing((0.002, 0.001, 0.003))


def test_torch_rows_count_useful_flops(capsys, tmp_path):
  problem = masks.random_lists(TINY.specs["a_64k"], 0.3)
  _NoTorch().emit("torch_flex_x", problem, lambda: lambda: None, "forward_backward")
  _NoTorch().emit("torch_flex_y", problem, lambda: 1 / 0)
  row, failed = map(json.loads, capsys.readouterr().out.splitlines())
  assert row["seconds"] == 0.002 and row["flops"] == 4 * problem.pairs * 16 * 3.5
  assert row["tflops"] == row["flops"] / 0.002 / 1e12 and row["n"] == problem.spec.n
  assert "ZeroDivisionError" in failed["error"]
  assert tiny_bench(tmp_path).store.add(row)["torch"] == "2"


def test_concurrent_launches_are_asked_for_in_words_that_xla_knows():
  """An unknown flag or value ends a process at its first computation."""
  text = "import jax; print(float(jax.numpy.ones(1)[0]))"
  flags = {"XLA_FLAGS": launches.CONCURRENT, "JAX_PLATFORMS": "cpu"}
  assert timing.in_child(["-c", text], flags) == "1.0"
  flags["XLA_FLAGS"] = launches.CONCURRENT.replace("CONCURRENT", "AT_ONCE")
  with pytest.raises(RuntimeError):
    timing.in_child(["-c", text], flags)
