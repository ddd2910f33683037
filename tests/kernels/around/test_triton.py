"""The Triton kernel of `prepare` without a GPU: odd sizes, rows ahead, addresses, refusals.

Its numerics in whole layers, with compression and filters, are those of `test_around`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from freqformer.kernels.around import triton_prepare, triton_prepare_call
from freqformer.kernels.around.prepare import EPS, PREPARE, Cells, prepare
from freqformer.kernels.core.target import Target
from freqformer.kernels.triton import triton_launch
from freqformer.kernels.triton.interpret import interpreted
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse.suite import relative_error, worst_error
from tools import offline
from tools.triton_kernels import embedded_kernels

A100 = Target("cuda", "NVIDIA A100-SXM4-80GB", "8.0")
H100 = Target("cuda", "NVIDIA H100", "9.0")
PADDING = 1e3  # size of the numbers in padding rows


def draw(d, lengths, block, b=2, h=3, cells=0, over_heads=False):
  """Returns arguments of `prepare` in float32: no gain is 1, no bias 0.

  Tokens of the first head are so small that the norm's epsilon counts.
  """
  rng = np.random.default_rng(0)
  tiles = len(lengths)
  n = tiles * block
  valid = np.arange(block) < np.array(lengths)[:, None]
  joint = rng.standard_normal((b, n, 3, h, d)) + rng.uniform(-1, 1, d)
  joint[:, ~valid.ravel()] *= PADDING
  gains = rng.uniform(0.5, 2, (2, h, d) if over_heads else (2, d))
  angles = rng.uniform(0, 6, (n, d // 2))
  bias = rng.standard_normal((3, h, d))
  joint[..., 0, :] *= EPS**0.5
  bias[:, 0] *= EPS**0.5
  compression = None
  if cells:
    count = tiles * cells - 1  # the last tile has one cell less
    centres = rng.uniform(0, 6, (count, d // 2))
    matrices = rng.standard_normal((1, cells, block)) / block
    matrices[:, :, min(lengths) :] = 0
    compression = Cells(
      _numbers(matrices),
      np.zeros(tiles, np.int32),
      # The tiles' first cells come first.
      np.argsort(np.arange(count + 1) % cells, kind="stable")[:-1].astype(np.int32),
      _numbers(np.cos(centres)),
      _numbers(np.sin(centres)),
      count + 3,
    )
  tables = (_numbers(np.cos(angles)), _numbers(np.sin(angles)))
  return (
    _numbers(joint),
    _numbers(bias),
    tuple(map(_numbers, gains)),
    tables,
    np.array(lengths, np.int32),
    compression,
  )


def _numbers(x):
  return jnp.asarray(x, jnp.float32)


def _both(arguments, **options):
  """Returns what the interpreted kernel finds, and the definition."""
  run = functools.partial(prepare, **options)
  want = jax.jit(functools.partial(run, implementation="xla"))(*arguments)
  with interpreted():
    found = jax.jit(functools.partial(run, implementation="triton"))(*arguments)
    return jax.block_until_ready(found), want


@pytest.mark.parametrize(
  ("d", "lengths", "block", "cells"),
  [
    (32, (16, 3), 16, 0),
    (256, (31, 1), 32, 5),
    (128, (100,), 128, 60),  # more coarse tokens than are worked on at once
    (64, (16, 15, 16), 16, 16),
  ],
)
@pytest.mark.parametrize("over_heads", [False, True])
def test_odd_sizes(d, lengths, block, cells, over_heads):
  """Every number is the definition's in float32, also in padding rows and behind coarse tokens."""
  arguments = draw(d, lengths, block, cells=cells, over_heads=over_heads)
  found, want = _both(arguments, pooled=True, over_heads=over_heads)
  for name, got, right in zip(found._fields, found, want, strict=True):
    if right is None:
      continue  # v, where nothing comes before it
    assert np.isfinite(got).all(), name
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5 * PADDING, err_msg=name)
  front = found.q.shape[1] - len(lengths) * block
  seen = (np.arange(block) < np.array(lengths)[:, None]).ravel()
  seen = np.concatenate([np.ones(front, bool), seen])
  for name in "qkv":
    # Rotated numbers cancel: errors are those of the largest.
    got, right = (np.asarray(getattr(x, name))[:, seen] for x in (found, want))
    assert worst_error(got, right) <= 3e-6, name


def test_rows_ahead_and_gradients():
  """Rows ahead are copied; the gradient is the definition's."""
  arguments = draw(64, (64, 50), 64, b=1, h=2)
  joint, bias, gains, tables, lengths, _ = arguments
  rng = np.random.default_rng(1)
  ahead = tuple(_numbers(rng.standard_normal((1, 5, 2, 64))) for _ in "qkv")
  cotangents = tuple(_numbers(rng.standard_normal((1, 133, 2, 64))) for _ in "qkv")

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, *trained):
    def packed(joint, bias, gains, ahead):
      options = dict(ahead=ahead, implementation=implementation)
      return prepare(joint, bias, gains, tables, lengths, **options)[:3]

    found, pull = jax.vjp(packed, *trained)
    return found, pull(cotangents)

  trained = (joint, bias, gains, ahead)
  want = run("xla", *trained)
  with interpreted():
    found = jax.block_until_ready(run("triton", *trained))
  for got, rows in zip(found[0], ahead, strict=True):
    np.testing.assert_array_equal(got[:, :5], rows)
  for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert relative_error(got, right) <= 3e-6


def test_each_sample_of_a_map():
  """Under vmap results are those of the samples one by one."""
  joint, bias, gains, tables, lengths, _ = draw(32, (16, 9), 16)

  def run(joint):
    return prepare(joint, bias, gains, tables, lengths, pooled=True, implementation="triton")

  with interpreted():
    want = jax.jit(run)(joint)
    found = jax.jit(jax.vmap(run))(joint[:, None])
  for got, right in zip(found, want, strict=True):
    np.testing.assert_array_equal(got[:, 0], right)


@triton.jit
def _second_sample(h: tl.constexpr, TILES: tl.constexpr):
  """Stands for `place_of`: the first tile of the last head of the second sample."""
  zero = tl.program_id(0)
  return zero + 1, zero, zero + h - 1


def test_addresses_behind_2_to_the_31(monkeypatch):
  """Reads the projection and writes packed rows there; untouched pages take no memory."""
  monkeypatch.setattr(triton_prepare, "place_of", _second_sample)
  h = 16
  d = 128
  block = 64
  n = 5462 * block
  front = 2 * n
  rng = np.random.default_rng(0)
  before = n * 3 * h * d  # numbers of the first sample
  joint = np.zeros(before + block * 3 * h * d, np.float16)
  tokens = joint[before:].reshape(block, 3, h, d)[:, :, -1]
  tokens[:] = rng.standard_normal(tokens.shape)
  ahead = (front + n + front) * h * d
  assert min(before, ahead) >= 2**31
  packed = [np.zeros(ahead + block * h * d, np.float16) for _ in "qkv"]
  cos = np.full((block, d // 2), 0.6, np.float32)
  sin = np.full((block, d // 2), 0.8, np.float32)
  gains = np.ones((2, d), np.float32)
  number, whole = np.zeros(1, np.float32), np.zeros(1, np.int32)
  triton_launch.run_on_host(
    triton_prepare.prepare,
    (
      *(joint, np.zeros((3, h, d), np.float32), gains, cos, sin, whole, number, number, whole),
      *(whole, number, number, number, number, whole),
    ),
    (*packed, number, number),
    dict(n=n, h=h, D=d, block=block, front=front, coarse=0, cells=0, CELLS=16, bands_of_class=0)
    | dict(FILTER_QK=False, FILTER_V=False, POOLED=False, OVER_HEADS=False)
    | dict(ROWS=16, FILTERED=32, CHUNK=32),
    blocks=1,
  )
  q, k, v = (x[ahead:].reshape(block, h, d)[:, -1].astype(float) for x in packed)
  rows = tokens.astype(float)
  assert np.array_equal(v, rows[:, 2])
  for got, x in zip((q, k), (rows[:, 0], rows[:, 1]), strict=True):
    first, second = np.split(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS), 2, -1)
    right = np.concatenate([0.6 * first - 0.8 * second, 0.6 * second + 0.8 * first], -1)
    assert worst_error(got, right) <= 1e-3


# ---- compiling and choice ------------------------------------------------------------------------


def test_results_vary_where_operands_do():
  """By `shard_map` in a scan: JAX refuses carries that forget over which axes they vary."""
  spec = jax.ShapeDtypeStruct
  _, bias, gains, tables, lengths, _ = draw(64, (64, 64), 64, h=2)

  def program(joint):
    def layer(x, _):
      q, k, v, *_ = prepare(x, bias, gains, tables, lengths, implementation="triton")
      return jnp.stack([q, k, v], 2), None

    return jax.lax.scan(layer, joint, None, length=2)[0]

  joint = spec((2, 128, 3, 2, 64), jnp.bfloat16)
  gpus = offline.mesh(2, "a100")
  sharded = jax.shard_map(program, mesh=gpus.abstract_mesh, in_specs=P("data"), out_specs=P("data"))
  (kernel,) = embedded_kernels(offline.lower_for(sharded, joint, devices=2, device="a100"))
  assert kernel.name == "prepare" and kernel.capability == 80


@pytest.mark.parametrize(
  ("dtype", "d", "block", "cells", "target", "words"),
  [
    ("bfloat16", 64, 64, 8, Target("cpu", "cpu"), "^it runs on NVIDIA GPUs, the target is cpu"),
    ("float32", 64, 64, 8, A100, "^the tokens are float32, it takes bfloat16 or float16$"),
    ("bfloat16", 96, 64, 8, A100, r"^head_dim is 96, it takes one of \(32, 64, 128, 256\)$"),
    ("bfloat16", 64, 8, 4, A100, "^a tile has 8 rows, it takes one of"),
    ("bfloat16", 64, 128, 65, A100, "^a tile has 65 coarse tokens, it takes at most 64$"),
    ("bfloat16", 64, 64, None, A100, "^the transform leaves the tile$"),
    ("float32", 96, 64, 8, A100, "^the tokens are float32, .*; head_dim is 96"),
    ("bfloat16", 64, 64, 8, A100, None),
    ("float16", 32, 16, 0, A100, None),
  ],
)
def test_refusals_name_what_is_taken(dtype, d, block, cells, target, words):
  joint = jax.ShapeDtypeStruct((1, 4 * block, 3, 2, d), dtype)

  class Tiled:
    per_tile = cells

  reason = triton_prepare_call.unsupported(joint, np.zeros(4), Tiled, target)
  assert reason is None if words is None else re.search(words, reason)


def test_the_order_of_choice():
  """Hopper's kernel where it runs, Triton's on other GPUs and for what that one refuses."""

  def chosen(target, block=64, dtype=jnp.bfloat16):
    joint = jax.ShapeDtypeStruct((1, 256, 3, 2, 64), dtype)
    return PREPARE.choose(joint, np.zeros(256 // block), None, target=target)

  assert chosen(H100) == "hopper" and chosen(H100, 32) == "triton" and chosen(A100) == "triton"
  assert chosen(A100, dtype=jnp.float32) == chosen(Target("cpu", "cpu")) == "xla"
