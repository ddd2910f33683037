"""Kernels are launched with their cost, and a traced model does what the model of costs says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import KERNEL_MATMULS, count
from freqformer.kernels.block_sparse.table import from_tiles
from freqformer.kernels.linear.api import linear_attention
from jax import lax

from freqformer.cost import model_cost
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS, method_class
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.tables.window import sliding_tile
from tools import offline
from tools.program_cost import program_cost

LAYOUT = TileLayout.fit((8, 32, 32), 128)
WINDOWS = sliding_tile(LAYOUT, (3, 3, 3))
HEADS = 4
DIM = 64
_spec = jax.ShapeDtypeStruct
X = _spec((2, LAYOUT.n_buffer, HEADS, DIM), jnp.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def hopper():
  with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
    yield


def _attend(q, k, v, mask, implementation=None):
  return attention(q, k, v, mask, implementation=implementation)[0]


def _gradients(call):
  """Returns the gradients of a sum over `call`'s results."""
  return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def test_a_table_that_numpy_holds_is_counted_exactly():
  found = program_cost(_gradients(functools.partial(_attend, mask=WINDOWS)), X, X, X)
  table = count(WINDOWS, DIM, batch=2, heads=HEADS)
  assert table.loads < table.rows * WINDOWS.kv_tiles
  assert set(found.kernels) == {f"attention_{kernel}" for kernel in KERNEL_MATMULS}
  for kernel, matmuls in KERNEL_MATMULS.items():
    launched = found.kernels[f"attention_{kernel}"]
    assert launched.launches == 1
    assert launched.flops == 2 * matmuls * table.computed_pairs * DIM
    assert launched.transcendentals == table.computed_pairs
  moved = found.kernels["attention_forward"].bytes_accessed
  assert moved == pytest.approx(table.min_bytes(), rel=0.01)
  assert found.flops == 2 * 9 * table.computed_pairs * DIM
  other = functools.partial(_attend, mask=WINDOWS, implementation="triton")
  of_triton = program_cost(_gradients(other), X, X, X)
  assert of_triton.flops == found.flops and of_triton.kernels.keys() == found.kernels.keys()


def test_a_traced_table_counts_its_whole_lists():
  tiles = np.random.default_rng(0).random((1, HEADS, 6, 9)) < 0.4
  mask = from_tiles(tiles, np.full(9, 64, np.int32), 128, 64)
  q, k = (_spec((2, rows, HEADS, DIM), jnp.bfloat16) for rows in (6 * 128, 9 * 64))
  found = program_cost(_attend, q, k, k, mask)
  assert found.flops == 4 * DIM * 2 * HEADS * 6 * mask.max_kv * 128 * 64
  noted = program_cost(_attend, q, k, k, mask.with_mean())  # as tables of models are
  assert noted.flops == 4 * DIM * 2 * tiles.sum() * 128 * 64 < found.flops


def test_mapped_calls_add_up():
  def call(x):
    return _attend(x, x, x, WINDOWS)

  mapped = program_cost(jax.vmap(call), _spec((3, *X.shape), X.dtype))
  assert mapped.flops == 3 * program_cost(call, X).flops
  assert mapped.kernels["attention_forward"].launches == 3


def test_loops_branches_and_what_cannot_be_counted():
  x = _spec((8, 8), jnp.float32)
  once = 2 * 8**3

  def square(x):
    return x @ x

  def five_times(x):
    return lax.fori_loop(0, 5, lambda _, x: square(x), x)

  def once_or_twice(x):
    return lax.cond(x[0, 0] > 0, lambda x: square(square(x)), square, x)

  def until_negative(x):
    return lax.while_loop(lambda x: x[0, 0] > 0, square, x)

  for fn, times in ((square, 1), (five_times, 5), (once_or_twice, 2)):
    assert program_cost(fn, x).flops == times * once
  with pytest.raises(ValueError, match="unknown length"):
    program_cost(until_negative, x)


def test_linear_attention_s_products():
  x = _spec((1, LAYOUT.n_buffer, HEADS, 128), jnp.bfloat16)
  found = program_cost(_gradients(lambda *x: linear_attention(*x)[0]), x, x, x).kernels
  one = 2 * LAYOUT.n_buffer * HEADS * 128**2
  products = {"linear_states": 2, "linear_read": 1, "linear_dq": 1, "linear_dkv": 2}
  assert {name: kernel.flops // one for name, kernel in found.items()} == products


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_model_does_what_its_cost_says(name):
  """All but padding, which costs leave out, and lists that are known to the device alone."""
  shape = (8, 16, 16, 16)
  config = ModelConfig(
    AttentionConfig(((name, method_class(name)()),), method=name, block=128),
    dtype="bfloat16",
    size="custom",
    width=384,
    depth=2,
    heads=6,
    patch=(1, 1, 1),
  )
  graph, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, shape, 10, nnx.Rngs(0))))

  def forward(params, x, t, y, tables):
    return nnx.merge(graph, params)(x, t, y, tables)[0]

  inputs = _spec((1, *shape), jnp.float32), _spec((1,), jnp.float32), _spec((1,), jnp.int32)
  found = program_cost(forward, params, *inputs, make_tables(config, shape))
  counted = model_cost(config, shape)
  # The kernels around attention do several times the products that count: two terms, 64 rows.
  linear = sum(kernel.flops for key, kernel in found.kernels.items() if key.startswith("linear"))
  assert found.product_flops + linear == pytest.approx(counted.linear_flops, rel=0.06)
  attention_flops = found.kernels["attention_forward"].flops
  if name in ("dense", "radial", "sliding_tile"):
    assert attention_flops == counted.attention_flops
  assert attention_flops >= 0.999 * counted.attention_flops
