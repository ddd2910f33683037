"""The GPU benchmark's plan: every row that is measured, by name and in order of value."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from benchmarks.gpu import check, masks, ops
from benchmarks.gpu.attempt import Job
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.masks import Composition
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.slot_steps import GUARDS

BANDS = Composition()
# As many keys for a mid head as its window has, whatever the number of tokens.
FIXED_BUDGET = Composition(mid_density=0.0)
# Parts that are measured only if they are named: checks are not timed, forms answer one question.
ON_REQUEST = ("checks", "forms")


@dataclasses.dataclass(frozen=True)
class Case:
  """One row to measure; `measure` returns its fields, `part` is a key of `GUARDS`."""

  name: str
  part: str
  measure: Callable[[Bench], dict]

  def job(self, bench: Bench) -> Job:
    """Returns the row's job, which may take as long as its part's guard."""
    return Job(self.name, functools.partial(self.measure, bench), GUARDS[self.part])


def cases(sizes: Sizes) -> list[Case]:
  """Returns every row, in order of value; the names are the same at all sizes."""
  found: list[Case] = []
  spec = sizes.specs

  def add(part: str, name: str, method: Callable, *args):
    """Adds a measurement by a method of `Bench`, or by a function of one."""
    found.append(Case(name, part, lambda bench: method(bench, *args)))

  def add_lists(part: str, shape: str, density: float, ordered: bool = True):
    """Random lists of square tiles."""
    name = f"lists_d{round(100 * density):02d}{'' if ordered else '_unsorted'}/{shape}"
    add(part, name, Bench.forward, masks.random_lists, spec[shape], density, ordered)

  def add_fused(shape: str):
    """All bands of FreqFormer in one call, mid at 5 %."""
    add("freqformer", f"freqformer/{shape}", Bench.forward, masks.fused, spec[shape], BANDS)

  def add_launches(shape: str, concurrent: bool):
    name = f"fused_over_separate/{shape}"
    add("launches", name, Bench.launches, spec[shape], BANDS, concurrent)

  def small_tiles(block_q: int, block_kv: int) -> tuple:
    """Random lists of tiles of other sizes: `masks.rectangular` and its arguments."""
    blocks = (block_q // sizes.shrink, block_kv // sizes.shrink)
    return masks.rectangular, spec["a_128k"], *blocks, 0.1

  for name, measure in check.checks(small=sizes.shrink > 1).items():
    add("checks", name, measure)

  # The rates that nothing on this device beats.
  add("ceilings", "ceiling/matmul", ops.matmul)
  add("ceilings", "ceiling/copy", ops.copy)

  # The same kernel without lists, in turns with cuDNN: the unit of "retained".
  for shape in ("a_64k", "a_16k", "a_128k"):
    add("dense_mode", f"dense/{shape}", Bench.dense_mode, spec[shape])

  of_value = (("a_128k", 0.1), ("a_512k", 0.05), ("a_64k", 0.1), ("a_64k", 0.05))
  for shape, density in (*of_value, ("a_128k", 0.05), ("a_512k", 0.1)):
    add_lists("lists", shape, density)
  add_lists("list_variants", "a_128k", 0.1, ordered=False)
  add_lists("list_variants", "a_512k", 0.05, ordered=False)
  for blocks in ((64, 64), (128, 64), (64, 128)):
    name = f"lists_d10_{blocks[0]}x{blocks[1]}/a_128k"
    add("list_variants", name, Bench.forward, *small_tiles(*blocks))

  # The smallest shape, where one launch gains most; the others come later.
  add_launches("a_64k", concurrent=True)

  for shape, density in (("a_64k", 0.1), ("a_128k", 0.1), ("a_128k", 0.05)):
    name = f"backward_lists_d{round(100 * density):02d}/{shape}"
    add("backward", name, Bench.backward, masks.random_lists, spec[shape], density)
  for shape in ("a_16k", "a_64k"):
    add("backward", f"backward_dense/{shape}", Bench.backward, masks.dense, spec[shape])

  # The setting of STA: 18x24x24 tokens around each tile of a 30x48x80 grid, 24 heads.
  window = (masks.window, spec["b_115k"], sizes.window_tile)
  add("window", "window/b_115k", Bench.forward, *window)

  for shape in ("a_128k", "a_64k", "a_1m"):
    add_fused(shape)
  for shape in ("a_1m", "a_128k", "a_64k"):
    fixed = (masks.fused, spec[shape], FIXED_BUDGET)
    add("freqformer", f"fixed4k/{shape}", Bench.forward, *fixed)
  for shape in ("a_256k", "c_64k", "d_75k"):
    add_fused(shape)

  # The other kernels of a layer.
  add("around", "around/a_128k", ops.around, spec["a_128k"], BANDS)
  add("linear", "linear/a_128k", ops.linear, spec["a_128k"])
  add("search", "search/a_128k", ops.search, spec["a_128k"])

  add_launches("a_128k", concurrent=True)
  add_launches("a_1m", concurrent=False)

  add("torch", "torch_rows", Bench.torch)

  # FreqFormer's backward, a fixed budget of random keys, other head counts, ragged grids, and
  # densities that complete the plot.
  add("rest", "backward_freqformer/a_128k", Bench.backward, masks.fused, spec["a_128k"], BANDS)
  density = 32 / spec["a_1m"].layout.tiles  # as many keys as the window of `BANDS` has
  add("rest", "lists_4k/a_1m", Bench.forward, masks.random_lists, spec["a_1m"], density)
  for shape in ("d_75k", "d_32k", "c_64k"):
    add_lists("rest", shape, 0.1)
  for density in (0.02, 0.2, 0.4):
    add_lists("rest", "a_64k", density)
  for density in (0.05, 0.1):
    add_lists("rest", "a_256k", density)

  # The forward as it is configured and otherwise, in turns: the worth of a choice.
  one_by_one = "scores_ahead=False"
  alone = "tiles_per_block=1, compute_registers=0, memory_registers=0"
  dense = (masks.dense, spec["a_64k"])
  lists = (masks.random_lists, spec["a_64k"], 0.05)
  for name, changes, problem in (
    ("by_lane_dense/a_64k", "by_lane=True", dense),
    ("stage_by_stage_dense/a_64k", one_by_one, dense),
    ("stage_by_stage_d05/a_64k", one_by_one, lists),
    ("one_tile_d10_64x64/a_128k", alone, small_tiles(64, 64)),
  ):
    add("forms", f"form_{name}", Bench.form, changes, *problem)
  return found


def chosen(sizes: Sizes, parts: Sequence[str] = ()) -> list[Case]:
  """Returns the cases of some parts, in the order asked for; no parts: all but `ON_REQUEST`.

  Raises:
    ValueError: for a name that no part has.
  """
  found = cases(sizes)
  known = list(dict.fromkeys(case.part for case in found))
  if unknown := [part for part in parts if part not in known]:
    raise ValueError(f"--parts has no {', '.join(unknown)}; parts are {', '.join(known)}.")
  if not parts:
    return [case for case in found if case.part not in ON_REQUEST]
  return [case for part in parts for case in found if case.part == part]
