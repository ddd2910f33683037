"""Tables of a study: its trials, and the means over trials that differ in nothing but the seed."""

import json
import statistics
from collections.abc import Sequence

from freqformer.pages.text import aligned

_COLUMNS = {
  "trial": "",
  "val_loss": ".4f",
  "val_soft_loss": ".4f",
  "val_density": ".4f",
  "attn/dense": ".3f",
  "router_entropy": ".4f",
  "step": "d",
  "flops": ".3g",
  "seconds": ".0f",
  "status": "",
}
_MEANS = {
  "mean over seeds": "",
  "n": "",
  "val_loss": ".4f",
  "+-": ".4f",
  "flops": ".3g",
  "seconds": ".0f",
}


def seed_means(rows: Sequence[dict]) -> list[dict]:
  """Returns a row for each two or more finished trials that differ in nothing but `seed`.

  Such a row has `mean_of` (trials), `n`, `trials` (how many there are, finished or not), `val_loss`
  (the mean), `+-` (its sample standard deviation), and the means of `flops` and `seconds`.
  """
  groups = {}
  for row in rows:
    shared = {key: value for key, value in row["overrides"].items() if key != "seed"}
    groups.setdefault(json.dumps(shared, sort_keys=True, default=list), []).append(row)
  found = []
  for shared, own in groups.items():
    done = [row for row in own if row["val_loss"] is not None]
    if len(done) > 1:
      losses = [row["val_loss"] for row in done]
      means = {"val_loss": statistics.mean(losses), "+-": statistics.stdev(losses)}
      for key in ("flops", "seconds"):
        values = [row[key] for row in done if row.get(key) is not None]
        means[key] = statistics.mean(values) if values else None
      named = {"mean_of": [row["trial"] for row in done], "n": len(done), "trials": len(own)}
      found.append(named | means | {"overrides": json.loads(shared)})
  return sorted(found, key=lambda row: row["val_loss"])


def table(rows: Sequence[dict]) -> str:
  """Returns aligned text; trials in order of validation loss, unfinished ones last.

  `flops` and `seconds` are those of training, see `Metrics`; `attn/dense` is attention FLOPs of a
  training step over those of dense attention. Means over seeds follow, if there are any.
  """
  text = _text(ordered(rows), _COLUMNS)
  means = [_named(row) for row in seed_means(rows)]
  return f"{text}\n\n{_text(means, _MEANS)}" if means else text


def ordered(rows: Sequence[dict]) -> list[dict]:
  """Returns rows in order of validation loss, those without one last."""
  return sorted(rows, key=lambda row: (row["val_loss"] is None, row["val_loss"]))


def _named(mean: dict) -> dict:
  """Returns a row of `seed_means` with its first two cells as text."""
  settings = (f"{key.rsplit('.', 1)[-1]}={value}" for key, value in mean["overrides"].items())
  count = f"{mean['n']} of {mean['trials']}"
  return mean | {"mean over seeds": ",".join(settings) or "default", "n": count}


def _text(rows: Sequence[dict], columns: dict[str, str]) -> str:
  lines = [list(columns)]
  for row in rows:
    cells = {column: row.get(column) for column in columns}
    lines.append(["" if x is None else format(x, columns[name]) for name, x in cells.items()])
  return aligned(lines)
