"""What the GPU benchmark's figures rest on: tables, the oracle on sampled rows, chains of calls, device time, peers."""

import dataclasses
import functools
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention

from benchmarks import timing
from benchmarks.gpu import launches as gpu_launches
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu import oracle as gpu_oracle
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu import torch_peers
from benchmarks.gpu.plan import FULL, SHORT
from benchmarks.gpu.timing import Call, Effort
from freqformer.grid.layout import TileLayout
from tests.kernels.block_sparse.suite import CASES, draw_inputs, draw_mask, oracle
from tools import offline

ONCE = Effort(samples=2, slow_samples=1, chain_s=0.0, turns=1)


# ---- tables --------------------------------------------------------------------------------------------------------------


def test_random_lists_are_tables():
  spec = SHORT.spec("a_64k")
  mask = gpu_masks.random_lists(spec, 0.3).mask.check()
  own = np.arange(mask.q_tiles)[None, None, :, None]
  assert (mask.kv_indices == own).any(-1).all() and not (
    mask.kv_indices[0, 0] == mask.kv_indices[0, 1]
  ).all()
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
  problem = gpu_masks.window(
    FULL.spec("b_115k"), FULL.window_tile, FULL.window_extent, FULL.window_refine
  )
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
    heads, rows = (
      slice(first, first + band),
      slice(0, coarse) if first == 0 else slice(coarse, None),
    )
    mask = part.mask
    if part.what.startswith(
      "mid"
    ):  # drawn for all heads in one, for its own in the other: take the fused call's lists
      ids = (
        whole.mask.kv_indices[:, heads, coarse // spec.block :, : mask.max_kv]
        - coarse // spec.block
      )
      mask = dataclasses.replace(mask, kv_indices=ids)
    got = attention(*(x[:, rows, heads] for x in (q, k, v)), mask)[0]
    n = bands.n_coarse(spec) if first == 0 else None
    np.testing.assert_allclose(
      np.asarray(out[:, rows, heads], np.float32)[:, :n],
      np.asarray(got, np.float32)[:, :n],
      atol=2e-2,
    )
    first += band


def test_separate_calls_run_what_their_tables_say():
  call = gpu_launches.separate_call(SHORT.spec("a_64k"), SHORT.bands, "xla")
  first, rest, masks = call.args
  for got, x, m, q in zip(call(), rest, masks, (first, rest[1][0], rest[2][0]), strict=True):
    np.testing.assert_allclose(
      np.asarray(got[0], np.float32),
      np.asarray(attention(q, x[-2], x[-1], m)[0], np.float32),
      atol=2e-2,
    )


# ---- oracle and timing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_sampled_rows_equal_the_suite_s_oracle(case):
  mask, (q, k, v, d_out, d_lse) = draw_mask(case, 0), draw_inputs(case, 0, jnp.float32)
  want = oracle(q, k, v, mask, d_out, d_lse)
  d_lse = jnp.asarray(d_lse, jnp.float32)
  where = gpu_oracle.pick_rows(mask, q.shape, 20)
  s, h, r = where.T
  out, lse, dq = gpu_oracle.query_rows((q, k, v), mask, where, (jnp.asarray(d_out), d_lse))
  found = tuple(jnp.asarray(x, jnp.float32) for x in want[:2])
  where = gpu_oracle.pick_rows(mask, k.shape, 20, keys=True)
  ks, kh, kr = where.T
  dk, dv = gpu_oracle.key_rows((q, k, v), mask, found, (jnp.asarray(d_out), d_lse), where)
  pairs = [(out, want[0][s, r, h]), (lse, want[1][s, h, r]), (dq, want[2][s, r, h])]
  for got, exact in [*pairs, (dk, want[3][ks, kr, kh]), (dv, want[4][ks, kr, kh])]:
    assert gpu_oracle.Error.of(got, exact).relative < 3e-6


def test_wrong_results_are_called_wrong():
  case = dataclasses.replace(CASES[1], d=64)
  mask, (q, k, v, *_) = (
    draw_mask(case, 0),
    (jnp.asarray(x) for x in draw_inputs(case, 0, jnp.bfloat16)),
  )
  out, lse = attention(q, k, v, mask)

  def check(out, lse):
    return gpu_oracle.forward_error((q, k, v), mask, (out, lse))["correct"]

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
  cotangents = (
    jnp.where(alive.transpose(0, 2, 1)[..., None], d_out, 0),
    jnp.where(alive, d_lse, 0),
  )

  def check(grads):
    return gpu_oracle.backward_error((q, k, v), mask, found, cotangents, grads)["correct"]

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
    assert (
      measured.wall.row()["calls"] == 2 and "2 samples" in measured.note and measured.device is None
    )
  assert (
    gpu_timing.measure({"a": call}, dataclasses.replace(effort, slow_s=9.0))["a"].wall.row()[
      "calls"
    ]
    == 6
  )
  with pytest.raises(ValueError, match="counts must be"):
    Effort(samples=0)


def _fake_profiler(monkeypatch, kernels):
  """CUPTI's interface with made-up kernels; `kernels` may raise."""
  from jax.experimental.mosaic.gpu import profiler

  def measure(f, aggregate, iterations):
    assert not aggregate
    return lambda *args: (
      f(*args),
      kernels() if iterations == 1 else [kernels() for _ in range(iterations)],
    )

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


def test_a_chain_for_the_device_keeps_the_kernel_in_its_loop():
  """Compiled for an absent H100: XLA neither hoists the kernel out of the loop nor drops it."""
  spec = dataclasses.replace(FULL.spec("a_16k"), heads=2)
  problem = gpu_masks.random_lists(spec, 0.1)
  x = jax.ShapeDtypeStruct((1, problem.rows, 2, 128), jnp.bfloat16)
  results = (x, jax.ShapeDtypeStruct((1, 2, problem.rows), jnp.float32))
  ours = functools.partial(gpu_launches.attend, implementation="pallas_mgpu")
  chain = jax.jit(functools.partial(gpu_timing._chained, ours, 4), donate_argnums=0)
  compiled = offline.compile_for(lambda *a: chain(*a), (x, results), x, x, problem.mask)
  computation, holds = None, []
  for text in compiled.compiled.as_text().splitlines():
    if text.endswith("{") and not text.startswith(" "):
      computation = text
    if " custom-call(" in text and "mosaic" in text.lower():
      holds.append(computation)
  assert len(holds) == len(compiled.kernels) == 1 and not holds[0].startswith("ENTRY")


# ---- peers ---------------------------------------------------------------------------------------------------------------


def _torch_child(monkeypatch, answer):
  monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(gpu_peers.subprocess, "run", answer)


def test_torch_rows_survive_a_child_that_is_cut_short(monkeypatch):
  lines = 'warning: slow\n{"name": "torch_a", "seconds": 1.0}\n{"name": "torch_b", "error": "x"}\n'

  def done(*_, **__):
    return subprocess.CompletedProcess([], 0, lines, "")

  _torch_child(monkeypatch, done)
  assert [row["name"] for row in gpu_peers.torch_rows([], 9)] == ["torch_a", "torch_b"]

  def late(*_, **__):
    raise subprocess.TimeoutExpired("torch", 9, output=lines.encode())

  _torch_child(monkeypatch, late)
  assert len(gpu_peers.torch_rows([], 9)) == 2
  _torch_child(monkeypatch, lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no GPU"))
  with pytest.raises(RuntimeError, match="gave no rows: no GPU"):
    gpu_peers.torch_rows([], 9)


def test_torch_shapes_are_the_named_ones():
  """That script must run without ours, so it repeats them."""
  for name, (n, heads) in torch_peers.SHAPES.items():
    spec = FULL.spec(name)
    assert (n, heads, torch_peers.HEAD_DIM, torch_peers.BLOCK) == (
      spec.n,
      spec.heads,
      spec.head_dim,
      spec.block,
    )
  layout = TileLayout.fit(FULL.spec("b_115k").grid, 384, FULL.window_tile)
  assert torch_peers.WINDOW_TILES[False] == layout.tile_grid


def test_torch_rows_count_useful_flops(capsys):
  torch_peers.emit(
    "torch_x", {"torch": "2"}, [0.002, 0.001, 0.003], pairs=1000, backward=True, n=64
  )
  row = json.loads(capsys.readouterr().out)
  assert (
    row["seconds"] == 0.002
    and row["flops"] == 4 * 1000 * 128 * 3.5
    and row["tflops"] == row["flops"] / 0.002 / 1e12
  )
  torch_peers.guarded("torch_y", {}, lambda: 1 / 0)
  assert "ZeroDivisionError" in json.loads(capsys.readouterr().out)["error"]


def test_concurrent_launches_are_asked_for_in_words_that_xla_knows():
  """An unknown flag or value ends a process at its first computation."""
  code = "import jax; print(float(jax.numpy.ones(1)[0]))"
  flags = {"XLA_FLAGS": gpu_launches.CONCURRENT, "JAX_PLATFORMS": "cpu"}
  assert timing.in_child(["-c", code], flags) == "1.0"
  with pytest.raises(RuntimeError):
    timing.in_child(
      ["-c", code], flags | {"XLA_FLAGS": gpu_launches.CONCURRENT.replace("CONCURRENT", "AT_ONCE")}
    )
