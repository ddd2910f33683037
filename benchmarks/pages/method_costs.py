"""What every method's defaults cost on published video grids: exact counts from the tables that run, no timing.

  python -m benchmarks.pages.method_costs       # half a minute; rows go to results/method_costs.json

One layer of 24 heads of 128 channels, forward, one sample, the step that most of a sampling run does; tiles of at most 128
rows except where the method has its own (sliding_tile: 6 x 8 x 8 = 384 rows; radial: 1 x 8 x 16, and once more on the layout's
choice of 128 rows). A routed method is counted at its router's prior.
"""

import math

import jax
from absl import app

from benchmarks import rows
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS, method_class

HEADS, HEAD_DIM, STEPS = 24, 128, 50
# Latent tokens (t, y, x): Wan 2.1 at 480p and 720p, HunyuanVideo at 117 frames of 768 x 1280 and 509 frames of 720p.
GRIDS = ((21, 30, 52), (21, 45, 80), (30, 48, 80), (128, 45, 80))
OWN_TILES = {"sliding_tile": (6, 8, 8), "radial": (1, 8, 16)}
_PLAIN = "_on_layout_tiles"  # without the method's own tiles
NAMES = (*METHODS, f"radial{_PLAIN}")


def cost_row(name: str, grid) -> dict:
  """Density and FLOPs of a method's defaults on one grid."""
  tile = OWN_TILES.get(name)
  layout = TileLayout.fit(grid, math.prod(tile) if tile else 128, tile)
  method = method_class(name.removesuffix(_PLAIN))()
  cost = method.phase_cost(method.phase(STEPS - 1, STEPS), layout, HEADS, HEAD_DIM)
  density = cost.attention_flops / (4.0 * layout.n**2 * HEADS * HEAD_DIM)
  fields = dict(grid=grid, tokens=layout.n, tile=layout.tile, attention_flops=cost.attention_flops)
  label = f"{name}_{'x'.join(map(str, grid))}"
  return rows.goal_row(
    label, density, None, unit="", measured=False, linear_flops=cost.linear_flops, **fields
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  jax.config.update("jax_platforms", "cpu")
  command = "python -m benchmarks.pages.method_costs"
  context = rows.context(command)
  found = [cost_row(name, grid) for grid in GRIDS for name in NAMES]
  rows.write_rows("method_costs", [row | context for row in found], command)
  print(
    f"{'method':<24}"
    + "".join(f"{'x'.join(map(str, grid)):>20}" for grid in GRIDS)
    + "   density, attention TFLOP a layer"
  )
  for i, name in enumerate(NAMES):
    cells = found[i :: len(NAMES)]
    print(
      f"{name:<24}"
      + "".join(f"{row['value']:>11.4f} {row['attention_flops'] / 1e12:>8.1f}" for row in cells)
    )


if __name__ == "__main__":
  app.run(main)
