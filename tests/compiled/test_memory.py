"""Temporary memory on an H100, from compiles without one: attention, a DiT block, a train step.

python -m tests.compiled.test_memory        writes the golden table anew; look at its diff
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import layer_traffic
from freqformer.analysis.hlo_bytes import collectives
from freqformer.config import numbers
from freqformer.methods.base import Cond
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import DiTBlock, VideoDiT, make_tables
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tests import golden
from tools.offline import NO_AUTOTUNING, Compilation, compile_for

# One worker: a program is then lowered, and compiled where need be, once.
pytestmark = pytest.mark.xdist_group("memory")

TABLE = golden.path("memory")
SLACK = 0.1
HEADS = 12
BLOCK = 128
LISTED = 26  # key tiles in each list
GPUS = 8
# Latents, the first two of 64K and 128K tokens: from there on memory per token stays the same.
LATENT_64K = (16, 64, 64, 16)
LATENT_128K = (32, 64, 64, 16)
MODEL = ModelConfig(
  AttentionConfig(
    (("freqformer", FreqFormer(allocation=(3, 6, 3), mid_tiles=LISTED, window=(3, 3, 3))),),
    block=BLOCK,
    implementation="pallas_mgpu",
  ),
  dtype="bfloat16",
  size="custom",
  width=HEADS * 128,
  depth=1,
  heads=HEADS,
  patch=(1, 1, 1),
)

_spec = jax.ShapeDtypeStruct


def compile_attention(
  n: int, head_dim: int, implementation: str, unless: str | None = None
) -> Compilation | None:
  """Compiles forward and backward of one call with per-head lists of `LISTED` tiles."""
  tiles = n // BLOCK

  def both(q, k, v, ids, counts, d_out, d_lse):
    mask = BlockMask(ids, counts, jnp.full(tiles, BLOCK, jnp.int32), None, BLOCK, BLOCK)
    _, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, implementation=implementation), q, k, v)
    return pull((d_out, d_lse))

  x = _spec((1, n, HEADS, head_dim), jnp.bfloat16)
  lse = _spec((1, HEADS, n), jnp.float32)
  ids = _spec((1, HEADS, tiles, LISTED), jnp.int32)
  counts = _spec((1, HEADS, tiles), jnp.int32)
  return compile_for(both, x, x, x, ids, counts, x, lse, unless=unless)


def compile_block(unless: str | None = None) -> Compilation | None:
  """Compiles the forward of one DiT block at 128K tokens."""
  _, method = MODEL.runs()[0]
  layout = MODEL.layout(LATENT_128K)
  block = nnx.eval_shape(lambda: DiTBlock(MODEL, method, layout, nnx.Rngs(0)))
  graphdef, params = nnx.split(block)

  def forward(params, x, condition, tables):
    cond = Cond(jnp.full(1, 0.5), condition.astype(jnp.float32))
    block = nnx.merge(graphdef, params)
    return block(x, condition, cond, tables["layout"], tables["methods"][0], {})[0]

  x = _spec((1, layout.n_buffer, MODEL.width), jnp.bfloat16)
  condition = _spec((1, MODEL.width), jnp.bfloat16)
  tables = make_tables(MODEL, LATENT_128K)
  args = (params, x, condition, tables)
  return compile_for(forward, *args, options=NO_AUTOTUNING, unless=unless)


def compile_octaves(unless: str | None = None) -> Compilation | None:
  """Compiles the forward of an attention layer of octaves at 64K tokens."""
  method = Octaves(levels=4, window=(2, 2, 2), deal="octant")
  forward, args = layer_traffic.program(method, MODEL.layout(LATENT_64K), HEADS, 128)
  return compile_for(forward, *args, options=NO_AUTOTUNING, unless=unless)


def compile_train_step(unless: str | None = None) -> Compilation | None:
  """Compiles an optimisation step of a model of one layer on eight GPUs, 64K tokens on each."""
  model = nnx.eval_shape(lambda: VideoDiT(MODEL, LATENT_64K, 10, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  train = TrainConfig(steps=100, batch_size=GPUS)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  batch = {"latent": _spec((GPUS, *LATENT_64K), jnp.float32), "label": _spec((GPUS,), jnp.int32)}
  return compile_for(
    make_train_step(graphdef, train),
    state,
    batch,
    make_tables(MODEL, LATENT_64K),
    numbers(train),
    devices=GPUS,
    shardings=(P(), P("data"), P(), P()),
    options=NO_AUTOTUNING,
    unless=unless,
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """One program.

  Attributes:
    tokens: on each GPU.
    ceiling: bytes per token that it may take, whatever the golden table says; anything that is
      n x n takes over 100 KB.
    compile: takes `unless` of `compile_for`.
  """

  tokens: int
  ceiling: int
  compile: Callable[[str | None], Compilation | None]


def _attention(tokens: int, head_dim: int, implementation: str) -> Case:
  """3 KB per token and head: what must live between both passes, and what the backward adds."""
  call = functools.partial(compile_attention, tokens, head_dim, implementation)
  return Case(tokens, 3 * 1024 * HEADS, call)


CASES = {
  "attention_d128_128k": _attention(1 << 17, 128, "pallas_mgpu"),
  "attention_xla_d128_16k": _attention(1 << 14, 128, "xla"),
  "block_d128_128k": Case(math.prod(LATENT_128K[:3]), 21_000, compile_block),
  "octaves_d128_64k": Case(math.prod(LATENT_64K[:3]), 22_000, compile_octaves),
  "train_d128_64k_8gpus": Case(math.prod(LATENT_64K[:3]), 100_000, compile_train_step),
}


def measured(name: str, known: dict | None = None) -> dict:
  """Returns what the golden table holds of a program, `known` if it is that."""
  compiled = CASES[name].compile(unless=known and known["program"])
  if compiled is None:
    return known
  return {
    "program": compiled.fingerprint,
    "temporary_bytes": compiled.temp_bytes,
    "kernels": len(compiled.kernels),
    "spilled_bytes": sum(kernel.spill_stores + kernel.spill_loads for kernel in compiled.kernels),
    "collectives": sorted(collectives(compiled.compiled.as_text())),
  }


@functools.cache
def found_and_known(name: str) -> tuple[dict, dict]:
  """Returns the numbers of a program and those of the golden table."""
  known = json.loads(TABLE.read_text())[name]
  return measured(name, known), known


@pytest.mark.parametrize("name", CASES)
def test_temporary_bytes_stay_where_they_were(name):
  """The very program that the table is of, for the same compilers, is not compiled again."""
  case = CASES[name]
  found, known = (numbers["temporary_bytes"] for numbers in found_and_known(name))
  change = found / known - 1
  assert abs(change) <= SLACK, (
    f"temporary bytes of {name} moved by {change:+.0%}, {known:,} -> {found:,}; if meant: "
    "python -m tests.compiled.test_memory"
  )
  assert found <= case.ceiling * case.tokens


@pytest.mark.parametrize("name, least", [("train_d128_64k_8gpus", 3), ("octaves_d128_64k", 2)])
def test_kernels_do_not_spill(name, least):
  found, _ = found_and_known(name)
  assert found["kernels"] >= least
  assert found["spilled_bytes"] == 0


def test_eight_gpus_each_attend_to_their_own_sample():
  """Data parallel: gradients are reduced, q, k and v stay where they are."""
  found, _ = found_and_known("train_d128_64k_8gpus")
  assert found["collectives"] == ["all-reduce"]


if __name__ == "__main__":
  table = {name: measured(name) for name in CASES}
  TABLE.write_text(json.dumps(table, indent=1) + "\n")
