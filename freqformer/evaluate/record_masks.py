"""Records the masks of a sampling run, and writes them as one .npz with pictures.

  python eval.py --workdir=runs/demo --method="block_topk(coarse=none)" --export_masks=masks

A mask is kept once, however many steps, layers or heads share it. Of a batch the first sample is
recorded (under guidance its conditional half, which decides for both).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image

from freqformer.kernels.block_sparse.table import BlockMask, from_tiles

_PANEL = 72  # pixels of one head's mask
_MARGIN = 2  # pixels around a panel
_BACKGROUND = (0.8, 0.85, 1.0)  # red, green, blue


def realised_density(auxes: Sequence) -> np.ndarray:
  """Returns the first sample's density, float32 `[steps, layers, heads]`, from each step's aux."""
  steps = [np.concatenate([np.asarray(run["density"])[:, 0] for run in aux]) for aux in auxes]
  return np.stack(steps).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RunMasks:
  """The masks of one sample over a run.

  Attributes:
    tables: distinct masks, as tables for one sample: NumPy, lists over `[1, heads or 1, q_tiles,
      ...]`.
    index: int32 `[steps, layers]`, number of the table that ran.
    density: float32 `[steps, layers, heads]`, as the method reported it.
  """

  tables: tuple[BlockMask, ...]
  index: np.ndarray
  density: np.ndarray

  def save(self, folder, pictures: int = 4):
    """Writes masks.npz, density.png and pictures of some steps; an earlier run's pictures go.

    Drawn are at most `pictures` steps whose masks differ from the step before, evenly spaced.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("masks_step_*.png"):
      old.unlink()
    arrays = {"index": self.index, "density": self.density}
    for i, mask in enumerate(self.tables):
      arrays[f"tiles_{i}"] = np.packbits(mask.to_tiles()[0], axis=-1)
      arrays[f"kv_len_{i}"] = mask.kv_len
      arrays[f"blocks_{i}"] = np.array([mask.block_q, mask.block_kv], np.int32)
    np.savez_compressed(folder / "masks.npz", **arrays)
    changed = (self.index[1:] != self.index[:-1]).any(1)
    changes = np.flatnonzero(np.concatenate([[True], changed]))
    places = np.linspace(0, len(changes) - 1, min(pictures, len(changes))).round().astype(int)
    for step in np.unique(changes[places]):
      self.picture(step).savefig(folder / f"masks_step_{step:03d}.png")
    density_picture(self.density).savefig(folder / "density.png")

  def picture(self, step: int) -> Figure:
    """Draws the masks of a step: layers from top to bottom, heads from left to right."""
    rows = []
    for number in self.index[step]:
      masks = self.tables[number].to_tiles()[0].astype(np.float32)
      rows.append([Image.fromarray(mask).resize((_PANEL, _PANEL), Image.BOX) for mask in masks])
    heads = max(map(len, rows))
    side = _PANEL + 2 * _MARGIN
    canvas = np.full((len(rows), side, heads, side, 3), _BACKGROUND)
    for i, row in enumerate(rows):
      for j, panel in enumerate(row):
        canvas[i, _MARGIN:-_MARGIN, j, _MARGIN:-_MARGIN] = 1 - np.asarray(panel)[..., None]
    canvas = canvas.reshape(len(rows) * side, heads * side, 3)
    # Inches; the title needs 3.6 of them.
    size = (max(3.6, 1.2 + canvas.shape[1] / 80), max(2.0, 1.2 + canvas.shape[0] / 80))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_yticks((np.arange(len(rows)) + 0.5) * side, range(len(rows)))
    axis.set_xticks((np.arange(heads) + 0.5) * side, range(heads) if heads > 1 else ["all"])
    shared = "; one panel in a row: all heads" if any(len(row) == 1 for row in rows) else ""
    title = f"step {step}: query tiles down, key tiles right,\ndark is listed{shared}"
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="head", ylabel="layer")
    return figure


def load_masks(path) -> RunMasks:
  """Reads masks.npz, as `RunMasks.save` wrote it."""
  with np.load(path) as data:
    tables = []
    for i in range(data["index"].max() + 1):
      kv_len = data[f"kv_len_{i}"]
      tiles = np.unpackbits(data[f"tiles_{i}"], axis=-1, count=len(kv_len)).astype(bool)
      tables.append(from_tiles(tiles[None], kv_len, *map(int, data[f"blocks_{i}"])))
    return RunMasks(tuple(tables), data["index"], data["density"])


def density_picture(density: np.ndarray, title: str = "density: scored pairs / n²") -> Figure:
  """Draws density `[steps, layers, heads]`: steps to the right, layers and their heads down."""
  steps, layers, heads = density.shape
  # Inches; the axis's label needs 2 of them.
  size = (6.5, min(6, max(2, 1.3 + 0.09 * layers * heads)))
  figure = Figure(figsize=size, dpi=100, layout="constrained")
  axis = figure.add_subplot()
  image = heat(axis, density.reshape(steps, -1).T, heads)
  axis.set_yticks(np.arange(layers) * heads, [f"{i}.0" for i in range(layers)])
  axis.set(xlabel="sampling step", title=title)
  axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  figure.colorbar(image, label="density")
  return figure


def heat(axis: Axes, values: np.ndarray, heads: int) -> AxesImage:
  """Draws `[layers * heads, columns]` of numbers in [0, 1], with a line between layers."""
  image = axis.imshow(
    values, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest"
  )
  rows, columns = values.shape
  axis.hlines(np.arange(heads, rows, heads) - 0.5, -0.5, columns - 0.5, color="white", lw=1)
  axis.set_ylabel("layer.head")
  return image


class MaskRecorder:
  """Collects masks while a run goes on: no more than one step's tables are in memory at once."""

  def __init__(self):
    self._numbers = {}  # number of each distinct table, by its content
    self._tables = []
    self._index = []
    self._density = []

  def wrap(self, step: Callable, steps: int) -> Callable:
    """Wraps a step of `sampling.make_step(..., want_masks=True)`; its first batch is recorded."""

    def recorded(*args):
      x, state, aux = step(*args)
      if len(self._index) < steps:
        self._add(aux)
      return x, state, [{k: v for k, v in run.items() if k != "mask"} for run in aux]

    return recorded

  def _add(self, aux: Sequence[dict]):
    """Records one step's aux, with masks."""
    numbers = []
    for run in aux:
      masks = jax.device_get(run["mask"])  # stacked over layers
      for layer in range(len(masks.kv_counts)):
        numbers.append(self._number(jax.tree.map(lambda leaf, i=layer: leaf[i], masks)))
    self._index.append(numbers)
    self._density.append(realised_density([aux])[0])

  def masks(self) -> RunMasks:
    """Returns what was recorded."""
    return RunMasks(tuple(self._tables), np.asarray(self._index, np.int32), np.stack(self._density))

  def _number(self, mask: BlockMask) -> int:
    """Returns the number of a layer's table, of whose samples the first is kept."""
    kv_len = mask.kv_len if mask.kv_len.ndim == 1 else mask.kv_len[0]
    tiles = mask.to_tiles()[:1]
    if (tiles == tiles[:, :1]).all():
      tiles = tiles[:, :1]  # all heads share one
    key = (tiles.shape, np.packbits(tiles).tobytes(), kv_len.tobytes(), mask.block_q, mask.block_kv)
    if key not in self._numbers:
      self._numbers[key] = len(self._tables)
      self._tables.append(from_tiles(tiles, kv_len, mask.block_q, mask.block_kv))
    return self._numbers[key]
