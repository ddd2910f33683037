"""The masks of a sampling run: recorded while it runs, written as one .npz and pictures.

  python eval.py --workdir=runs/demo --method="block_topk(coarse=none)" --export_masks=masks

A mask is kept once however many steps, layers or heads share it, as bits: which query tile lists which key tile. Of a batch the
first sample is recorded (under guidance its conditional half, which decides for both).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from freqformer.kernels.block_sparse.table import BlockMask, from_tiles

_PANEL = 72  # pixels of one head's mask, at most


def realised_density(auxes: Sequence, sample: int = 0) -> np.ndarray:
  """Density of every step, layer and head of one sample, float32 `[steps, layers, heads]`.

  Args:
    auxes: per step the aux of `VideoDiT` (one dict per run of layers), as `sampling.sample` returns them.
  """

  def step(aux):
    return np.concatenate([np.asarray(run["density"])[:, sample] for run in aux])

  return np.stack([step(aux) for aux in auxes]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RunMasks:
  """Masks of one sample over a run.

  Attributes:
    tables: distinct masks, as tables for one sample: lists over `[1, heads or 1, q_tiles, ...]`, NumPy.
    index: int32 `[steps, layers]`, which of them ran.
    density: float32 `[steps, layers, heads]`, as the method reported it.
  """

  tables: tuple[BlockMask, ...]
  index: np.ndarray
  density: np.ndarray

  def mask(self, step: int, layer: int) -> BlockMask:
    """The table that one layer ran at one step."""
    return self.tables[self.index[step, layer]]

  def save(self, folder, pictures: int = 4) -> pathlib.Path:
    """Writes masks.npz, density.png and a picture of up to `pictures` steps whose masks differ from the step before."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("masks_step_*.png"):  # of another run: its steps need not be this one's
      old.unlink()
    arrays = {"index": self.index, "density": self.density}
    for i, mask in enumerate(self.tables):
      arrays[f"tiles_{i}"] = np.packbits(mask.to_tiles()[0], axis=-1)
      arrays[f"kv_len_{i}"] = mask.kv_len
      arrays[f"blocks_{i}"] = np.array([mask.block_q, mask.block_kv], np.int32)
    np.savez_compressed(folder / "masks.npz", **arrays)
    changes = [
      s for s in range(len(self.index)) if s == 0 or (self.index[s] != self.index[s - 1]).any()
    ]
    chosen = np.unique(
      np.linspace(0, len(changes) - 1, min(pictures, len(changes))).round().astype(int)
    )
    for step in (changes[i] for i in chosen):
      self.picture(step).savefig(folder / f"masks_step_{step:03d}.png")
    density_picture(self.density).savefig(folder / "density.png")
    return folder

  def picture(self, step: int) -> Figure:
    """Layers from top to bottom, heads from left to right; in a panel query tiles go down, key tiles right, dark is listed."""
    rows = [
      [_panel(tiles) for tiles in self.mask(step, layer).to_tiles()[0]]
      for layer in range(self.index.shape[1])
    ]
    height, width = (max(p.shape[axis] for row in rows for p in row) + 4 for axis in (0, 1))
    canvas = np.full((height * len(rows), width * max(map(len, rows)), 3), (0.8, 0.85, 1.0))
    for i, row in enumerate(rows):
      for j, panel in enumerate(row):
        y, x = i * height + 2, j * width + 2
        canvas[y : y + panel.shape[0], x : x + panel.shape[1]] = 1 - panel[..., None]
    heads = max(map(len, rows))
    shared = "; one panel in a row: all heads" * any(len(row) == 1 for row in rows)
    size = (
      max(3.6, 1.2 + canvas.shape[1] / 80),
      max(2.0, 1.2 + canvas.shape[0] / 80),
    )  # the title needs 3.6 inches
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_yticks((np.arange(len(rows)) + 0.5) * height, range(len(rows)))
    axis.set_xticks((np.arange(heads) + 0.5) * width, range(heads) if heads > 1 else ["all"])
    axis.set_title(
      f"step {step}: query tiles down, key tiles right,\ndark is listed{shared}", fontsize=9
    )
    axis.set(xlabel="head", ylabel="layer")
    return figure


def load_masks(path) -> RunMasks:
  """What `RunMasks.save` wrote; `path` names masks.npz."""
  with np.load(path) as data:
    tables = []
    while (i := len(tables)) <= data["index"].max():
      tiles = np.unpackbits(data[f"tiles_{i}"], axis=-1, count=len(data[f"kv_len_{i}"])).astype(
        bool
      )
      tables.append(from_tiles(tiles[None], data[f"kv_len_{i}"], *map(int, data[f"blocks_{i}"])))
    return RunMasks(tuple(tables), data["index"], data["density"])


def density_picture(density: np.ndarray) -> Figure:
  """Density `[steps, layers, heads]`, heads averaged: steps to the right, layers down."""
  figure = Figure(figsize=(6, 3.2), dpi=100, layout="constrained")
  axis = figure.add_subplot()
  image = axis.imshow(
    density.mean(-1).T, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
  )
  axis.set(xlabel="sampling step", ylabel="layer", title="density: scored pairs / n²")
  for ticks in (axis.xaxis, axis.yaxis):
    ticks.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  figure.colorbar(image, label="density, mean over heads")
  return figure


class MaskRecorder:
  """Collects masks while a run goes on, so that no more than one step's tables are in memory."""

  def __init__(self):
    self._numbers, self._tables, self._index, self._density = {}, [], [], []

  def wrap(self, step: Callable, steps: int) -> Callable:
    """`step` of `sampling.make_step(..., want_masks=True)`, recorded for its first `steps` calls: one batch."""

    def recorded(*args):
      x, state, aux = step(*args)
      if len(self._index) < steps:
        self.add(aux)
      return x, state, [{k: v for k, v in run.items() if k != "mask"} for run in aux]

    return recorded

  def add(self, aux: Sequence[dict]):
    """One step's aux, with masks."""
    numbers = []
    for run in aux:
      mask = jax.device_get(run["mask"])
      numbers += [
        self._number(jax.tree.map(lambda leaf, i=layer: leaf[i], mask))
        for layer in range(len(mask.kv_counts))
      ]
    self._index.append(numbers)
    self._density.append(realised_density([aux])[0])

  def masks(self) -> RunMasks:
    """What was recorded.

    Raises:
      ValueError: if nothing was.
    """
    if not self._index:
      raise ValueError("no step was recorded; wrap the step that runs, made with want_masks=True.")
    return RunMasks(tuple(self._tables), np.asarray(self._index, np.int32), np.stack(self._density))

  def _number(self, mask: BlockMask) -> int:
    """The number of a layer's table, a new one if it has not been seen; of its samples the first is kept."""
    kv_len = mask.kv_len if mask.kv_len.ndim == 1 else mask.kv_len[0]
    own = dataclasses.replace(
      mask, kv_indices=mask.kv_indices[:1], kv_counts=mask.kv_counts[:1], kv_len=kv_len
    )
    tiles = own.to_tiles()
    if (tiles == tiles[:, :1]).all():
      tiles = tiles[:, :1]
    key = (tiles.shape, np.packbits(tiles).tobytes(), kv_len.tobytes(), mask.block_q, mask.block_kv)
    if key not in self._numbers:
      self._numbers[key] = len(self._tables)
      self._tables.append(from_tiles(tiles, kv_len, mask.block_q, mask.block_kv))
    return self._numbers[key]


def _panel(tiles: np.ndarray) -> np.ndarray:
  """A mask `[q_tiles, kv_tiles]` as darkness, shrunk to at most `_PANEL` pixels a side or enlarged towards it."""
  step = -(-max(tiles.shape) // _PANEL)
  padded = np.pad(tiles.astype(np.float32), [(0, -s % step) for s in tiles.shape])
  cells = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step).mean((1, 3))
  grow = max(1, _PANEL // max(cells.shape))
  return np.repeat(np.repeat(cells, grow, 0), grow, 1)
