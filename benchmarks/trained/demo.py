"""Stores a run of the demo: what it took, what its judge says, and a picture that moves.

  make demo && python -m benchmarks.trained.demo
  python -m freqformer.demo --workdir=runs/longer --steps=5000 && \
    python -m benchmarks.trained.demo --workdir=runs/longer

Nothing is run here: the row holds the seconds of run.json, the last validation of metrics.jsonl,
the rows of evaluation.json and what `eval.py --validate` has written; `trained_at` is the commit
that trained it. Its name in benchmarks/results/demo.json is that of the run's folder, as is the
name of a picture in docs/figures/ with the first sample of each class above a real clip.
"""

import json
import pathlib

import av
import numpy as np
from absl import flags
from PIL import Image

from benchmarks.rows import context, write_rows
from benchmarks.trained.runs import ROOT
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.pages.mp4 import grid
from freqformer.train import metrics

_MILLISECONDS = 80  # of a frame: 12.5 a second, as the clips have
_QUALITY = 70
_KEPT = ("name", "unit", "value", "floor", "controls", "samples", "real")


def row_of(workdir: pathlib.Path) -> dict:
  """Returns the row of a finished demo.

  Raises:
    ConfigError: the run has no evaluation.json, or was not finished.
  """
  if not (workdir / "evaluation.json").exists():
    raise ConfigError(f"{workdir} has no evaluation.json: run make demo first.")
  run = json.loads((workdir / "run.json").read_text())
  if not run.get("finished"):
    raise ConfigError(f"{workdir} is not finished: the same make demo goes on with it.")
  losses = [row for row in metrics.read(workdir / "metrics.jsonl") if row["kind"] == "val"]
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  return {
    "trained_at": run["git"],
    "trained_with": run["versions"],
    "trained_on": run["device"],
    "name": workdir.name,
    "method": run["method"],
    "parameters": run["params"],
    "tokens": run["tokens"],
    "steps": losses[-1]["step"],
    "seconds": {name: round(value, 1) for name, value in run["seconds"].items()},
    "validation_loss": losses[-1]["loss"],
    "metrics": [_metric(row) for row in evaluation],
    "validated": [_validated(path) for path in sorted((workdir / "validation").glob("*.json"))],
  }


def _validated(path: pathlib.Path) -> dict:
  """Returns the losses of an `eval.py --validate`, and on which clips they are."""
  found = json.loads(path.read_text())
  data = {key: found["data"][key] for key in ("source", "root", "frames", "stride", "resolution")}
  losses = {key: found[key] for key in ("loss", "buckets", "linear_buckets")}
  return {"clips": found["clips"], "split": found["split"], **data, **losses}


def _metric(row: dict) -> dict:
  """Returns the figures of a metric, and of which samples they are."""
  drawn = {"drawn": row["protocol"]["drawn"], "n": row["protocol"]["samples"]}
  return drawn | {key: row[key] for key in _KEPT if key in row}


def write_picture(workdir: pathlib.Path, path: pathlib.Path):
  """Writes a looping picture: a column per class, its first sample above a real clip."""
  samples = [
    min(folder.glob("*.mp4"))
    for folder in sorted((workdir / "samples").iterdir())
    if folder.is_dir()
  ]
  real = [workdir / "real" / f"{sample.parent.name}.mp4" for sample in samples]
  videos = np.stack([_frames(clip) for clip in (*samples, *real)])
  images = [Image.fromarray(frame) for frame in grid(videos, len(samples))]
  images[0].save(
    path, save_all=True, append_images=images[1:], duration=_MILLISECONDS, loop=0, quality=_QUALITY
  )


def _frames(path: pathlib.Path) -> np.ndarray:
  """Returns the frames of a video file, uint8 `[t, y, x, 3]`."""
  with av.open(str(path)) as container:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def command_of(row: dict) -> str:
  """Returns the commands that make the row."""
  if row["name"] == "demo":
    commands = ["make demo"]
    here = ""
  else:
    here = f" --workdir=runs/{row['name']}"
    commands = [f"python -m freqformer.demo{here} --steps={row['steps']}"]
  more = [metric for metric in row["metrics"] if metric["drawn"] == "evaluation"]
  if more:
    names = ",".join(metric["name"].split("_")[0] for metric in more)
    given = f"--workdir=runs/{row['name']} --n={more[0]['n']} --metrics={names}"
    commands.append(f"python -m freqformer.evaluate {given}")
  return " && ".join([*commands, f"python -m benchmarks.trained.demo{here}"])


def main(_):
  workdir = pathlib.Path(_WORKDIR.value)
  row = row_of(workdir)
  command = command_of(row)
  write_picture(workdir, ROOT / "docs" / "figures" / f"{workdir.name}.webp")
  write_rows("demo", [context(command) | row], command)
  for metric in row["metrics"]:
    print(f"{metric['name']} of {metric['n']:,}: {metric['value']:.4g} {metric['unit']}")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo's run.")
  cli.run(main)
