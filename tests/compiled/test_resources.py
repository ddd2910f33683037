"""Every shipped kernel configuration compiles for an H100 without spilling; its resources are a golden table.

python -m tests.compiled.test_resources        writes the table anew; look at its diff before committing it
"""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.around.lift import lift
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS, prepare
from freqformer.kernels.block_sparse import hopper as pallas_mgpu
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.linear.api import FEATURE_MAPS, Segments, linear_attention

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import angle_tables
from freqformer.grid.tile_matrices import tile_cells
from tools import offline

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gpu_resources.json"
ROWS, HEADS, LISTED = 1024, 4, 4


@dataclasses.dataclass(frozen=True)
class Config:
  """One way to call the backend."""

  head_dim: int
  block_q: int
  block_kv: int
  bias: bool = False
  listed: bool = True
  dtype: str = "bfloat16"
  by_lane: bool = False
  scores_ahead: bool = True
  paired: bool = False

  def __str__(self):
    words = {
      "bias": self.bias,
      "dense": not self.listed,
      self.dtype: self.dtype != "bfloat16",
      "by lane": self.by_lane,
      "stage by stage": not self.scores_ahead,
      "two tiles": self.paired,
    }
    return " ".join(
      [
        f"d{self.head_dim} q{self.block_q} kv{self.block_kv}",
        *(word for word, said in words.items() if said),
      ]
    )

  def tuning(self) -> dict:
    """The configurations that it runs with."""
    keys = [
      tuning.Key("h100", self.head_dim, self.block_q, self.block_kv, direction)
      for direction in tuning.DIRECTIONS
    ]
    base = {key: tuning.PAIR if self.paired else tuning.default(key) for key in keys}
    forms = {"by_lane": self.by_lane, "scores_ahead": self.scores_ahead}
    return {key: dataclasses.replace(config, **forms) for key, config in base.items()}


_SIZES = list(itertools.product(pallas_mgpu.HEAD_DIMS, pallas_mgpu.BLOCKS, pallas_mgpu.BLOCKS))
CONFIGS = (
  *(Config(*sizes) for sizes in _SIZES),
  *(Config(*sizes, bias=True) for sizes in _SIZES if sizes[0] == 128),
  *(Config(d, 128, 128, listed=False) for d in (64, 128)),
  *(Config(d, 128, 128, dtype="float16") for d in (64, 128)),
  *(Config(128, 128, 128, by_lane=True, bias=bias) for bias in (False, True)),
  *(Config(d, 128, 128, scores_ahead=False) for d in (64, 128)),
  Config(128, 64, 64, scores_ahead=False),
  *(Config(d, 64, 64, paired=True) for d in (32, 64)),
)


def resources(config: Config) -> dict[str, dict[str, int]]:
  """Registers, spills and shared memory of the forward and of both backward kernels."""

  def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)

  x = array(1, ROWS, HEADS, config.head_dim, dtype=config.dtype)
  tiles, kv_tiles = ROWS // config.block_q, ROWS // config.block_kv
  mask = BlockMask(
    array(1, HEADS, tiles, LISTED) if config.listed else None,
    array(1, HEADS, tiles),
    array(kv_tiles),
    array(kv_tiles, dtype=jnp.float32) if config.bias else None,
    config.block_q,
    config.block_kv,
  )

  def both(q, k, v, mask, d_out, d_lse):
    out, vjp = jax.vjp(lambda *a: attention(*a, mask, implementation="pallas_mgpu"), q, k, v)
    return out, vjp((d_out, d_lse))

  with tuning.override(config.tuning()):
    found = offline.compile_for(
      both, x, x, x, mask, x, array(1, HEADS, ROWS, dtype=jnp.float32)
    ).kernels
  return _kept(found)


def _kept(kernels):
  keep = ("registers", "spill_stores", "spill_loads", "shared_bytes")
  return {k.name.rsplit("_", 1)[0]: {name: getattr(k, name) for name in keep} for k in kernels}


AROUND = {f"around d{d} block {block}": (d, block) for d in HEAD_DIMS for block in BLOCKS}
AROUND["around d128 block 128 filtered"] = (128, 128, "qkv")


def resources_around(d: int, block: int, filtered: str = "") -> dict[str, dict[str, int]]:
  """Of the kernels around attention, with tiles of several kinds, and without coarse tokens."""
  layout = TileLayout.fit((9, 10, 20), block)
  spectral = SpectralBasis("block_dct", (0.5,) * 3, (0.75,) * 3).fit(layout)
  tables = tile_cells(spectral, -(-spectral.n_coarse // block) * block, bool(filtered))

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  def around(joint, bias, gains, packed, weights, positions, lengths, tables, centres):
    operands = (joint, bias, gains, angle_tables(positions, d), lengths)
    wanted = {"bands": jnp.ones((1, HEADS), jnp.int32), "filtered": filtered, "pooled": True}
    coarse = prepare(*operands, tables.cells(centres, d), **wanted, implementation="pallas_mgpu")
    alone = prepare(*operands, pooled=True, implementation="pallas_mgpu")
    return (
      coarse,
      alone,
      lift(packed, weights, weights > 0, tables.expansion, implementation="pallas_mgpu"),
    )

  joint = array(1, layout.n_buffer, 3, HEADS, d, dtype=jnp.bfloat16)
  packed = array(1, tables.front + layout.n_buffer, HEADS, d, dtype=jnp.bfloat16)
  learned = array(3, HEADS, d), (array(d), array(d))
  static = layout.arrays().positions, layout.arrays().kv_len, tables, spectral.centres
  return _kept(
    offline.compile_for(around, joint, *learned, packed, array(1, HEADS), *static).kernels
  )


LINEAR = {f"linear d128 {feature_map}": feature_map for feature_map in FEATURE_MAPS}


def resources_linear(feature_map: str) -> dict[str, dict[str, int]]:
  """Of linear attention at its largest: runs of 40 rows, eight copies a stage. Of the sums, the backward's, which take more."""
  x = jax.ShapeDtypeStruct((1, ROWS, HEADS, 128), jnp.bfloat16)
  segments = Segments.of_ids(np.resize(np.repeat(np.arange(4), 40), ROWS))

  def both(q, k, v, segments, d_out):
    def call(*x):
      return linear_attention(*x, segments, feature_map=feature_map, implementation="pallas_mgpu")[
        0
      ]

    out, vjp = jax.vjp(call, q, k, v)
    return out, vjp(d_out)

  return _kept(offline.compile_for(both, x, x, x, segments, x).kernels)


def resources_of(config) -> dict[str, dict[str, int]]:
  """Of a `Config`, or of a name in `AROUND` or `LINEAR`."""
  if config in LINEAR:
    return resources_linear(LINEAR[config])
  return resources_around(*AROUND[config]) if config in AROUND else resources(config)


@pytest.mark.parametrize("config", [*CONFIGS, *AROUND, *LINEAR], ids=str)
def test_resources(config):
  """No spills, within shared memory, and what the table says: a change is one to look at."""
  found = resources_of(config)
  names = (
    {"prepare", "norm_rotary", "lift"}
    if config in AROUND
    else {"attention_forward", "attention_dq", "attention_dkv"}
  )
  assert set(found) == (
    {"linear_states", "linear_read", "linear_dq", "linear_dkv"} if config in LINEAR else names
  )
  for name, kernel in found.items():
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0, (name, kernel)
    assert kernel["shared_bytes"] <= offline.SHARED_LIMIT, (name, kernel)
  golden = json.loads(GOLDEN.read_text()).get(str(config))
  assert found == golden, (
    "the kernels changed: run python -m tests.compiled.test_resources and look at the diff"
  )


def test_predicted_shared_memory_is_enough():
  """What `TuningConfig` reckons is never less than what the kernel asks for, so a configuration that passes also launches."""
  golden = json.loads(GOLDEN.read_text())
  for config in CONFIGS:
    for key, chosen in config.tuning().items():
      assert golden[str(config)][f"attention_{key.direction}"][
        "shared_bytes"
      ] <= chosen.shared_bytes(key)


if __name__ == "__main__":
  found = {str(c): resources_of(c) for c in [*CONFIGS, *AROUND, *LINEAR]}
  GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
