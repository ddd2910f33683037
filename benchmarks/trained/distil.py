"""A dense checkpoint made sparse in a few steps: what a teacher is worth, and what frozen weights.

  JAX_PLATFORMS=cpu python -m benchmarks.trained.distil [--dense_steps=600] [--steps=150]

A dense model of random fields (512 tokens in 64 tiles, two layers) is trained once. Each of
`METHODS` starts from its weights in each way of `WAYS`; all see the same clips and noise. A row in
benchmarks/results/distil.json has the regret on validation clips, which a perfect denoiser has at
0, and the training FLOPs behind the dense checkpoint. One seed: small differences say nothing.
"""

import pathlib
from operator import itemgetter

from absl import flags

from benchmarks.rows import write_rows
from benchmarks.trained.runs import ROOT, table
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.simulation.output import number
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.metrics import read
from freqformer.train.run import train

_NAME = "distil"
METHODS = {
  "block_topk": "block_topk(density=0.09375)",  # 6 tiles of 64
  "octaves": "octaves(window=(1, 3, 3))",
  "freqformer": "freqformer(window=(1, 3, 3), mid_tiles=6)",
}
# choice: rates; few parameters take a larger one.
_FROZEN = {"freeze": "backbone", "lr": 3e-3}
_ALL = {"lr": 1e-3}
_OUTPUT = {"distill": 1.0, "distill_at": "output"}
_LAYERS = {"distill": 1.0, "distill_at": "layers"}
WAYS = {
  "converted": {"lr": 1e-9},  # by one step at this rate
  "frozen": _FROZEN,
  "frozen, output": _FROZEN | _OUTPUT,
  "frozen, layers": _FROZEN | _LAYERS,
  "all": _ALL,
  "all, layers": _ALL | _LAYERS,
  "all, layers .1": _ALL | _LAYERS | {"distill": 0.1},
}


def config_of(method: str, steps: int, **train_fields):
  """Returns the config of a run of the small model."""
  config = read_config(ROOT / "configs" / "fields.py")
  config.data.grid = (8, 8, 8)
  config.model.depth = 2
  config.model.attention.method = method
  config.train.update(dict(steps=steps, warmup=10, val_every=steps, checkpoint_every=steps))
  config.train.update(dict(val_batches=0, val_soft=False, samples=0, log_every=10))
  config.train.update(train_fields)
  return config


def run(config, workdir: pathlib.Path) -> dict:
  """Trains, unless the run is complete, and returns what a row says of it."""
  steps = config.train.steps
  checkpoints = workdir / "checkpoints"
  if not checkpoints.is_dir() or Checkpoints(workdir, create=False).latest() != steps:
    train(config, workdir)
  last = {row["kind"]: row for row in read(workdir / "metrics.jsonl")}
  return {
    "steps": steps,
    "regret": last["val"]["regret"],
    "density": last["val"]["density"],
    "distill_loss": last["train"].get("distill_loss"),
    "training_flops": last["val"]["flops"],
  }


def main(_):
  folder = ROOT / "runs" / f"distil-{_DENSE_STEPS.value}-{_STEPS.value}"
  dense = folder / "dense"
  command = (
    f"python -m benchmarks.trained.distil --dense_steps={_DENSE_STEPS.value} --steps={_STEPS.value}"
  )
  rows = []

  def add(name, config, workdir):
    rows.append({"name": name, **run(config, workdir)})
    write_rows(_NAME, rows[-1:], command)

  def begun(method, way):
    steps = 1 if way == "converted" else _STEPS.value
    config = config_of(method, steps, init_from=str(dense), **WAYS[way])
    config.seed = 1  # other clips than the dense run saw
    return config

  add("dense", config_of("dense", _DENSE_STEPS.value), dense)
  add("dense / all", begun("dense", "all"), folder / "dense-all")
  for name, method in METHODS.items():
    for way in WAYS:
      add(f"{name} / {way}", begun(method, way), folder / f"{name}-{way.replace(', ', '-')}")
  columns = {
    "run": itemgetter("name"),
    "regret": number("regret", ".4f"),
    "density": number("density", ".3f"),
    "distill_loss": number("distill_loss", ".4f"),
    "training TFLOP": lambda row: f"{row['training_flops'] / 1e12:.3f}",
  }
  print(table(rows, columns))


if __name__ == "__main__":
  _DENSE_STEPS = flags.DEFINE_integer("dense_steps", 600, "Steps of the dense run.", lower_bound=1)
  _STEPS = flags.DEFINE_integer("steps", 150, "Steps of each run from it.", lower_bound=1)
  cli.run(main)
