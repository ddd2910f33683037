"""What the GPU benchmark measures, at which sizes; and the same plan at sizes that a CPU can rehearse."""

import dataclasses
from collections.abc import Mapping

from benchmarks.arg_specs import SPECS, AttentionSpec
from benchmarks.gpu.masks import Composition
from benchmarks.gpu.timing import Effort


@dataclasses.dataclass(frozen=True)
class Form:
  """A call that is timed as its kernel is configured and, in turns with it, otherwise.

  Attributes:
    name: of the row, before the shape.
    shape: a name of `SPECS`.
    changes: of the configuration, as `gpu_config.parse` reads them.
    density: of random lists; 0: dense mode.
    block: rows of a tile; None: the shape's own.
  """

  name: str
  shape: str
  changes: str
  density: float = 0.0
  block: int | None = None


_BESIDE, _ALONE = "scores_ahead=False", "tiles_per_block=1, compute_registers=0, memory_registers=0"


@dataclasses.dataclass(frozen=True)
class Plan:
  """Shapes of every part, by names of `SPECS`.

  Attributes:
    specs: by name.
    effort: how long each figure is measured.
    matmul, copy_bytes: sizes of the ceilings.
    dense: dense mode against cuDNN.
    lists: (shape, density) of sorted random lists, in order of value.
    unsorted: (shape, density) again with lists in random order.
    tiles: (block_q, block_kv) at `tiles_at`, density 10 %.
    tiles_at: that shape.
    window: the shape of the 3-D window; `window_tile` tokens, `window_extent` tiles, refined by `window_refine`.
    bands: composition by row prefix.
    launches: shapes of one launch against three; those in `concurrent` also with concurrent command buffers.
    fused: shapes of "freqformer"; fixed: of "fixed4k".
    backward: (shape, density) of backward passes of lists.
    backward_dense, fused_backward: shapes of dense backward passes and of FreqFormer's.
    around: shapes of what FreqFormer does around attention.
    rest: (shape, density) measured last: other head counts, ragged grids, other densities for the plot.
    forms: of the forward.
    one_head_above: dense attention of more tokens is measured with one head and scaled.
    oracle_rows: sampled rows of each error.
  """

  specs: Mapping[str, AttentionSpec]
  effort: Effort = Effort()
  matmul: int = 8192
  copy_bytes: int = 1 << 31
  dense: tuple[str, ...] = ("a_64k", "a_16k", "a_128k")
  lists: tuple[tuple[str, float], ...] = (
    ("a_128k", 0.1),
    ("a_512k", 0.05),
    ("a_64k", 0.1),
    ("a_64k", 0.05),
    ("a_128k", 0.05),
    ("a_512k", 0.1),
  )
  unsorted: tuple[tuple[str, float], ...] = (("a_128k", 0.1), ("a_512k", 0.05))
  tiles: tuple[tuple[int, int], ...] = ((64, 64), (128, 64), (64, 128))
  tiles_at: str = "a_128k"
  window: str = "b_115k"
  window_tile: tuple[int, int, int] = (6, 8, 8)
  window_extent: tuple[int, int, int] = (3, 3, 3)
  window_refine: int = 3
  bands: Composition = Composition()
  launches: tuple[str, ...] = ("a_64k", "a_128k", "a_1m")
  concurrent: tuple[str, ...] = ("a_64k", "a_128k")
  fused: tuple[str, ...] = ("a_128k", "a_64k", "a_1m", "a_256k", "c_64k", "d_75k")
  fixed: tuple[str, ...] = ("a_1m", "a_128k", "a_64k")
  backward: tuple[tuple[str, float], ...] = (("a_64k", 0.1), ("a_128k", 0.1), ("a_128k", 0.05))
  backward_dense: tuple[str, ...] = ("a_16k", "a_64k")
  fused_backward: tuple[str, ...] = ("a_128k",)
  around: tuple[str, ...] = ("a_128k",)
  rest: tuple[tuple[str, float], ...] = (
    ("d_75k", 0.1),
    ("d_32k", 0.1),
    ("c_64k", 0.1),
    ("a_64k", 0.02),
    ("a_64k", 0.2),
    ("a_64k", 0.4),
    ("a_256k", 0.05),
    ("a_256k", 0.1),
  )
  forms: tuple[Form, ...] = (
    Form("stage_by_stage_dense", "a_64k", _BESIDE),
    Form("stage_by_stage_d05", "a_64k", _BESIDE, 0.05),
    Form("one_tile_d10_64x64", "a_128k", _ALONE, 0.1, 64),
  )
  one_head_above: int = 262144
  oracle_rows: int = 64

  def spec(self, name: str) -> AttentionSpec:
    return self.specs[name]


FULL = Plan(SPECS)
_TINY_GRIDS = {
  "a_16k": (4, 4, 8),
  "a_64k": (4, 8, 8),
  "a_128k": (8, 8, 8),
  "a_256k": (8, 8, 8),
  "a_512k": (8, 8, 16),
  "a_1m": (8, 16, 16),
  "b_115k": (12, 12, 16),
  "c_64k": (4, 8, 8),
  "d_75k": (5, 7, 9),
  "d_32k": (3, 5, 7),
}


def _tiny(name: str) -> AttentionSpec:
  heads = 5 if name == "c_64k" else 4
  return AttentionSpec(name, _TINY_GRIDS[name], heads, 16, keys=16, block=16)


# Every row of the full plan on tiles of 16 rows: checks the driver, never the speed.
REHEARSAL = dataclasses.replace(
  FULL,
  specs={name: _tiny(name) for name in _TINY_GRIDS},
  effort=Effort(samples=2, slow_samples=1, chain_s=0.0, turns=1),
  matmul=64,
  copy_bytes=1 << 12,
  tiles=((8, 8), (16, 8), (8, 16)),
  forms=tuple(dataclasses.replace(form, block=form.block and 8) for form in FULL.forms),
  window_tile=(3, 4, 4),
  one_head_above=1024,
  oracle_rows=8,
)
# A few rows of every part, for the test suite.
SHORT = dataclasses.replace(
  REHEARSAL,
  dense=("a_64k",),
  lists=(("a_64k", 0.1),),
  unsorted=(("a_64k", 0.1),),
  tiles=((16, 8),),
  tiles_at="a_64k",
  launches=("a_64k",),
  concurrent=("a_64k",),
  fused=("a_64k",),
  fixed=("a_1m",),
  backward=(("a_64k", 0.1),),
  backward_dense=("a_16k",),
  fused_backward=("a_64k",),
  around=("a_64k",),
  rest=(("d_32k", 0.1),),
  forms=(Form("stage_by_stage_d05", "a_64k", _BESIDE, 0.05),),
)
