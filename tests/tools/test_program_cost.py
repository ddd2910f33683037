"""Kernels are launched with what they do, and a traced model does what the model of costs says."""

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

from freqformer.cost import model_cost
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS, method_class
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.tables.window import sliding_tile
from tools import offline
from tools.program_cost import program_cost

LAYOUT, HEADS, DIM = TileLayout.fit((8, 32, 32), 128), 4, 64
_spec = jax.ShapeDtypeStruct


@pytest.fixture(scope="module", autouse=True)
def hopper():
  with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
    yield


def _gradients(q, k, v, mask):
  return jax.grad(lambda *x: attention(*x, mask)[0].astype(jnp.float32).sum(), argnums=(0, 1, 2))(
    q, k, v
  )


def _windows():
  return sliding_tile(LAYOUT, (3, 3, 3)), _spec((2, LAYOUT.n_buffer, HEADS, DIM), jnp.bfloat16)


def test_a_table_that_numpy_holds_is_counted_exactly():
  mask, x = _windows()
  found = program_cost(functools.partial(_gradients, mask=mask), x, x, x)
  table = count(mask, DIM, batch=2, heads=HEADS)
  assert (
    set(found.kernels) == {"attention_forward", "attention_dq", "attention_dkv"}
    and table.loads < table.rows * mask.kv_tiles
  )
  for kernel, matmuls in KERNEL_MATMULS.items():
    launched = found.kernels[f"attention_{kernel}"]
    assert launched.launches == 1 and launched.flops == 2 * matmuls * table.computed_pairs * DIM
    assert launched.transcendentals == table.computed_pairs
  assert found.kernels["attention_forward"].bytes_accessed == pytest.approx(
    table.min_bytes(), rel=0.01
  )
  assert found.flops == 2 * 9 * table.computed_pairs * DIM


def test_a_traced_table_counts_its_whole_lists():
  tiles = np.random.default_rng(0).random((1, HEADS, 6, 9)) < 0.4
  mask, call = (
    from_tiles(tiles, np.full(9, 64, np.int32), 128, 64),
    lambda q, k, mask: attention(q, k, k, mask)[0],
  )
  x = [_spec((2, rows, HEADS, DIM), jnp.bfloat16) for rows in (6 * 128, 9 * 64)]
  found = program_cost(call, *x, mask)
  assert found.flops == 4 * DIM * 2 * HEADS * 6 * mask.max_kv * 128 * 64
  noted = program_cost(call, *x, mask.with_mean())  # as tables of models are
  assert noted.flops == 4 * DIM * 2 * tiles.sum() * 128 * 64 < found.flops


def test_mapped_calls_add_up():
  mask, x = _windows()
  mapped = program_cost(
    jax.vmap(lambda x: attention(x, x, x, mask)[0]), _spec((3, *x.shape), x.dtype)
  )
  one = program_cost(lambda x: attention(x, x, x, mask)[0], x)
  assert mapped.flops == 3 * one.flops and mapped.kernels["attention_forward"].launches == 3


def test_loops_branches_and_what_cannot_be_counted():
  square, x = lambda x: x @ x, _spec((8, 8), jnp.float32)
  once = 2 * 8**3
  assert program_cost(square, x).flops == once
  assert (
    program_cost(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: square(x), x), x).flops == 5 * once
  )

  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: square(square(x)), square, x)

  assert program_cost(either, x).flops == 2 * once
  with pytest.raises(ValueError, match="unknown length"):
    program_cost(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, square, x), x)


def test_linear_attention_s_products():
  n, x = LAYOUT.n_buffer, _spec((1, LAYOUT.n_buffer, HEADS, 128), jnp.bfloat16)

  def run(q, k, v):
    return linear_attention(q, k, v)[0].astype(jnp.float32).sum()

  found = program_cost(jax.grad(run, argnums=(0, 1, 2)), x, x, x).kernels
  assert {name: kernel.flops // (2 * n * HEADS * 128**2) for name, kernel in found.items()} == {
    "linear_states": 2, "linear_read": 1, "linear_dq": 1, "linear_dkv": 2
  }  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_model_does_what_its_cost_says(name):
  """Everything but padding, which kernels compute and costs leave out, and lists that are known to the device alone."""
  method, shape = method_class(name)(), (8, 16, 16, 16)
  config = ModelConfig(
    AttentionConfig(((name, method),), method=name, block=128), dtype="bfloat16", size="custom", width=384, depth=2,
    heads=6, patch=(1, 1, 1)
  )  # fmt: skip
  graph, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, shape, 10, nnx.Rngs(0))))

  def forward(params, x, t, y, tables):
    return nnx.merge(graph, params)(x, t, y, tables)[0]

  inputs = _spec((1, *shape), jnp.float32), _spec((1,), jnp.float32), _spec((1,), jnp.int32)
  found, said = (
    program_cost(forward, params, *inputs, make_tables(config, shape)),
    model_cost(config, shape),
  )
  attention_flops = found.kernels["attention_forward"].flops
  # Of products with coarse tokens' matrices a kernel does several times what counts: in two terms, on 64 rows.
  around = sum(
    found.kernels[kernel].flops for kernel in found.kernels if kernel.startswith("linear")
  )
  assert found.product_flops + around == pytest.approx(said.linear_flops, rel=0.06)
  if name in ("dense", "radial", "sliding_tile"):
    assert attention_flops == said.attention_flops
  assert attention_flops >= 0.999 * said.attention_flops
