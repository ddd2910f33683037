"""Times training steps of configs/ucf101.py's model on clips that are rendered into memory.

  python -m benchmarks.gpu.train --steps=60 --out=$OUT     # FreqFormer-S, bfloat16, 64 per head
  python -m benchmarks.gpu.train --rehearse --steps=3 --out=/tmp/x     # tiny, on a CPU

The step is the one of train.py; files, cache and loader are left out. The row says how much of the
device's time attention takes, where a profiler saw the kernels.
"""

import collections
import functools
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from absl import logging
from flax import nnx

from benchmarks.gpu.attempt import Job, attempts
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.device import Deadline, command_line, open_device, open_store
from freqformer.command.files import read_config
from freqformer.config import numbers
from freqformer.data.codec import StatisticsAccumulator, make_codec
from freqformer.data.render import LOOKS, render_clip
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.experiment import Experiment, experiment
from freqformer.train.mesh import all_devices
from freqformer.train.step import init_state, make_train_step
from freqformer.train.throughput import Throughput

# Substrings of the attention kernels' names, as a profiler shows them.
ATTENTION_KERNELS = ("attention_forward", "attention_dq", "attention_dkv")
_PROFILED_STEPS = 3


def tiny(config):
  """Shrinks the config until a CPU trains it in seconds."""
  config.data.resolution = (32, 32)
  config.data.frames = 8
  config.data.codec.channels = 4
  config.model.size = "custom"
  config.model.width = 32
  config.model.depth = 2
  config.model.heads = 4  # one for each side of the window
  config.model.attention.block = 8
  config.model.attention.tile = (2, 2, 2)
  config.train.batch_size = 2


def rendered_batch(exp: Experiment) -> dict[str, np.ndarray]:
  """Returns one batch of normalised latents `[b, t, y, x, c]` and labels of rendered clips, one
  class after the other."""
  codec = make_codec(exp.data.codec)
  frames, rows, cols = exp.data.video_shape
  names = sorted(LOOKS)
  clips = []
  for i in range(exp.train.batch_size):
    clip = render_clip(names[i % len(names)], 1, i, frames * exp.data.stride, rows, cols)
    clips.append(clip[:: exp.data.stride])
  latents = codec.encode(np.stack(clips))
  statistics = StatisticsAccumulator()
  for latent in latents:
    statistics.add(latent)
  labels = np.arange(exp.train.batch_size) % len(names)
  return {"latent": statistics.result().normalise(latents), "label": labels.astype(np.int32)}


def measure(exp: Experiment, steps: int, deadline: Deadline) -> dict:
  """Trains on one batch, until the deadline at most, and returns the fields of the row.

  The first step, which compiles, is not timed.
  """
  shape = exp.latent_shape
  batch = rendered_batch(exp)
  classes = len(LOOKS)
  tables = make_tables(exp.model, shape)
  graphdef, params = nnx.split(VideoDiT(exp.model, shape, classes, nnx.Rngs(exp.seed)))
  state = init_state(params, exp.train, exp.seed)
  started = time.monotonic()
  given = (tables, numbers(exp.train))
  step = make_train_step(graphdef, exp.train).lower(state, batch, *given).compile()
  compiled = time.monotonic() - started
  batch, given = jax.device_put((batch, given))
  state, values = step(state, batch, *given)
  losses = [float(values["loss"])]
  started = time.monotonic()
  while len(losses) <= steps and (deadline.left > 0 or len(losses) == 1):
    state, values = step(state, batch, *given)
    losses.append(values["loss"])
  jax.block_until_ready(state)
  done = len(losses) - 1
  seconds = (time.monotonic() - started) / done
  losses = [float(x) for x in losses]
  own = {
    "model": f"{exp.model.size}, {exp.model.depth} layers of {exp.model.width}",
    "heads": exp.model.heads,
    "dtype": exp.model.dtype,
    "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
    "loss_first": losses[0],
    "loss_last": losses[-1],
    **attention_share(profiled(step, state, batch, *given)),
  }
  return own | trained_row(exp, state, step, losses, seconds, compiled)


def trained_row(exp: Experiment, state, step, losses, seconds: float, compiled: float) -> dict:
  """Returns the fields that rows of training have in common.

  `correct` says whether every loss is finite and, on a GPU, attention ran on Hopper's kernels.

  Args:
    state: after the last step.
    step: compiled.
    losses: of the first step, which compiles, and of all timed ones.
    seconds: per timed step.
    compiled: seconds of compiling.
  """
  memory = jax.devices()[0].memory_stats() or {}
  text = step.as_text()
  kernels = [name for name in ATTENTION_KERNELS if name in text]
  rate = 1 / seconds if seconds else 0.0
  batch = exp.train.batch_size
  throughput = Throughput.of(exp.model, exp.latent_shape, batch, all_devices()[:1])
  row = {
    "tokens": exp.model.layout(exp.latent_shape).n,
    "batch": batch,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "steps": len(losses) - 1,
    "seconds": seconds,
    **throughput.rates(rate),
    "compile_seconds": compiled,
    "peak_bytes": memory.get("peak_bytes_in_use"),  # None where unknown, as on a CPU
    "attention_kernels": kernels,
  }
  # A run that quietly used the portable backend would time something else.
  if jax.default_backend() == "gpu" and len(kernels) < len(ATTENTION_KERNELS):
    return row | {"correct": False, "error": "attention ran on no Hopper kernel"}
  return row | {"correct": len(losses) > 1 and bool(np.isfinite(losses).all())}


def profiled(step, state, batch, *given) -> dict[str, float]:
  """Returns the device's milliseconds per step by kernel; none where no profiler sees them."""
  if jax.default_backend() != "gpu":
    return {}
  try:
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        for _ in range(_PROFILED_STEPS):
          state, _ = step(state, batch, *given)
        jax.block_until_ready(state)
      (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
      return kernel_times(jax.profiler.ProfileData.from_file(str(path)))
  except Exception as error:  # a profiler that fails costs the share, not the row
    logging.warning("no kernel times: %s", error)
    return {}


def kernel_times(profile) -> dict[str, float]:
  """Returns milliseconds per step by kernel name, from the streams of a profile's GPU planes."""
  found = collections.defaultdict(float)
  for plane in profile.planes:
    for line in plane.lines if plane.name.startswith("/device:GPU") else ():
      for event in line.events if line.name.startswith("Stream") else ():
        found[event.name] += event.duration_ns / 1e6 / _PROFILED_STEPS
  return dict(found)


def attention_share(kernels: dict[str, float]) -> dict:
  """Returns attention's share of the device's time in a step; nothing if no kernels were seen."""
  if not kernels:
    return {}
  total = sum(kernels.values())
  attention = sum(
    ms for name, ms in kernels.items() if any(word in name for word in ATTENTION_KERNELS)
  )
  longest = sorted(kernels.items(), key=lambda item: -item[1])[:10]
  return {
    "attention_share": attention / total,
    "device_ms": total,
    "kernels": {name[:80]: ms for name, ms in longest},
  }


def main() -> int:
  parser = command_line(__doc__, minutes=2)
  parser.set_defaults(out=ROOT / "runs" / "gpu")
  parser.add_argument("--steps", type=int, default=60, help="timed steps")
  options = parser.parse_args()
  logging.set_verbosity(logging.INFO)
  open_device(options.rehearse)
  config = read_config(ROOT / "configs" / "ucf101.py")
  if options.rehearse:
    tiny(config)
  command = f"python -m benchmarks.gpu.train --steps={options.steps}"
  store = open_store("gpu_train_{device}", command, options.out, options.rehearse)
  deadline = Deadline(60 * options.minutes)
  exp = experiment(config)
  job = Job("train/ucf101_S", functools.partial(measure, exp, options.steps, deadline))
  print(f"wanted {job.name}", flush=True)
  # Measured anew each time: the row depends on more code than the store's hash covers.
  ((_, row),) = attempts(store, [job], deadline, again=True)
  return 0 if row and row["correct"] else 1


if __name__ == "__main__":
  sys.exit(main())
