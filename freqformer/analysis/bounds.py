"""Error of each of FreqFormer's operators, head by head, next to its bound (docs/complexity.md).

  python -m freqformer.analysis.bounds --workdir=runs/complexity  # a run with freqformer

Row errors against bounds of the same row: dropped tiles of softmax mass e: 2 e max|v|; cell means
(haar): (exp(2 delta) - 1) max|v|, delta the largest difference of a pair's score and its cells',
or 2 max|v|; filter: the other bands' |P Y|^2, exactly. |Y - Y'|^2 splits over bands exactly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.tables.topk import block_topk, fixed_tiles, pool_tiles
from freqformer.tables.window import sliding_tile

BANDS = ("low", "mid", "high")
# Cells of two tokens per axis; the mid cut decides only how an error is split over bands.
CELL_MEANS = SpectralBasis("haar", (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))

# Error that float64 rounding may add to a row, in units of max|v|.
ROUNDING = 1e-9
# The transforms come from float32 programs: bands are orthogonal to about this share of |Y|.
# choice: ten times what was seen.
ORTHOGONAL = 1e-6


@dataclasses.dataclass(frozen=True)
class Head:
  """One head's normed and rotated q and k, its v and its coarse tokens; NumPy float64.

  Attributes:
    q, k, v: `[n_buffer, d]`.
    valid: bool `[n_buffer]`, False in padding rows.
    coarse_q, coarse_k, coarse_v: `[n_coarse, d]`, of one basis.
    operators: that basis on the layout.
  """

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  valid: np.ndarray
  coarse_q: np.ndarray
  coarse_k: np.ndarray
  coarse_v: np.ndarray
  operators: "Operators"

  @property
  def scale(self) -> float:
    """Factor of the scores."""
    return self.q.shape[-1] ** -0.5

  def scores(self) -> np.ndarray:
    """Scaled scores `[n_buffer, n_buffer]`, -inf at padding keys."""
    return np.where(self.valid, self.q @ self.k.T * self.scale, -np.inf)

  def largest_value(self) -> float:
    """max|v| over tokens."""
    return float(np.linalg.norm(self.v[self.valid], axis=-1).max())


@dataclasses.dataclass(frozen=True, eq=False)
class Operators:
  """The transforms of a small layout as float64 matrices, read off the code that runs.

  Attributes:
    low, box: P_low and P_low + P_mid, `[n_buffer, n_buffer]`; columns of padding rows are 0.
    lift: `[n_buffer, n_coarse]`.
    weight: s^2, the tokens that each coarse token stands for, `[n_coarse]`.
  """

  low: np.ndarray
  box: np.ndarray
  lift: np.ndarray
  weight: np.ndarray

  @classmethod
  @functools.lru_cache(maxsize=8)  # noqa: B019  a classmethod: the cache holds no instance
  def of(cls, basis: SpectralBasis, layout: TileLayout) -> "Operators":
    spectral = basis.fit(layout)
    rows = np.eye(layout.n_buffer, dtype=np.float32)[None]
    coarse = np.eye(spectral.n_coarse, dtype=np.float32)[None]
    run = jax.jit(lambda s, x, y: (s.project_low(x), s.project_box(x), s.lift(y)))
    low, box, lift = (np.asarray(x[0], np.float64) for x in run(spectral, rows, coarse))
    return cls(low, box, lift, weight=np.asarray(spectral.cell_weight, np.float64) ** 2)

  def bands(self, x: np.ndarray) -> np.ndarray:
    """P_low x, P_mid x, P_high x of `[n_buffer, d]`."""
    low = self.low @ x
    box = self.box @ x
    return np.stack([low, box - low, x - box])

  def cells(self) -> np.ndarray:
    """Coarse token whose cell each row lies in (haar), int `[n_buffer]`; 0 in padding rows."""
    return self.lift.argmax(-1)


def softmax(scores: np.ndarray) -> np.ndarray:
  """Softmax over the last axis; rows that see nothing come out 0."""
  top = scores.max(-1, keepdims=True)
  p = np.exp(scores - np.where(np.isfinite(top), top, 0))
  total = p.sum(-1, keepdims=True)
  return p / np.where(total > 0, total, 1)


# ---- the operators ------------------------------------------------------------


def dropped(head: Head, listed: np.ndarray) -> dict:
  """Measures attention over the pairs listed in bool `[n_buffer, n_buffer]` only."""
  scores = head.scores()
  p = softmax(scores)
  mass = np.where(listed, 0, p).sum(-1)
  difference = (p - softmax(np.where(listed, scores, -np.inf))) @ head.v
  return _result(head, difference, 2 * mass * head.largest_value())


def compressed(head: Head, bounded: bool) -> dict:
  """Measures lifted attention among coarse tokens; `bounded` if cells are sets of tokens (haar)."""
  operators = head.operators
  coarse = head.coarse_q @ head.coarse_k.T * head.scale
  scores = head.scores()
  lifted = operators.lift @ (softmax(coarse + np.log(operators.weight)) @ head.coarse_v)
  difference = softmax(scores) @ head.v - lifted
  if not bounded:
    return _result(head, difference, None)
  cell = operators.cells()
  with np.errstate(invalid="ignore"):
    delta = np.where(head.valid, np.abs(scores - coarse[np.ix_(cell, cell)]), 0).max(-1)
  # Two weighted means of v never differ by more than 2 max|v|, whatever the weights.
  bound = np.minimum(np.expm1(2 * delta), 2) * head.largest_value()
  return _result(head, difference, bound) | {"delta": float(delta[head.valid].max())}


def filtered(head: Head, band: int) -> dict:
  """Measures dense attention with one band kept: the error must be the other bands' norm."""
  y = np.where(head.valid[:, None], softmax(head.scores()) @ head.v, 0)
  parts = head.operators.bands(y)
  found = _result(head, y - parts[band], None)
  error = found["total"]
  bound = float(np.linalg.norm(np.delete(parts, band, 0)))
  ratio = error / bound if bound > 0 else float(error > 0)
  closest = {"row": None, "error": error, "bound": bound, "ratio": ratio}
  holds = abs(error - bound) <= ORTHOGONAL * float(np.linalg.norm(y))
  return found | {"exact": True, "error": error, "bound": bound, "closest": closest, "holds": holds}


def _result(head: Head, difference: np.ndarray, bound: np.ndarray | None) -> dict:
  """Sums up `Y - Y'` `[n_buffer, d]` and its bound `[n_buffer]` or None.

  `error`, `bound` are of the row of largest error, `closest` of that of largest error / bound,
  which `holds` if at most 1; `total` is the norm, `bands` its square's parts.
  """
  difference = np.where(head.valid[:, None], difference, 0)
  error = np.linalg.norm(difference, axis=-1)
  bands = np.square(head.operators.bands(difference)).sum((1, 2))
  worst = int(error.argmax())
  found = {
    "error": float(error[worst]),
    "total": float(np.linalg.norm(error)),
    "bands": bands.tolist(),
    "exact": False,
  }
  if bound is None:
    return found | {"bound": None, "closest": None, "holds": None}
  ratio = np.where(head.valid, error / (bound + ROUNDING * head.largest_value()), 0)
  at = int(ratio.argmax())
  closest = {
    "row": at,
    "error": float(error[at]),
    "bound": float(bound[at]),
    "ratio": float(ratio[at]),
  }
  return found | {"bound": float(bound[worst]), "closest": closest, "holds": closest["ratio"] <= 1}


# ---- all heads of a layer ------------------------------------------------------------


def measure(tensors: dict, layout: TileLayout, method, case: str, layer: int = 0) -> list[dict]:
  """Measures every operator on every head of one sample.

  Args:
    tensors: of `Probe`: `q`, `k` (normed and rotated) and `v` `[n_buffer, h, d]`, and under
      `coarse`, per basis name, the coarse (q, k, v), each `[n_coarse, h, d]`.
    method: a `FreqFormer`; its window, mid budget and basis are used.
    case, layer: name and number that the rows carry.

  Returns:
    One row per head and operator with `case`, `layer`, `head`, `kind` and the fields of `_result`;
    a filter's error and bound are those of the whole head. Rows of cell means add `delta`, the
    largest of any row.
  """
  arrays = layout.arrays()
  rows = []
  listed = {
    "mid: top tiles": _mid(tensors, arrays, method),
    "high: window": sliding_tile(layout, method.window, method.border, method.deal),
  }
  listed = {name: np.asarray(mask.to_dense())[0] for name, mask in listed.items()}
  for h in range(tensors["q"].shape[1]):
    found = {}
    for name, basis in bases(method).items():
      head = _head(tensors, arrays, h, name, Operators.of(basis, layout))
      found[f"low: {name}"] = compressed(head, basis == CELL_MEANS)
      if basis == CELL_MEANS:
        continue
      for kind, pairs in listed.items():
        found[kind] = dropped(head, pairs[h % len(pairs)])
      for i, band in enumerate(BANDS):
        found[f"filter: {band}"] = filtered(head, i)
    rows += [
      {"case": case, "layer": layer, "head": h, "kind": kind, **result}
      for kind, result in found.items()
    ]
  return rows


def bases(method) -> dict[str, SpectralBasis]:
  """Names cell means, which have a bound, and the method's own basis, which has none."""
  return {"cell means": CELL_MEANS, method.basis.kind: method.basis}


def _mid(tensors, arrays, method) -> BlockMask:
  q, k = (pool_tiles(jnp.asarray(tensors[n], jnp.float32)[None], arrays) for n in "qk")
  fixed = fixed_tiles(arrays.layout, method.sink, method.anchors)
  return block_topk(q, k, method.mid_tiles, fixed, arrays)


def _head(tensors, arrays, h, name, operators) -> Head:
  fine = (np.asarray(tensors[n][:, h], np.float64) for n in "qkv")
  coarse = (np.asarray(x[:, h], np.float64) for x in tensors["coarse"][name])
  return Head(*fine, np.asarray(arrays.valid), *coarse, operators)


# ---- the command ------------------------------------------------------------


def main(argv=None):
  """Measures a checkpoint and prints the table."""
  import argparse
  import os

  from freqformer.analysis.probe import measure_model
  from freqformer.analysis.summary import table
  from freqformer.config import refusing
  from freqformer.data.sources import open_split
  from freqformer.evaluate.restore import load_run

  path = os.path.expanduser
  parser = argparse.ArgumentParser(
    prog="python -m freqformer.analysis.bounds", description=__doc__.split("\n")[0]
  )
  parser.add_argument(
    "--workdir", type=path, required=True, help="folder of a run trained with FreqFormer"
  )
  parser.add_argument("--times", default="0.9,0.5,0.1", help="t of the noisy latents")
  args = parser.parse_args(argv)
  with refusing("--times"):
    times = [float(t) for t in args.times.split(",")]
  restored = load_run(args.workdir)
  item = open_split(restored.experiment.data, "val")[0]
  rows = []
  for t in times:
    measured = measure_model(
      restored.model.config,
      restored.params,
      restored.latent_shape,
      latents=item["latent"],
      time=t,
      label=item["label"],
      case=f"t = {t:g}",
      **restored.experiment.conditioned_on(restored.class_names),
    )
    rows += [row | {"steps": restored.step} for row in measured]
  print(table(rows))
  return rows


if __name__ == "__main__":
  from freqformer.command import cli

  cli.run_plain(main)
