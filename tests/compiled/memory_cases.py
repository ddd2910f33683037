"""What `tests/compiled/test_memory.py` compiles for an absent H100: attention, one DiT block, one-layer train steps. Named, so that the
golden table can list them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from jax.sharding import PartitionSpec as P

from freqformer.methods.base import Cond
from freqformer.methods.freqformer import FreqFormer
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import DiTBlock, VideoDiT, make_tables
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tools.offline import NO_AUTOTUNING, Compilation, compile_for

GRIDS = {"16k": (16, 32, 32), "64k": (16, 64, 64), "128k": (32, 64, 64)}
# From here on temporary memory per token stays the same: at 16K what does not depend on tokens shows.
LARGE = ("64k", "128k")
HEADS, BLOCK, LISTED = 12, 128, 26
_CHANNELS = 16


@dataclasses.dataclass(frozen=True)
class Case:
  """One compile: `what` ("attention", "block", "train"), tokens by grid, head dimension, backend, number of GPUs."""

  what: str
  size: str
  head_dim: int
  implementation: str
  devices: int = 1

  @property
  def name(self) -> str:
    gpus = f"_{self.devices}gpus" if self.devices > 1 else ""
    return f"{self.what}_{self.implementation}_d{self.head_dim}_{self.size}{gpus}"

  @property
  def tokens(self) -> int:
    return int(np.prod(GRIDS[self.size]))

  def compile(self) -> Compilation:
    return {"attention": _attention, "block": _block, "train": _train}[self.what](self)


def _cases():
  for head_dim in (64, 128):
    yield from (Case("attention", size, head_dim, "pallas_mgpu") for size in ("16k", "128k"))
  yield Case("attention", "16k", 128, "xla")
  for what in ("block", "train"):
    yield from (Case(what, size, 128, "pallas_mgpu") for size in LARGE)
  # Memory is close to linear in n: d = 64 at one size says whether its tiles cost more than they should.
  yield Case("block", "16k", 64, "pallas_mgpu")
  yield Case("train", "16k", 64, "pallas_mgpu", devices=8)


CASES = {case.name: case for case in _cases()}


def measure(name: str) -> int:
  """Temporary bytes per GPU."""
  return CASES[name].compile().temp_bytes


_spec = jax.ShapeDtypeStruct


def _attention(case: Case) -> Compilation:
  """Forward and backward of one call with per-head lists of `LISTED` tiles."""
  n, tiles = case.tokens, case.tokens // BLOCK

  def both(q, k, v, ids, counts, d_out, d_lse):
    mask = BlockMask(ids, counts, jnp.full(tiles, BLOCK, jnp.int32), None, BLOCK, BLOCK)
    _, pull = jax.vjp(
      lambda *qkv: attention(*qkv, mask, implementation=case.implementation), q, k, v
    )
    return pull((d_out, d_lse))

  x, lse = _spec((1, n, HEADS, case.head_dim), jnp.bfloat16), _spec((1, HEADS, n), jnp.float32)
  lists = _spec((1, HEADS, tiles, LISTED), jnp.int32), _spec((1, HEADS, tiles), jnp.int32)
  return compile_for(both, x, x, x, *lists, x, lse)


def model_config(case: Case) -> ModelConfig:
  """One FreqFormer layer, 3 low, 6 mid and 3 high heads, bf16 activations."""
  method = FreqFormer(allocation=(3, 6, 3), mid_tiles=LISTED, window=(3, 3, 3))
  attention = AttentionConfig(
    (("freqformer", method),), block=BLOCK, implementation=case.implementation
  )
  sizes = dict(size="custom", width=HEADS * case.head_dim, depth=1, heads=HEADS, patch=(1, 1, 1))
  return ModelConfig(attention, dtype="bfloat16", **sizes)


def _block(case: Case) -> Compilation:
  """Forward of one DiT block."""
  config, shape = model_config(case), (*GRIDS[case.size], _CHANNELS)
  (_, method), layout = config.runs()[0], config.layout(shape)
  graphdef, params = nnx.split(
    nnx.eval_shape(lambda: DiTBlock(config, method, layout, nnx.Rngs(0)))
  )
  tables = make_tables(config, shape)

  def forward(params, x, condition, tables):
    cond = Cond(jnp.full(1, 0.5), condition.astype(jnp.float32))
    out, _, _ = nnx.merge(graphdef, params)(
      x, condition, cond, tables["layout"], tables["methods"][0], {}
    )
    return out

  x = _spec((1, layout.n_buffer, config.width), jnp.bfloat16)
  return compile_for(
    forward, params, x, _spec((1, config.width), jnp.bfloat16), tables, options=NO_AUTOTUNING
  )


def _train(case: Case) -> Compilation:
  """A whole optimisation step of a model of one layer, one sample per GPU."""
  config, shape, b = model_config(case), (*GRIDS[case.size], _CHANNELS), case.devices
  graphdef, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, shape, 10, nnx.Rngs(0))))
  train = TrainConfig(steps=100, batch_size=b)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  batch = {"latent": _spec((b, *shape), jnp.float32), "label": _spec((b,), jnp.int32)}
  step, tables = make_train_step(graphdef, train, 10), make_tables(config, shape)
  return compile_for(
    step, state, batch, tables, devices=b, shardings=(P(), P("data"), P()), options=NO_AUTOTUNING
  )
