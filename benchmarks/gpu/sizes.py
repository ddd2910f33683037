"""Sizes at which the GPU benchmark measures, and the tiny ones at which a CPU can rehearse it."""

import dataclasses
from collections.abc import Mapping

from benchmarks.arg_specs import SPECS, AttentionSpec
from benchmarks.gpu.timing import Effort


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Shapes and effort of a run.

  Attributes:
    matmul: rows and columns of the ceiling's matrices.
    copy_bytes: size of the ceiling's copy.
    shrink: 64 and 128-row tiles of variants are divided by it.
    window_tile: tokens of a window's tile, three tiles of the kernel.
    one_head_above: dense attention of more tokens is measured with one head and scaled.
    oracle_rows: sampled rows of each error.
  """

  specs: Mapping[str, AttentionSpec]
  effort: Effort = Effort()
  matmul: int = 8192
  copy_bytes: int = 1 << 31
  shrink: int = 1
  window_tile: tuple[int, int, int] = (6, 8, 8)
  one_head_above: int = 262144
  oracle_rows: int = 64


FULL = Sizes(SPECS)
_TINY_GRIDS = {
  "a_16k": (4, 4, 8),
  "a_64k": (4, 8, 8),
  "a_128k": (8, 8, 8),
  "a_256k": (8, 8, 8),
  "a_512k": (8, 8, 16),
  "a_1m": (8, 8, 16),
  "b_115k": (9, 12, 12),
  "c_64k": (4, 8, 8),
  "d_75k": (5, 7, 9),
  "d_32k": (3, 5, 7),
}


def _tiny(name: str) -> AttentionSpec:
  heads = 5 if name == "c_64k" else 4
  return AttentionSpec(name, _TINY_GRIDS[name], heads, 16, keys=16, block=16)


# Every row of the full plan on tiles of 16 rows: this checks the program, never the speed.
TINY = Sizes(
  specs={name: _tiny(name) for name in _TINY_GRIDS},
  effort=Effort(samples=2, slow_samples=1, chain_s=0.0, turns=1),
  matmul=64,
  copy_bytes=1 << 12,
  shrink=8,
  window_tile=(3, 4, 4),
  one_head_above=512,
  oracle_rows=8,
)
