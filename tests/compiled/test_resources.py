"""Every tile size and head dimension compiles for an H100 without spilling, to known resources.

What the same compilers made of the same code is known, and not compiled again.

python -m tests.compiled.test_resources        writes the table anew; look at its diff
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.around.lift import lift
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS, prepare
from freqformer.kernels.block_sparse import hopper, tuning
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.block_sparse.tuning_table import DIRECTIONS
from freqformer.kernels.linear.api import Segments, linear_attention

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import angle_tables
from freqformer.grid.tile_matrices import tile_cells
from tests import golden
from tools import offline

TABLE = golden.path("gpu_resources")
ROWS = 1024
HEADS = 4
LISTED = 4
THETA = 100.0  # of rotary
# Another ptxas may give a kernel a few registers more or less; threads get them in steps of 8.
REGISTER_SLACK = 8

_spec = jax.ShapeDtypeStruct


def known_resources() -> dict[str, dict[str, dict[str, int]]]:
  """Returns the golden table: configuration -> kernel -> resource -> number."""
  return json.loads(TABLE.read_text())["kernels"]


@dataclasses.dataclass(frozen=True)
class Config:
  """One way to call attention."""

  head_dim: int
  block_q: int
  block_kv: int
  bias: bool = False
  listed: bool = True
  dtype: str = "bfloat16"
  by_lane: bool = False
  scores_ahead: bool = True
  paired: bool = False
  keys: int = ROWS

  @property
  def ways(self) -> tuple[str, ...]:
    """The directions that are compiled: of variants that are not the default the forward."""
    varied = self.paired or self.by_lane or not self.scores_ahead
    return ("forward",) if varied else DIRECTIONS

  def __str__(self):
    words = {
      "bias": self.bias,
      "dense": not self.listed,
      self.dtype: self.dtype != "bfloat16",
      "by lane": self.by_lane,
      "stage by stage": not self.scores_ahead,
      "two tiles": self.paired,
      f"{self.keys} keys": self.keys != ROWS,
    }
    sizes = f"d{self.head_dim} q{self.block_q} kv{self.block_kv}"
    return " ".join([sizes, *(word for word, holds in words.items() if holds)])

  def tuning(self) -> dict[tuning.Key, tuning.TuningConfig]:
    """Returns the configurations that the kernels run with."""
    found = {}
    for direction in self.ways:
      key = tuning.Key("h100", self.head_dim, self.block_q, self.block_kv, direction)
      base = tuning.PAIR if self.paired else tuning.default(key)
      found[key] = dataclasses.replace(base, by_lane=self.by_lane, scores_ahead=self.scores_ahead)
    return found


_SIZES = list(itertools.product(hopper.HEAD_DIMS, hopper.BLOCKS, hopper.BLOCKS))
CONFIGS = (
  *(Config(*sizes) for sizes in _SIZES),
  # Biases take registers; two 64-key tiles in a stage take two.
  *(Config(*sizes, bias=True) for sizes in _SIZES if sizes[0] == 128),
  Config(128, 128, 128, listed=False),
  # To a text, as in cross-attention.
  Config(128, 128, 128, listed=False, keys=ROWS // 2),
  Config(128, 128, 128, dtype="float16"),
  Config(128, 128, 128, by_lane=True),
  Config(128, 128, 128, scores_ahead=False),
  Config(128, 64, 64, scores_ahead=False),
  Config(64, 64, 64, paired=True),
)


def compile_attention(config: Config) -> offline.Compilation:
  """Compiles the forward and both backward kernels, or the one that differs."""
  x = _spec((1, ROWS, HEADS, config.head_dim), config.dtype)
  keys = _spec((1, config.keys, HEADS, config.head_dim), config.dtype)
  tiles = ROWS // config.block_q
  kv_tiles = config.keys // config.block_kv
  mask = BlockMask(
    _spec((1, HEADS, tiles, LISTED), jnp.int32) if config.listed else None,
    _spec((1, HEADS, tiles), jnp.int32),
    _spec((kv_tiles,), jnp.int32),
    _spec((kv_tiles,), jnp.float32) if config.bias else None,
    config.block_q,
    config.block_kv,
  )

  def forward(q, k, v, mask, *_):
    return attention(q, k, v, mask, implementation="pallas_mgpu")

  def both(q, k, v, mask, d_out, d_lse):
    out, pull = jax.vjp(lambda *qkv: forward(*qkv, mask), q, k, v)
    return out, pull((d_out, d_lse))

  call = both if "dq" in config.ways else forward
  with tuning.override(config.tuning()):
    lse = _spec((1, HEADS, ROWS), jnp.float32)
    return offline.compile_for(call, x, keys, keys, mask, x, lse)


def compile_around(
  d: int, block: int, filtered: str = "", over_heads: bool = False
) -> offline.Compilation:
  """Compiles the kernels around attention: tiles of several kinds, and no coarse tokens."""
  layout = TileLayout.fit((9, 10, 20), block)
  spectral = SpectralBasis("block_dct", (0.5,) * 3, (0.75,) * 3).fit(layout)
  tables = tile_cells(spectral, -(-spectral.n_coarse // block) * block, bool(filtered))
  chosen = {"implementation": "pallas_mgpu"}
  norm = {"over_heads": over_heads, "pooled": True}

  def around(joint, bias, gains, packed, weights, positions, lengths, tables, centres):
    operands = (joint, bias, gains, angle_tables(positions, d, THETA), lengths)
    wanted = {"bands": jnp.ones((1, HEADS), jnp.int32), "filtered": filtered, **norm}
    coarse = prepare(*operands, tables.cells(angle_tables(centres, d, THETA)), **wanted, **chosen)
    alone = prepare(*operands, **norm, **chosen)
    return coarse, alone, lift(packed, weights, weights > 0, tables.expansion, **chosen)

  arrays = layout.arrays()
  return offline.compile_for(
    around,
    _spec((1, layout.n_buffer, 3, HEADS, d), jnp.bfloat16),
    _spec((3, HEADS, d), jnp.float32),
    (_spec((HEADS, d) if over_heads else (d,), jnp.float32),) * 2,
    _spec((1, tables.front + layout.n_buffer, HEADS, d), jnp.bfloat16),
    _spec((1, HEADS), jnp.float32),
    arrays.positions,
    arrays.kv_len,
    tables,
    spectral.centres,
  )


def compile_linear(feature_map: str) -> offline.Compilation:
  """Compiles linear attention at its largest: runs of 40 rows, eight copies a stage."""
  x = _spec((1, ROWS, HEADS, 128), jnp.bfloat16)
  segments = Segments.of_ids(np.resize(np.repeat(np.arange(4), 40), ROWS))
  call = functools.partial(linear_attention, feature_map=feature_map, implementation="pallas_mgpu")

  def both(q, k, v, segments, d_out):
    out, pull = jax.vjp(lambda *x: call(*x, segments)[0], q, k, v)
    return out, pull(d_out)

  return offline.compile_for(both, x, x, x, segments, x)


CASES = {
  **{str(config): functools.partial(compile_attention, config) for config in CONFIGS},
  **{
    f"around d{d} block {block}": functools.partial(compile_around, d, block)
    for d, block in itertools.product(HEAD_DIMS, BLOCKS)
  },
  # Filtered heads take the most registers.
  "around d128 block 128 filtered": functools.partial(compile_around, 128, 128, "qkv"),
  **{
    f"around d{d} block {block} over heads": functools.partial(
      compile_around, d, block, over_heads=True
    )
    for d, block in itertools.product(HEAD_DIMS, BLOCKS)
  },
  # Such a norm leaves v alone to be filtered.
  "around d128 block 128 over heads filtered": functools.partial(
    compile_around, 128, 128, "v", over_heads=True
  ),
  # The third feature map, relu, is elu's without the exponential.
  "linear d128 softmax": functools.partial(compile_linear, "softmax"),
  "linear d128 elu": functools.partial(compile_linear, "elu"),
}

ALWAYS = ("d64 q64 kv64", "around d64 block 64")  # compiled whatever is known
_SOURCES = (
  "kernels/hopper/*.py",
  "kernels/core/*.py",
  "kernels/*/hopper*.py",
  *(f"kernels/block_sparse/{name}" for name in ("api.py", "operands.py", "table.py", "tuning*")),
  "kernels/around/prepare.py",
  "kernels/around/lift.py",
  "kernels/linear/*.py",
  "freqformer/grid/*.py",
  "tests/compiled/test_resources.py",
)


def resources_of(compiled: offline.Compilation) -> dict[str, dict[str, int]]:
  """Returns registers, spills and shared memory of each kernel of a case.

  Of kernels that run several times (sums of linear attention), the last counts: in the backward
  they take more.
  """
  keep = ("registers", "spill_stores", "spill_loads", "shared_bytes")
  return {
    kernel.name.rsplit("_", 1)[0]: {field: getattr(kernel, field) for field in keep}
    for kernel in compiled.kernels
  }


def made_by() -> str:
  """Returns the hash of `golden.made_by` for Hopper's kernels, and for this file."""
  return golden.made_by(("jax", "jaxlib", *offline.WHEELS), _SOURCES)


@pytest.mark.parametrize("name", CASES)
def test_resources(name):
  """No spills, within shared memory, and what the table says: a change is one to look at.

  Registers are the assembler's choice: with another ptxas than the table's they may differ a bit.
  """
  table = json.loads(TABLE.read_text())
  slack = 0 if offline.assembler_version() == table["ptxas"] else REGISTER_SLACK
  advice = "the kernels changed: run python -m tests.compiled.test_resources, look at the diff"
  known = table["kernels"][name]
  is_known = table["made_by"] == made_by() and name not in ALWAYS
  found = known if is_known else resources_of(CASES[name]())
  assert set(found) == set(known)
  for kernel, numbers in found.items():
    assert numbers["spill_stores"] == numbers["spill_loads"] == 0, (kernel, numbers)
    assert numbers["shared_bytes"] <= offline.SHARED_LIMIT, (kernel, numbers)
    assert numbers["shared_bytes"] == known[kernel]["shared_bytes"], (advice, kernel)
    assert abs(numbers["registers"] - known[kernel]["registers"]) <= slack, (advice, kernel)


def test_the_table_is_of_todays_code():
  """Else the suite compiles every kernel each time that it runs."""
  table = json.loads(TABLE.read_text())
  assert set(table["kernels"]) == set(CASES)
  assert table["made_by"] == made_by(), "run: python -m tests.compiled.test_resources"


def test_predicted_shared_memory_is_enough():
  """A configuration that passes `TuningConfig.check` also launches."""
  known = known_resources()
  for config in CONFIGS:
    for key, chosen in config.tuning().items():
      asked = known[str(config)][f"attention_{key.direction}"]["shared_bytes"]
      assert asked <= chosen.shared_bytes(key)


if __name__ == "__main__":
  compiled = {name: case() for name, case in CASES.items()}
  found = {
    "ptxas": offline.assembler_version(),
    "made_by": made_by(),
    "kernels": {name: resources_of(own) for name, own in compiled.items()},
  }
  TABLE.write_text(json.dumps(found, indent=1) + "\n")
