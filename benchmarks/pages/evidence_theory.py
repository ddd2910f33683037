"""Theory's excess errors for the study's arms, with the very tables that they attend by.

Rows go to results/study_theory.json, one per arm whose lists do not depend on the clip. They are
computed, nothing is measured.
"""

import math

import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask

from benchmarks.trained.study import BUCKETS, SIZES, STAGES, Trial
from freqformer.analysis.contexts import Table
from freqformer.analysis.gaussian import excess
from freqformer.data.fields import FieldsConfig, spectra
from freqformer.grid.layout import TileLayout
from freqformer.grid.pyramid import level_layouts
from freqformer.grid.spectrum import level_mass
from freqformer.methods.base import Method
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.train.experiment import Experiment, experiment

SCREEN = "screen"
# freqformer_fixed has a low and a local head; a mid head's lists depend on the clip.
ARMS = {
  SCREEN: ("octaves", "window", "low4", "low2", "freqformer_fixed"),
  "plane": ("octaves4_prior", "low8_prior", "window"),
} | {f"scale_{tokens}": ("octaves_prior", "window") for tokens in SIZES}
_PYRAMIDS = {SCREEN: "octaves", "plane": "octaves4_prior"}
_TOKEN = (1, 1, 1)
# Cells that a window of 3 tiles of 2 cells reaches to every side at least.
_REACH = 2


def times(stage: str = SCREEN) -> list[float]:
  """Returns the middles of the parts of t that a stage's rows are judged in."""
  low, high = STAGES[stage].overrides["train.time_range"]
  return (low + (high - low) * (np.arange(BUCKETS) + 0.5) / BUCKETS).tolist()


def rows() -> list[dict]:
  """Returns a row per arm of `ARMS`, and the Wiener kernel's mass per level of the pyramids."""
  found = [_row(arm, stage) for stage, arms in ARMS.items() for arm in arms]
  return found + [_mass(arm, stage) for stage, arm in _PYRAMIDS.items()]


def _mass(arm: str, stage: str) -> dict:
  exp = experiment_of(arm, stage)
  levels = exp.model.attention.named("octaves").levels
  places = times(stage)
  mass = np.mean([level_mass(s, levels, places, _REACH) for s in spectra(exp.data)], 0)
  return _named(stage, "wiener mass") | {"times": places, "mass": _lists(mass)}


def _named(stage: str, arm: str) -> dict:
  return {"name": f"{stage}/{arm}", "stage": stage, "arm": arm, "measured": False}


def _row(arm: str, stage: str) -> dict:
  """Returns keys and percent of excess of an arm, the mean over the clips' velocities.

  Velocities that are mirror images or permutations of each other have the same spectrum up to axes,
  and stand for each other.
  """
  exp = experiment_of(arm, stage)
  ((_, method),) = exp.model.runs()
  context = context_of(method, exp.model.layout(exp.latent_shape))
  total = np.zeros(BUCKETS)
  for spectrum, weight in _kinds(exp.data):
    found = excess(spectrum, context, times(stage))
    total += weight * np.maximum(found.percent, 0)
  return _named(stage, arm) | {"keys": found.keys, "times": times(stage), "excess": _lists(total)}


def _kinds(data: FieldsConfig) -> list[tuple[np.ndarray, float]]:
  """Returns a spectrum for each kind of velocity and the share of velocities of its kind."""
  every = spectra(data)
  kinds = [tuple(sorted(map(abs, velocity))) for velocity in data.velocities]
  return [
    (every[kinds.index(kind)], kinds.count(kind) / len(kinds)) for kind in dict.fromkeys(kinds)
  ]


def context_of(method: Method, layout: TileLayout) -> Table:
  """Returns what a query sees through a method's static table.

  Raises:
    ValueError: for a method whose lists depend on the clip.
  """
  if isinstance(method, SlidingTile):
    return Table(method.mask(layout), ((layout, _TOKEN),))
  if isinstance(method, Octaves) and not method.mid_tiles:
    layouts = level_layouts(layout, method.levels, method.basis, method.factor)
    cells = [(method.factor**level,) * 3 for level in range(method.levels)]
    levels = tuple(zip(layouts, cells, strict=True))[::-1]
    return Table(method.tables(layout).mask, levels)
  if isinstance(method, FreqFormer) and not isinstance(method.allocation, str):
    if method.allocation[1] == 0:
      return _low_and_high(method, layout)
  raise ValueError(f"{type(method).__name__} has lists that depend on the clip: no static table.")


def _low_and_high(method: FreqFormer, layout: TileLayout) -> Table:
  """Returns what a low and a high head see together; a coarse token is the mean of its cell."""
  tables = method.tables(layout)
  masks = (tables.low, tables.high)
  longest = max(mask.max_kv for mask in masks)
  lists = []
  for mask in masks:
    own = np.asarray(mask.indices())
    lists.append(np.pad(own, ((0, 0), (0, 0), (0, 0), (0, longest - own.shape[-1]))))
  counts = np.concatenate([mask.kv_counts for mask in masks], 1)
  joined = BlockMask(
    np.concatenate(lists, 1), counts, tables.high.kv_len, None, layout.block, layout.block
  )
  cell = tuple(round(1 / share) for share in method.basis.low)
  grid = tuple(n // c for n, c in zip(layout.grid, cell, strict=True))
  if math.prod(grid) != tables.spectral.n_coarse:
    raise ValueError(f"cells of {cell} tokens do not make {tables.spectral.n_coarse} coarse ones.")
  return Table(joined, ((TileLayout.fit(grid, layout.block), cell), (layout, _TOKEN)))


def experiment_of(arm: str, stage: str = SCREEN) -> Experiment:
  """Returns the configuration of an arm's runs."""
  return experiment(Trial(STAGES[stage], arm, 0).config())


def _lists(values: np.ndarray):
  """Returns lists of numbers with six digits."""
  if values.ndim > 1:
    return [_lists(part) for part in values]
  return [float(f"{x:.6g}") for x in values]
