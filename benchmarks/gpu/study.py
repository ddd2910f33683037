"""Compares attention methods at equal seconds of training, on random fields of 16K tokens.

  python3 -m benchmarks.gpu.study --arm=octaves --out=$OUT     # 70 s of training steps
  python3 -m benchmarks.gpu.study --arm=octaves --rehearse --seconds=2 --out=/tmp/x

One arm of the study (docs/evidence.md) per process: configs/fields.py in bfloat16 and larger, its
tiles as long as the grid is, so that an arm lists as many tiles as in the small one. The clock runs
during training steps alone, neither while they are compiled nor during validation. The row is the
regret against seconds; arms of a seed share clips, noise and initial weights.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from benchmarks.gpu.attempt import Job, attempts
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.device import Deadline, command_line, open_device, open_store
from benchmarks.gpu.train import trained_row
from freqformer.command.files import read_config
from freqformer.config import numbers
from freqformer.data.fields import Fields
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.experiment import Experiment, experiment
from freqformer.train.step import TrainState, init_state, make_train_step
from freqformer.train.validation import channel_power, evaluate, make_eval_step

_METHOD = "model.attention.method"
# Overrides of configs/fields.py, by arm.
ARMS = {
  "octaves": {_METHOD: "octaves"},
  "window": {_METHOD: "sliding_tile"},
  "freqformer": {_METHOD: "freqformer"},
  # Tiles make no difference to its result, and these are the faster ones.
  "dense": {_METHOD: "dense", "model.attention.tile": (4, 4, 8), "model.attention.block": 128},
}
# choice: 25 M parameters. 256 tiles of 64 tokens are as many as the small study has of 8.
_LARGE = {
  "data.grid": (16, 32, 32),
  "model.width": 384,
  "model.heads": 6,
  "model.depth": 12,
  "model.dtype": "bfloat16",
  "model.attention.tile": (4, 4, 4),
  "model.attention.block": 64,
  "model.attention.implementation": "hopper",
  "train.lr": 1e-3,
  # A constant rate: every point of the curve is a finished run. Only the router's temperature
  # follows `steps`, and stays at its end behind them.
  "train.schedule": "constant",
  "train.steps": 700,
}
_TINY = _LARGE | {
  "data.grid": (4, 8, 8),
  "model.width": 32,
  "model.heads": 2,
  "model.depth": 1,
  "model.attention.tile": (2, 2, 2),
  "model.attention.block": 8,
  "model.attention.implementation": "xla",
  "train.steps": 10,
}
BUCKETS = 8  # equal parts of t in which validation is split
CURVE_CLIPS = 8  # validation clips of a point of the curve, each seen once in every bucket
CLIPS = 32  # of the last point
POINTS = 7  # of the curve, equally far apart
_AHEAD = 8  # batches that are drawn ahead; a clip takes a core 4 ms
# Seconds kept for the last validation, several times what it should take.
_JUDGING = 15.0


def arm_config(arm: str, rehearse: bool) -> ConfigDict:
  """Returns the complete config of an arm."""
  config = read_config(ROOT / "configs" / "fields.py")
  sizes = _TINY if rehearse else _LARGE
  own = {_METHOD: ARMS[arm][_METHOD]} if rehearse else ARMS[arm]
  config.update_from_flattened_dict(sizes | own)
  return config


def clips(split: Fields, numbers, size: int) -> dict[str, np.ndarray]:
  """Returns a batch of clips by number; the last ones of a short batch repeat."""
  items = [split[min(number, len(split) - 1)] for number in itertools.islice(numbers, size)]
  return {name: np.stack([item[name] for item in items]) for name in ("latent", "label")}


def drawn_ahead(split: Fields, size: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of clips 0, 1, 2, ..., drawn by a thread while the device works."""
  with ThreadPoolExecutor(1) as pool:
    waiting = [pool.submit(clips, split, itertools.count(i * size), size) for i in range(_AHEAD)]
    for number in itertools.count(_AHEAD):
      yield waiting.pop(0).result()
      waiting.append(pool.submit(clips, split, itertools.count(number * size), size))


class Judge:
  """Validation of an arm's averaged weights."""

  def __init__(self, exp: Experiment, graphdef, tables):
    self._split = Fields(exp.data, "val")
    self._size = exp.train.batch_size
    self._power = channel_power(self._split, CLIPS)
    self._reference = jax.device_put(self._split.reference)
    self._tables = tables
    self._step = make_eval_step(graphdef, buckets=BUCKETS, time_range=exp.train.time_range)

  def __call__(self, state: TrainState, count: int) -> dict:
    """Returns regret, Bayes risk and density over the first `count` clips, by bucket."""
    found = evaluate(
      self._step,
      state.ema,
      self._batches(count),
      self._power,
      self._tables,
      reference=self._reference,
    )
    names = ("loss", "regret", "regret_buckets", "bayes_buckets", "density", "density_buckets")
    return {name: found[name] for name in names}

  def _batches(self, count):
    for first in range(0, count, self._size):
      batch = clips(self._split, itertools.count(first), self._size)
      yield batch | {"weight": np.ones(self._size, np.float32)}


def measure(arm: str, exp: Experiment, seconds: float, deadline: Deadline) -> dict:
  """Trains an arm for so many seconds, fewer at the deadline, and returns the fields of its row."""
  split = Fields(exp.data, "train")
  shape = exp.latent_shape
  tables = jax.device_put(make_tables(exp.model, shape))
  target = jax.device_put(split.target)
  graphdef, params = nnx.split(VideoDiT(exp.model, shape, len(split.class_names), nnx.Rngs(0)))
  state = init_state(params, exp.train, exp.seed)
  batches = drawn_ahead(split, exp.train.batch_size)
  started = time.monotonic()
  step = make_train_step(graphdef, exp.train)
  own = jax.device_put(numbers(exp.train))
  step = step.lower(state, next(batches), tables, own, target).compile()
  judge = Judge(exp, graphdef, tables)
  curve = [{"seconds": 0.0, "step": 0} | judge(state, CURVE_CLIPS)]
  state, values = step(state, next(batches), tables, own, target)
  losses = [float(values["loss"])]
  compiled = time.monotonic() - started

  spent = 0.0
  while spent < seconds and deadline.left > _JUDGING:
    goal = min(seconds, seconds * len(curve) / POINTS)
    left = min(goal - spent, deadline.left - _JUDGING)
    started = time.monotonic()
    while time.monotonic() - started < left:
      state, values = step(state, next(batches), tables, own, target)
      # Waiting for the step keeps the clock honest: steps run ahead of Python otherwise.
      losses.append(float(values["loss"]))
    spent += time.monotonic() - started
    point = {"seconds": spent, "step": len(losses)}
    last = spent >= seconds or deadline.left <= _JUDGING
    curve.append(point | judge(state, CLIPS if last else CURVE_CLIPS))
    logging.info("%s: %.0f s, step %d, regret %.4f", arm, spent, len(losses), curve[-1]["regret"])
  batches.close()

  own = {
    "arm": arm,
    "training_seconds": spent,
    "wanted_seconds": seconds,
    "regret": curve[-1]["regret"],
    "curve": curve,
  }
  steps = len(losses) - 1
  return own | trained_row(exp, state, step, losses, spent / max(steps, 1), compiled)


def parser() -> argparse.ArgumentParser:
  """Returns the options of this program."""
  parser = command_line(__doc__, minutes=2.5)
  parser.set_defaults(out=ROOT / "runs" / "gpu")
  parser.add_argument("--arm", choices=list(ARMS), required=True, help="what is trained")
  parser.add_argument("--seconds", type=float, default=70, help="of training steps")
  return parser


def main() -> int:
  options = parser().parse_args()
  logging.set_verbosity(logging.INFO)
  open_device(options.rehearse)
  command = f"python -m benchmarks.gpu.study --arm={options.arm} --seconds={options.seconds:g}"
  store = open_store("gpu_study_{device}", command, options.out, options.rehearse)
  deadline = Deadline(60 * options.minutes)
  exp = experiment(arm_config(options.arm, options.rehearse))
  seconds = min(options.seconds, 2.0) if options.rehearse else options.seconds
  job = Job(f"study/{options.arm}", functools.partial(measure, options.arm, exp, seconds, deadline))
  print(f"wanted {job.name}", flush=True)
  # Measured anew each time: the row depends on more code than the store's hash covers.
  ((_, row),) = attempts(store, [job], deadline, again=True)
  return 0 if row and row["correct"] else 1


if __name__ == "__main__":
  sys.exit(main())
