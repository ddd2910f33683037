"""Named real shapes: benchmarks and tuning measure no others, so that figures can be compared."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask

from freqformer.grid.layout import TileLayout


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """One self-attention call on a video's token grid.

  Attributes:
    name: in rows of results.
    grid: tokens per axis (t, y, x).
    heads: number of heads.
    head_dim: channels of a head.
    keys: key rows that each query tile lists where the call is sparse; a multiple of `block`.
    block: rows of a tile, for queries and keys.
    dtype: of q, k and v.
    batch: samples.
  """

  name: str
  grid: tuple[int, int, int]
  heads: int
  head_dim: int
  keys: int = 8192
  block: int = 128
  dtype: str = "bfloat16"
  batch: int = 1

  def __post_init__(self):
    if self.keys % self.block or not 0 < self.keys <= self.layout.n_buffer:
      raise ValueError(
        f"{self.name}: {self.keys=} must be a multiple of {self.block=} "
        f"in 1..{self.layout.n_buffer}."
      )

  @property
  def n(self) -> int:
    """Tokens."""
    return math.prod(self.grid)

  @property
  def layout(self) -> TileLayout:
    return TileLayout.fit(self.grid, self.block)

  def inputs(self, count: int = 3, seed: int = 0) -> list[jax.Array]:
    """Returns `count` normal arrays `[batch, n_buffer, heads, head_dim]`: q, k, v, cotangents."""
    shape = (self.batch, self.layout.n_buffer, self.heads, self.head_dim)
    return [
      jax.random.normal(key, shape, jnp.dtype(self.dtype))
      for key in jax.random.split(jax.random.key(seed), count)
    ]

  def mask(self, seed: int = 0) -> BlockMask:
    """Returns a table: each query tile lists its own tile and random others, of `keys` rows."""
    rng = np.random.default_rng(seed)
    tiles = self.layout.tiles
    listed = self.keys // self.block
    score = rng.random((self.heads, tiles, tiles), np.float32)
    score[:, np.arange(tiles), np.arange(tiles)] = 2
    ids = np.sort(np.argpartition(-score, listed - 1, axis=-1)[..., :listed], axis=-1).astype(
      np.int32
    )
    counts = np.full((1, self.heads, tiles), listed, np.int32)
    return BlockMask(ids[None], counts, self.layout.arrays().kv_len, None, self.block, self.block)


def _cpu(name, grid, **kwargs):
  return AttentionSpec(
    name, grid, **{"heads": 4, "head_dim": 64, "keys": 1024, "dtype": "float32"} | kwargs
  )


_SPECS = (
  # CPU: 4 heads of 64 in float32.
  _cpu("cpu_1k", (4, 16, 16), heads=2, head_dim=32, keys=256, block=64),
  _cpu("cpu_4k", (16, 16, 16), heads=2, head_dim=32, keys=256, block=64),
  _cpu("cpu_16k", (16, 32, 32)),
  # Two heads: gradients of dense attention keep all scores, 9 GB of them at 16K tokens.
  _cpu("cpu_4k_2h", (16, 16, 16), heads=2, keys=256, block=64),
  _cpu("cpu_16k_2h", (16, 32, 32), heads=2),
  _cpu("cpu_64k", (16, 64, 64)),
  # A: a small video DiT, from 64K to 1M tokens; 16K for dense mode alone.
  AttentionSpec("a_16k", (16, 32, 32), 12, 128),
  AttentionSpec("a_64k", (16, 64, 64), 12, 128),
  AttentionSpec("a_128k", (32, 64, 64), 12, 128),
  AttentionSpec("a_256k", (64, 64, 64), 12, 128),
  AttentionSpec("a_512k", (64, 64, 128), 12, 128),
  AttentionSpec("a_1m", (64, 128, 128), 12, 128),
  # B: 24 heads at 720p and about 5 s.
  AttentionSpec("b_115k", (30, 48, 80), 24, 128),
  # C: the 40 heads of a 14B model.
  AttentionSpec("c_64k", (16, 64, 64), 40, 128),
  # D: ragged grids, 12 heads.
  AttentionSpec("d_75k", (21, 45, 80), 12, 128),
  AttentionSpec("d_32k", (21, 30, 52), 12, 128),
)
SPECS = {spec.name: spec for spec in _SPECS}
