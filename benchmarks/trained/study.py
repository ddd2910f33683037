"""The study of arms: runs on random fields that differ in nothing but the attention.

A trial is one arm and one seed. Trials of a seed have the same clips, timesteps and noise, and the
same initial weights where they have the same parameters, so that they are paired. A trial is
trained by `freqformer.train.run.train`, goes on where it was stopped, and becomes one row when it
is finished.
"""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

from absl import logging
from ml_collections import ConfigDict

from benchmarks.rows import Store
from benchmarks.trained.runs import ROOT
from freqformer.command.files import check_keys, load_config, read_config
from freqformer.data.fields import FieldsConfig
from freqformer.data.sources import open_split
from freqformer.evaluate.restore import Run, load_run
from freqformer.evaluate.validate import validate
from freqformer.train import metrics
from freqformer.train.run import train

CONFIG = ROOT / "configs" / "fields.py"
BUCKETS = 8  # equal parts of t in which a finished run is judged
CLIPS = 64  # validation clips of a finished run, each seen once in every bucket: 512 draws
POINTS = 10  # of a learning curve
_DIGITS = 6
_POLL_SECONDS = 0.5
_WORTH_SECONDS = 60  # a trial is not begun with less time left: compiling takes half of it

_METHOD = "model.attention.method"
_BANDS = {_METHOD: "freqformer"}
# Before the first trial weights began uniform; the arm `octaves_prior` has today's default.
# Levels of less weight are left out of `final`, which is judged beside `final_soft`, all levels. It
# was the default when the first trials ran, and is not part of a trial's digest.
_THRESHOLD = {"model.attention.octaves.threshold": 0.05}
_UNIFORM = {"model.attention.octaves.router.prior_slope": 0.0}
_SHARED = {"model.attention.freqformer.low_shared": True}
_OCTAVES = {_METHOD: "octaves"} | _UNIFORM
_TILTED = {_METHOD: "octaves"}
_LOW4 = {
  "model.attention.octaves.levels": 2,
  "model.attention.octaves.factor": 4,
  "model.attention.octaves.basis": "haar",
}
# Overrides of configs/fields.py, by arm, in the order in which trials of a seed run.
ARMS = {
  "octaves_prior": _TILTED,
  "window": {_METHOD: "sliding_tile"},
  # A window and one low level with its own queries, weighed: of 4^3 tokens, of 2^3 tokens.
  "low4": _OCTAVES | _LOW4,
  "low4_prior": _LOW4 | _TILTED,
  "octaves": _OCTAVES,
  "freqformer": _BANDS,
  "dense": {_METHOD: "dense"},
  # One level for every head and timestep instead of weights.
  "octaves_hard": {_METHOD: "octaves", "model.attention.octaves.router.mode": "straight_through"},
  "low2": _OCTAVES | {"model.attention.octaves.levels": 2},
  "block_topk": {_METHOD: "block_topk"},
  # A router that knows the timestep and the head, not the content.
  "freqformer_time": _BANDS | {"model.attention.freqformer.router.statistics": False},
  "octaves_mid": _TILTED | {"model.attention.octaves.mid_tiles": 8},
  "octaves_gates": _OCTAVES | {"model.attention.octaves.router.mode": "gates"},
  # Half of the heads low, half local, whatever the clip and the timestep.
  "freqformer_fixed": _BANDS | {"model.attention.freqformer.allocation": (1, 0, 1)},
  # Branches drawn anew for every clip and head, by the prior's shares.
  "freqformer_random": _BANDS
  | {
    "model.attention.freqformer.router.mode": "random",
    "model.attention.freqformer.router.penalty": 0.0,
    "model.attention.freqformer.router.statistics": False,
  },
  # Like VORTA: a window, the best tiles or all tokens, chosen by the timestep alone.
  "vorta": _BANDS
  | {
    "model.attention.freqformer.basis.low": (1.0, 1.0, 1.0),
    "model.attention.freqformer.basis.mid": (1.0, 1.0, 1.0),
    "model.attention.freqformer.router.statistics": False,
  },
  # Queries of all tokens, and a window and one low level in one softmax; the same and, weighed, the
  # low level's own queries; the best tiles and the low level in one softmax.
  "joint": _BANDS | _SHARED | {"model.attention.freqformer.allocation": (0, 0, 2)},
  "joint_and_low": _BANDS | _SHARED,
  "topk_pooled": _BANDS | _SHARED | {"model.attention.freqformer.allocation": (0, 2, 0)},
  # Like VSA: the best tiles and a low level of one cell a tile, added by gates (of the timestep).
  "topk_gated": _OCTAVES
  | {
    "model.attention.octaves.levels": 2,
    "model.attention.octaves.window": (1, 1, 1),
    "model.attention.octaves.mid_tiles": 19,
    "model.attention.octaves.router.mode": "gates",
  },
  "freqformer_slope": _BANDS | {"model.attention.freqformer.router.prior_slope": -2.0},
}
_SCREEN = tuple(ARMS)
# Of a grid with room for four levels.
ARMS |= {
  "octaves4_prior": _TILTED | {"model.attention.octaves.levels": 4},
  "low8_prior": _LOW4 | _TILTED | {"model.attention.octaves.factor": 8},
}
# The finest level, nine tenths of the pairs, runs up to t = .7, from the first step on.
_UNTIL = _TILTED | {
  "model.attention.octaves.threshold": 0.0,
  "model.attention.octaves.until": (0.7, 1.0, 1.0),
}
# The second half of training leaves out the levels that evaluation leaves out; the same with a
# price on pairs, beyond half of those of all levels.
_LATE = _LOW4 | _TILTED | _THRESHOLD | {"model.attention.octaves.threshold_from": 0.5}
ARMS |= {
  "low4_late": _LATE,
  "low4_budget": _LATE
  | {
    "model.attention.octaves.router.penalty": 0.05,
    "model.attention.octaves.router.budget": 0.037,
  },
  "octaves_until": _UNTIL,
  # In half of training's samples: its weights are judged either way.
  "octaves_either": _UNTIL | {"model.attention.octaves.until_share": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the study.

  Attributes:
    arms: names of `ARMS`.
    seeds: of training; validation clips and their noise are the same for all.
    steps: of every trial.
    overrides: of the config, for all arms.
  """

  arms: tuple[str, ...]
  seeds: tuple[int, ...]
  steps: int
  overrides: dict = dataclasses.field(default_factory=dict)


# Below t = .3 theory sees no difference (docs/evidence.md), and short runs learn it last.
_SHORT = {"train.batch_size": 2, "train.time_range": (0.3, 1.0)}
_COPIES = {"data.copies": 8, "data.target": "velocity", "train.batch_size": 2}
# One frame of many tokens: the cheapest grid on which theory sees levels between the finest and the
# coarsest (docs/evidence.md). Two layers, because theory has one and each more relays further.
_PLANE = _SHORT | {
  "data.grid": (1, 64, 64),
  "data.speed": 0,
  "model.depth": 2,
  "model.attention.tile": (1, 2, 2),
  "model.attention.block": 4,
  "train.schedule": "cosine",
}
# Tokens grow, windows do not: theory has the window worse and worse.
SIZES = {576: (4, 12, 12), 1152: (8, 12, 12), 4608: (8, 24, 24)}
_SCALE = {
  f"scale_{tokens}": Stage(
    ("octaves_prior", "window"), seeds=(0, 1), steps=300, overrides=_SHORT | {"data.grid": grid}
  )
  for tokens, grid in SIZES.items()
}
# choice: what a core can do in an evening or, of `core` and `copies`, in a night or two.
STAGES = {
  "screen": Stage(_SCREEN, seeds=(0, 1, 2), steps=300, overrides=_SHORT),
  "plane": Stage(
    ("octaves4_prior", "low8_prior", "window"), seeds=(0, 1, 2), steps=600, overrides=_PLANE
  ),
  "core": Stage(
    (*_SCREEN[:7], "low4_late", "low4_budget", "octaves_until", "octaves_either"),
    seeds=(0, 1, 2),
    steps=2000,
    overrides=_SHORT,
  ),
  # The FLOPs of dense attention's 2,000 steps, and a third less: the default in 8,000.
  "long": Stage(("low4_prior",), seeds=(0, 1, 2), steps=8000, overrides=_SHORT),
  # High noise alone, where the two arms differ.
  "high": Stage(
    ("octaves_prior", "octaves_until"),
    seeds=(0, 1, 2, 3, 4),
    steps=1000,
    overrides=_SHORT | {"train.time_range": (0.7, 1.0)},
  ),
  # Three more seeds of two of the screen's arms.
  "vorta": Stage(("octaves_prior", "vorta"), seeds=(3, 4, 5), steps=300, overrides=_SHORT),
  "copies": Stage(
    ("octaves_prior", "octaves_mid", "window", "block_topk", "dense"),
    seeds=(0, 1, 2),
    steps=600,
    overrides=_COPIES,
  ),
  **_SCALE,
}
_TINY = {
  "data.grid": (2, 8, 8),
  "data.val_clips": 8,
  "model.width": 24,
  "model.depth": 1,
  "model.attention.implementation": "reference",
}
# Its window covers the whole grid: both trials must come out the same, if they are paired.
REHEARSAL = Stage(("dense", "window"), seeds=(0,), steps=4, overrides=_TINY)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of the study."""

  stage: Stage
  arm: str
  seed: int

  @property
  def name(self) -> str:
    """Name of its row."""
    return f"{self.arm}/seed{self.seed}"

  @property
  def overrides(self) -> dict:
    """Keys of the config that differ from configs/fields.py."""
    return _THRESHOLD | self._named

  @property
  def _named(self) -> dict:
    """Overrides that tell one trial from another."""
    # A constant rate: every point of the learning curve is a finished run of fewer steps, so that
    # arms can be compared at equal FLOPs.
    training = {
      "seed": self.seed,
      "train.steps": self.stage.steps,
      "train.schedule": "constant",
      "train.val_every": -(-self.stage.steps // POINTS),
      "train.val_batches": 4,
      "train.val_soft": False,
      "train.checkpoint_every": 100,
    }
    return training | self.stage.overrides | ARMS[self.arm]

  def config(self) -> ConfigDict:
    """Returns its complete config; a ConfigError names a key that does not exist."""
    config = read_config(CONFIG)
    check_keys(config, self.overrides)
    with config.ignore_type():  # an allocation is a word or counts
      config.update_from_flattened_dict(self.overrides)
    return config

  @property
  def digest(self) -> str:
    """A short hash of what is written for it; keys that are left to defaults are not in it."""
    written = load_config(CONFIG, ("get_config",)).get_config().to_dict()
    text = json.dumps([written, self._named], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]

  def workdir(self, folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the run; a run with other settings has another one."""
    return folder / f"{self.arm}-seed{self.seed}-{self.digest}"


def trials(stage: Stage, shard: tuple[int, int] = (1, 1)) -> list[Trial]:
  """Returns the trials of a shard (i of n), seed by seed, so that pairs are soon complete."""
  every = [Trial(stage, arm, seed) for seed in stage.seeds for arm in stage.arms]
  index, count = shard
  return every[index - 1 :: count]


def row_of(store: Store, trial: Trial) -> dict | None:
  """Returns a trial's row, unless it is of other settings."""
  row = store.get(trial.name)
  return row if row and row["digest"] == trial.digest else None


# ---- one trial ----------------------------------------------------------------------------------


def run(trial: Trial, folder: pathlib.Path, store: Store) -> dict | None:
  """Trains a trial in this process, or goes on with it, and writes its row; None if stopped."""
  workdir = trial.workdir(folder)
  train(trial.config(), workdir)
  record = json.loads((workdir / "run.json").read_text())
  if not record["finished"]:
    return None
  restored = load_run(workdir)
  started = time.monotonic()
  results = {"final": judge(restored)}
  if any(method.routed for _, method in restored.model.config.runs()):
    results["final_soft"] = judge(restored, soft=True)
  curve = [line for line in metrics.read(workdir / "metrics.jsonl") if line["kind"] == "val"]
  row = {
    "name": trial.name,
    "arm": trial.arm,
    "seed": trial.seed,
    "steps": restored.step,
    "digest": trial.digest,
    "overrides": trial.overrides,
    "parameters": record["params"],
    "tokens": record["tokens"],
    "training_flops": curve[-1]["flops"],
    "training_seconds": curve[-1]["seconds"],
    "compile_seconds": record["seconds"]["compile"],
    "judging_seconds": time.monotonic() - started,
    "curve": curve,
    **results,
  }
  return store.add(rounded(row))


def judge(
  restored: Run, data: FieldsConfig | None = None, *, soft: bool = False, clips: int = CLIPS, **how
) -> dict:
  """Returns the validation of a run in `BUCKETS` parts of t on its own data, or on others.

  Args:
    soft, clips, **how: as of `validate`.
  """
  split = open_split(data or restored.experiment.data, "val")
  return validate(restored, split, soft=soft, buckets=BUCKETS, clips=clips, **how)


def rounded(value):
  """Returns JSON values with floats of six significant digits; arrays become lists."""
  if isinstance(value, dict):
    return {key: rounded(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(part) for part in value]
  return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


# ---- all trials ---------------------------------------------------------------------------------


def run_all(
  wanted: list[Trial],
  store: Store,
  arguments: list[str],
  stop: Callable[[], bool],
  deadline: float | None,
) -> list[str]:
  """Runs trials that have no row, each in a process of its own, and returns those that failed.

  Args:
    wanted: trials in order.
    store: of rows.
    arguments: of `python -m benchmarks.study` that a trial's process is given in addition.
    stop: polled; True lets the running trial save itself, and ends.
    deadline: in seconds of the monotonic clock, with the same effect, or None.
  """
  failed = []

  def over(spare: float = 0.0) -> bool:
    return stop() or (deadline is not None and time.monotonic() + spare > deadline)

  for number, trial in enumerate(wanted, 1):
    if row_of(store, trial):
      continue
    if over(_WORTH_SECONDS):
      break
    logging.info("trial %d of %d: %s", number, len(wanted), trial.name)
    command = [sys.executable, "-m", "benchmarks.study", f"--run={trial.name}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
      if over():
        process.terminate()
        process.wait()
        break
      time.sleep(_POLL_SECONDS)
    if process.returncode:
      failed.append(trial.name)
  return failed


def listing(wanted: list[Trial], store: Store, folder: pathlib.Path) -> list[tuple[str, ...]]:
  """Returns lines of a table: name, settings' hash, state."""
  lines = [("trial", "settings", "state")]
  for trial in wanted:
    state = "open"
    rows = metrics.read(trial.workdir(folder) / "metrics.jsonl")
    if rows:
      state = f"step {rows[-1]['step']} of {trial.stage.steps}"
    lines.append((trial.name, trial.digest, "finished" if row_of(store, trial) else state))
  return lines
