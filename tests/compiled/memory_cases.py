"""Programs whose temporary memory on an H100 is in a golden table, compiled without one.

They are attention, one DiT block and one-layer train steps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
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
# From here on temporary memory per token stays the same; at 16K, memory that does not depend on
# tokens still shows.
LARGE = ("64k", "128k")
HEADS = 12
BLOCK = 128
LISTED = 26  # key tiles in each list
CHANNELS = 16

_spec = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Case:
  """One compile.

  Attributes:
    what: "attention", "block" or "train".
    size: tokens, by a name of `GRIDS`.
    head_dim: channels of a head.
    implementation: of attention.
    devices: number of GPUs.
  """

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
    return math.prod(GRIDS[self.size])

  @property
  def latent(self) -> tuple[int, ...]:
    """Shape of a sample's latent."""
    return (*GRIDS[self.size], CHANNELS)

  def model_config(self) -> ModelConfig:
    """Returns one FreqFormer layer of 3 low, 6 mid and 3 high heads, bf16 activations."""
    method = FreqFormer(allocation=(3, 6, 3), mid_tiles=LISTED, window=(3, 3, 3))
    named = (("freqformer", method),)
    return ModelConfig(
      AttentionConfig(named, block=BLOCK, implementation=self.implementation),
      dtype="bfloat16",
      size="custom",
      width=HEADS * self.head_dim,
      depth=1,
      heads=HEADS,
      patch=(1, 1, 1),
    )

  def compile(self) -> Compilation:
    return {"attention": _attention, "block": _block, "train": _train}[self.what](self)


CASES = {
  case.name: case
  for case in (
    *(Case("attention", size, d, "pallas_mgpu") for d in (64, 128) for size in ("16k", "128k")),
    Case("attention", "16k", 128, "xla"),
    *(Case(what, size, 128, "pallas_mgpu") for what in ("block", "train") for size in LARGE),
    # Memory is close to linear in n: d = 64 at one size tells if its tiles cost more than they
    # should.
    Case("block", "16k", 64, "pallas_mgpu"),
    Case("train", "16k", 64, "pallas_mgpu", devices=8),
  )
}


def measure(name: str) -> int:
  """Returns temporary bytes per GPU."""
  return CASES[name].compile().temp_bytes


def _attention(case: Case) -> Compilation:
  """Compiles forward and backward of one call with per-head lists of `LISTED` tiles."""
  n = case.tokens
  tiles = n // BLOCK

  def both(q, k, v, ids, counts, d_out, d_lse):
    mask = BlockMask(ids, counts, jnp.full(tiles, BLOCK, jnp.int32), None, BLOCK, BLOCK)
    _, pull = jax.vjp(
      lambda *qkv: attention(*qkv, mask, implementation=case.implementation), q, k, v
    )
    return pull((d_out, d_lse))

  x = _spec((1, n, HEADS, case.head_dim), jnp.bfloat16)
  lse = _spec((1, HEADS, n), jnp.float32)
  ids = _spec((1, HEADS, tiles, LISTED), jnp.int32)
  counts = _spec((1, HEADS, tiles), jnp.int32)
  return compile_for(both, x, x, x, ids, counts, x, lse)


def _block(case: Case) -> Compilation:
  """Compiles the forward of one DiT block."""
  config = case.model_config()
  _, method = config.runs()[0]
  layout = config.layout(case.latent)
  block = nnx.eval_shape(lambda: DiTBlock(config, method, layout, nnx.Rngs(0)))
  graphdef, params = nnx.split(block)

  def forward(params, x, condition, tables):
    cond = Cond(jnp.full(1, 0.5), condition.astype(jnp.float32))
    block = nnx.merge(graphdef, params)
    return block(x, condition, cond, tables["layout"], tables["methods"][0], {})[0]

  x = _spec((1, layout.n_buffer, config.width), jnp.bfloat16)
  condition = _spec((1, config.width), jnp.bfloat16)
  tables = make_tables(config, case.latent)
  return compile_for(forward, params, x, condition, tables, options=NO_AUTOTUNING)


def _train(case: Case) -> Compilation:
  """Compiles a whole optimisation step of a model of one layer, one sample per GPU."""
  config = case.model_config()
  model = nnx.eval_shape(lambda: VideoDiT(config, case.latent, 10, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  train = TrainConfig(steps=100, batch_size=case.devices)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  batch = {
    "latent": _spec((case.devices, *case.latent), jnp.float32),
    "label": _spec((case.devices,), jnp.int32),
  }
  return compile_for(
    make_train_step(graphdef, train, 10),
    state,
    batch,
    make_tables(config, case.latent),
    devices=case.devices,
    shardings=(P(), P("data"), P()),
    options=NO_AUTOTUNING,
  )
