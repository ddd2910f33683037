"""The Triton kernels of attention without a GPU: numerics, cuts, addresses, refusals, tuning."""

import dataclasses
import importlib.metadata
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import triton, triton_kernels
from freqformer.kernels.block_sparse import triton_tuning as tuning
from freqformer.kernels.block_sparse.api import ATTENTION, attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.kernels.block_sparse.tuning_table import DIRECTIONS
from freqformer.kernels.core import log2, op
from freqformer.kernels.core.target import Target, current_target
from freqformer.kernels.triton import machine, triton_launch
from freqformer.kernels.triton.interpret import interpreted, is_interpreted
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse.suite import (
  NAMES,
  AttentionSuite,
  Case,
  draw_inputs,
  draw_mask,
  oracle,
  relative_error,
  value_and_grads,
)
from tools import offline
from tools.triton_kernels import embedded_kernels

with interpreted():
  # On a GPU (`pytest --device=gpu`) kernels run as they are compiled, in 16 bits.
  EXACT = is_interpreted()
WIDEST = jnp.float32 if EXACT else jnp.bfloat16
A100 = Target("cuda", "NVIDIA A100-SXM4-80GB", "8.0")


class TestTriton(AttentionSuite):
  implementation = "triton"
  dtypes = AttentionSuite.dtypes if EXACT else AttentionSuite.dtypes[1:]
  cases = tuple(case for case in AttentionSuite.cases if case.d >= 16 and case.n_q % 16 == 0)

  @pytest.fixture(autouse=True)
  def _interpreted(self):
    with interpreted():
      yield


def _close(found, wanted):
  """Holds results and gradients to the suite's errors."""
  for name, got, want in zip(NAMES, found, wanted, strict=True):
    limit = 3e-6 if EXACT else 1e-6 if name == "lse" else 4e-3
    assert relative_error(got, want) < limit, name


def _check(case, config=None, seed=0):
  """Compares the kernels, run with `config`, with the oracle."""
  mask = draw_mask(case, seed)
  q, k, v, *cotangents = draw_inputs(case, seed, WIDEST)
  with interpreted():
    sizes = (triton.current_class(), case.d, case.block_q, case.block_kv)
    keys = [tuning.Key(*sizes, x) for x in DIRECTIONS]
    with tuning.override(dict.fromkeys(keys, config) if config else {}):
      found = value_and_grads("triton")(q, k, v, mask, *cotangents)
  _close(found, oracle(q, k, v, mask, *cotangents))


ONE_HEAD = Case("one head", h=1, table_h=1, n_q=128, n_kv=128, keep=0.7, bias=True)


@pytest.mark.parametrize(
  "block_q, block_kv, rows, step",
  [(16, 128, 16, 16), (128, 16, 16, 16), (64, 32, 32, 32), (32, 64, 32, 16), (128, 128, 64, 128)],
)
@pytest.mark.parametrize("halves", [1, 2])
def test_every_cut_of_tiles(block_q, block_kv, rows, step, halves):
  """A tile is one program's or several ones', taken at once or in steps, in one array or two."""
  case = dataclasses.replace(ONE_HEAD, block_q=block_q, block_kv=block_kv)
  _check(case, tuning.TritonConfig(rows, step, 1, 2, halves), seed=step)


@pytest.mark.parametrize("d", [16, 128, 256])
def test_other_head_dimensions(d):
  _check(dataclasses.replace(ONE_HEAD, d=d, block_q=32, block_kv=32, n_q=64, n_kv=96))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_odd_scales(scale):
  """Hidden keys stay hidden under a scale that is not positive."""
  case = Case("scale", h=1, table_h=1)
  *rows, d_out, d_lse = draw_inputs(case, 1, WIDEST)
  mask = draw_mask(case, 1)

  def run(implementation, *rows):
    @jax.jit
    def both(q, k, v):
      found, vjp = jax.vjp(
        lambda *x: attention(*x, mask, scale=scale, implementation=implementation), q, k, v
      )
      return *found, *vjp((d_out.astype(q.dtype), d_lse.astype(np.float32)))

    return both(*rows)

  wanted = run("reference", *(x.astype(np.float32) for x in rows))
  with interpreted():
    _close(run("triton", *rows), wanted)


def test_transformations():
  """Under vmap and in a rematerialised scan, gradients are those of plain calls."""
  case = Case("transformed", b=2, h=2, n_q=64, n_kv=64, keep=0.8)
  mask = draw_mask(case, 3)
  q, k, v, *_ = draw_inputs(case, 3, jnp.float32)

  def loss(q, k, v):
    out, lse = attention(q, k, v, mask, implementation="triton")
    return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

  def scanned(q, k, v):
    def layer(total, x):
      return total + jax.checkpoint(loss)(*x), None

    apart = [x[:, None] for x in (q, k, v)]
    return jax.lax.scan(layer, 0.0, tuple(apart))[0]

  def mapped(q, k, v):
    return jax.vmap(loss)(*(x[:, None] for x in (q, k, v))).sum()

  with interpreted():
    wanted = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for other in (scanned, mapped):
      found = jax.jit(jax.grad(other, (0, 1, 2)))(q, k, v)
      for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_addresses_behind_2_to_the_31():
  """The first tile of the second sample of 1M tokens: untouched pages take no memory."""
  n = 1 << 20
  h = 16
  d = 128
  block = 128
  tiles = (5, 7)
  lengths = (128, 100)
  head = h - 1
  rng = np.random.default_rng(0)
  before = n * h * d  # numbers of the first sample
  assert before == 2**31
  arrays = [np.zeros(before + 8 * block * h * d, np.float16) for _ in range(4)]
  q, k, v, out = (x[before:].reshape(-1, h, d)[:, head] for x in arrays)
  lse = np.zeros((2 * h - 1) * n + block, np.float32)
  q[:block] = rng.standard_normal((block, d))
  for tile in tiles:
    k[tile * block :][:block], v[tile * block :][:block] = rng.standard_normal((2, block, d))
  codes = [tile << 8 | length for tile, length in zip(tiles, lengths, strict=True)]
  counts = np.full(1, 2, np.int32)
  order = np.full(1, h + head, np.int32)  # the only program: sample 1, last head, tile 0
  sizes = dict(h=h, n_q=n, n_kv=n, D=d, block_q=block, block_kv=block, ROWS=block, STEP=64)
  strides = dict.fromkeys(("codes_b", "codes_h", "codes_tile", "counts_b", "counts_h"), 0)
  triton_launch.run_on_host(
    triton_kernels.attention_forward,
    (*arrays[:3], np.array(codes, np.int32), counts, order, np.zeros(1, np.float32)),
    (arrays[3], lse),
    sizes
    | strides
    | dict(factor=log2.LOG2E / d**0.5, sign=1.0, BIASED=False, ORDERED=True, HALVES=1),
    blocks=1,
  )
  rows = [np.arange(t * block, t * block + r) for t, r in zip(tiles, lengths, strict=True)]
  keys, values = (x[np.concatenate(rows)].astype(float) for x in (k, v))
  s = q[:block].astype(float) @ keys.T / d**0.5
  p = np.exp(s - s.max(1, keepdims=True))
  assert relative_error(out[:block], p @ values / p.sum(1, keepdims=True)) < 1e-3
  assert relative_error(lse[-block:], np.log(p.sum(1)) + s.max(1)) < 1e-6


# ---- compiling -----------------------------------------------------------------------------------


def test_results_vary_where_operands_do():
  """By `shard_map` in a scan: JAX refuses carries that forget over which axes they vary."""
  mask = draw_mask(Case("sharded", b=1, d=64, n_q=128, n_kv=128), 0)

  def program(q, k, v):
    def layer(x, _):
      return attention(x, k, v, mask, implementation="triton")[0], None

    return jax.lax.scan(layer, q, None, length=2)[0]

  x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
  gpus = offline.mesh(2, "a100")
  sharded = jax.shard_map(
    program, mesh=gpus.abstract_mesh, in_specs=(P("data"),) * 3, out_specs=P("data")
  )
  (kernel,) = embedded_kernels(offline.lower_for(sharded, x, x, x, devices=2, device="a100"))
  assert kernel.name == "attention_forward" and kernel.capability == 80


def test_gradients_under_vmap_are_launches_one_after_the_other():
  mask = draw_mask(Case("mapped", d=64, n_q=128, n_kv=128), 0)

  def loss(q, k, v):
    return attention(q, k, v, mask, implementation="triton")[0].astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((3, 1, 128, 2, 64), jnp.bfloat16)
  gradients = jax.vmap(jax.grad(loss, (0, 1, 2)))
  kernels = embedded_kernels(offline.lower_for(gradients, x, x, x, device="a100"))
  assert sorted(each.name for each in kernels) == [
    "attention_dkv",
    "attention_dq",
    "attention_forward",
  ]


def test_interpreting_leaves_the_library_as_it_was():
  """Compiles the same after something was interpreted as before."""
  case = Case("small", h=1, table_h=1, n_q=64, n_kv=64)
  x = jax.ShapeDtypeStruct((1, 64, 1, 32), jnp.bfloat16)

  def compiled():
    def run(q, k, v):
      return attention(q, k, v, dense_mask(64, 64, 64, 64), implementation="triton")

    (kernel,) = embedded_kernels(offline.lower_for(run, x, x, x, device="a100"))
    # jax-triton keeps what it compiled: the next time it would not be compiled.
    assert vars(triton_kernels.attention_forward).pop("_jT_kernel_cache")
    return kernel.code

  before = compiled()
  _check(case)
  assert compiled() == before
  _check(case)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("shape", "dtype", "block", "target", "words"),
  [
    ((256, 64), "bfloat16", 64, Target("cpu", "cpu"), "runs on NVIDIA GPUs, the target is cpu"),
    ((256, 64), "bfloat16", 64, Target("cuda", "V100", "7.0"), "at least 8.0 .*capability 7.0"),
    ((256, 64), "float32", 64, A100, "^q, k, v are float32, it takes bfloat16 or float16$"),
    ((256, 96), "bfloat16", 64, A100, "^head_dim is 96, it takes one of"),
    ((256, 64), "bfloat16", 8, A100, "block_q is 8, it takes one of .* block_kv is 8"),
    ((200, 64), "bfloat16", 64, A100, "^200 query rows are no multiple of block_q=64; pad"),
    ((256, 64), "bfloat16", 64, A100, None),
  ],
)
def test_refusals_name_what_is_taken(shape, dtype, block, target, words):
  x = jax.ShapeDtypeStruct((1, shape[0], 2, shape[1]), dtype)
  reason = triton.unsupported(x, x, x, dense_mask(shape[0], shape[0], block, block), target)
  assert reason is None if words is None else re.search(words, reason)


@pytest.mark.parametrize(
  ("installed", "words"),
  [
    ({"triton": "3.7.1"}, "jax-triton is not installed; run: python -m pip install -r"),
    ({"jax-triton": "0.4.1"}, "triton is not installed"),
    ({"jax-triton": "0.5.0", "triton": "3.7.1"}, "made for jax-triton 0.4, found 0.5.0; run:"),
    ({"jax-triton": "0.4.1", "triton": "3.2.0"}, "made for triton 3.7, found 3.2.0; run: python"),
    ({"jax-triton": "0.4.1", "triton": "3.7.1"}, None),
  ],
)
def test_packages_that_lack_are_named_with_the_command(installed, words, monkeypatch):
  def version(name):
    if name not in installed:
      raise importlib.metadata.PackageNotFoundError(name)
    return installed[name]

  monkeypatch.setattr(machine.importlib.metadata, "version", version)
  machine.lacking_packages.cache_clear()
  try:
    reason = machine.lacking_packages()
  finally:
    machine.lacking_packages.cache_clear()
  assert reason is None if words is None else re.search(words, reason)


def test_another_jax_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "__version__", "0.12.0")
  machine.lacking_packages.cache_clear()
  assert "made for jax 0.11, found 0.12.0; run:" in machine.lacking_packages()
  machine.lacking_packages.cache_clear()


def test_the_order_of_choice():
  """Hopper's kernels where they run, Triton's on other GPUs and for what those refuse."""
  x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

  def chosen(target, block=64, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct(x.shape, dtype)
    return ATTENTION.choose(q, q, q, dense_mask(256, 256, block, block), target=target)

  h100 = Target("cuda", "NVIDIA H100", "9.0")
  assert chosen(h100) == "hopper" and chosen(h100, 32) == "triton" and chosen(A100) == "triton"
  assert chosen(A100, dtype=jnp.float32) == chosen(Target("cpu", "cpu")) == "xla"


def test_the_portable_form_on_a_gpu_is_a_warning(caplog):
  x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
  op._log_choice.cache_clear()
  with caplog.at_level("INFO", logger="absl"):
    ATTENTION.choose(x, x, x, dense_mask(256, 256, 64, 64), target=A100)
    ATTENTION.choose(x, x, x, dense_mask(256, 256, 64, 64), target=Target("cpu", "cpu"))
  first, second = caplog.records
  assert first.levelname == "WARNING" and second.levelname == "INFO"
  said = first.getMessage()
  assert (
    "many times slower" in said and "hopper: it needs" in said and "triton: q, k, v are" in said
  )


# ---- tuning --------------------------------------------------------------------------------------

KEY = tuning.Key("sm89", 128, 128, 128, "forward")


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ((128, 128, 8, 3), "bytes of shared memory"),
    ((96, 64, 4, 3), "divide the tiles"),
    ((128, 8, 8, 3), "at least 16"),
    ((64, 64, 8, 2), "of enough rows each"),
    ((128, 64, 3, 3), "must be 1, 2, 4 or 8"),
    ((128, 64, 8, 9), "stages must lie"),
    ((128, 64, 8, 3, 3), "halves must be"),
  ],
)
def test_tuning_refuses_what_does_not_fit(settings, words):
  with pytest.raises(ValueError, match=words):
    tuning.TritonConfig(*settings).check(KEY)


def test_every_key_has_a_configuration_that_fits():
  blocks = triton.BLOCKS
  for sizes in itertools.product(
    machine.SHARED_BYTES, triton.HEAD_DIMS, blocks, blocks, DIRECTIONS
  ):
    key = tuning.Key(*sizes)
    assert tuning.lookup(key).check(key) == tuning.candidates(key)[0]


def test_classes_are_those_of_the_devices_names():
  for device, expected in (
    ("a100", "sm80"),
    ("rtx3090", "sm89"),
    ("rtx4090", "sm89"),
    ("h100", "sm90"),
    ("b200", "sm100"),
    ("rtx5090", "sm120"),
  ):
    with jax.sharding.use_abstract_mesh(offline.mesh(1, device).abstract_mesh):
      assert machine.device_class(current_target().capability) == expected
