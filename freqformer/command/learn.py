"""Learns a method's routers, gates or level weights on a pretrained model: a run of `train.py`.

The dense model samples for every prompt; each evaluation is an optimizer step (docs/pretrained.md,
"Learned routers"). The weights of the model stay as they are. `learned.safetensors` holds what was
learned, the method, and a hash of the model, on which alone it can be used.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from freqformer import disk
from freqformer.command.pretrained import embeddings
from freqformer.config import ConfigError
from freqformer.cost import model_cost
from freqformer.evaluate.pretrained import Pretrained
from freqformer.pages.text import aligned
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.distil import Keeper, Stopped
from freqformer.train.learning import Learning, learning
from freqformer.train.lock import held
from freqformer.train.preemption import StopRequest

FILE = "learned.safetensors"
_METRICS = "metrics.jsonl"
# Keys; another model is told by its weights, other prompts by their texts.
_MAY_CHANGE = ("keep", "pretrained", "prompts")


def _facts(pipe: Pretrained, own: Learning) -> dict[str, str]:
  """Returns what a dry run tells."""
  frames = own.data.frames or pipe.frames
  size = own.data.size or pipe.size
  shape = pipe.latent_shape(frames, size)
  config = pipe.config(own.model.method)
  layout = config.layout(shape)
  leaves = pipe.learnable(own.model.method, shape)
  guided = pipe.sampling(own.sample.steps, own.sample.guidance).guided()
  count = sum(math.prod(leaf.shape) for leaf in leaves.values())
  work = model_cost(pipe.config(), shape).total + model_cost(config, shape).attention_flops
  flops = sum(1 + both for both in guided) * work
  return {
    "model": f"{own.model.pretrained}; {config.depth} layers, width {config.width}, "
    f"{config.heads} heads",
    "video": f"{frames} frames of {size[0]}x{size[1]}; {layout.n:,} tokens in {layout.tiles} tiles",
    "learns": f"{count:,} numbers in {len(leaves)} arrays of {own.model.method}",
    "steps": f"{len(guided)} for each prompt, in each of {own.train.passes} passes",
    "work": f"{flops / 1e12:,.4g} TFLOP for a prompt: the dense model, and the method beside it",
  }


class _Checkpoints(Keeper):
  """Keeps a run in its workdir: checkpoints, and a line of `metrics.jsonl` for each trajectory."""

  def __init__(self, workdir: pathlib.Path, keep: int, run: dict, stop: StopRequest):
    """Opens the workdir.

    Args:
      workdir: the run's folder.
      keep: number of newest checkpoints that stay.
      run: what it is a run of, plain JSON; a run goes on from checkpoints of the same alone.
      stop: whether the run has been asked to stop.
    """
    self._workdir = workdir
    self._checkpoints = Checkpoints(workdir, keep)
    self._run = run
    self._stop = stop

  def restore(self, template):
    """Returns as of `Keeper`.

    Raises:
      ConfigError: the workdir is of another run.
    """
    self._checkpoints.remove_unfinished()
    if self._checkpoints.latest() is None:
      return None
    record = self._checkpoints.record()
    for name, before, now in _differences(record, json.loads(json.dumps(self._run))):
      raise ConfigError(
        f"{self._workdir} is of a run with another {name}: {before!r}, now {now!r}; name another "
        "--workdir."
      )
    state = self._checkpoints.restore(template)
    logging.info("resumed at step %d from %s", record["step"], self._checkpoints.path)
    return state, [np.asarray(row, np.float32) for row in record["errors"]]

  def save(self, step: int, state, errors):
    rows = [[round(float(x), 6) for x in row] for row in errors]
    self._checkpoints.save(step, state, self._run | {"errors": rows})
    lines = [
      json.dumps({"trajectory": i, "error_by_layer": row, "error": float(np.mean(row))})
      for i, row in enumerate(rows)
    ]
    disk.write_whole(self._workdir / _METRICS, "".join(line + "\n" for line in lines))

  def should_stop(self) -> bool:
    return self._stop()


def _differences(old: dict, new: dict, name: str = "") -> Iterator[tuple[str, object, object]]:
  """Yields keys that say what is learned and differ, and their values."""
  for key in sorted(new.keys() & old.keys() - set(_MAY_CHANGE)):
    place = f"{name}.{key}".removeprefix(".")
    if isinstance(new[key], dict):
      yield from _differences(old[key], new[key], place)
    elif old[key] != new[key]:
      yield place, old[key], new[key]


def learn(config: ConfigDict, workdir: pathlib.Path, dry_run: bool = False):
  """Learns until the end or until asked to stop; the same call goes on from the last trajectory.

  Args:
    config: of `Learning`.
    workdir: folder of the run.
    dry_run: print sizes and work, and read neither prompts nor weights.

  Raises:
    ConfigError: the config cannot be run, or `workdir` is of another run.
  """
  own = learning(config.to_dict())
  pipe = Pretrained(own.model.pretrained, block=own.model.block)
  asked = dict(frames=own.data.frames or None, size=own.data.size or None)
  drawn = dict(steps=own.sample.steps, guidance=own.sample.guidance, shift=own.sample.shift or None)
  if dry_run:
    print(aligned(list(_facts(pipe, own).items())))
    return
  sample = pipe.sampling(**drawn)
  # Refused before prompts are encoded.
  pipe.config(own.model.method)
  pipe.check_memory()
  guided = any(sample.guided())
  texts = embeddings(pipe, own.data.prompts, own.data.negative, guided)
  workdir.mkdir(parents=True, exist_ok=True)
  stop = StopRequest()
  with held(workdir), stop, disk.space_for("the run's records", workdir):
    run = {"config": dataclasses.asdict(own), "texts": texts.texts, "weights": pipe.identity}
    keeper = _Checkpoints(workdir, own.train.keep, run, stop)
    try:
      learned = pipe.distil(
        texts, own.model.method, **asked, **drawn, config=own.train, seed=own.seed, keeper=keeper
      )
    except Stopped:
      logging.warning("stopped; the same command goes on from the last whole trajectory")
      return
    path = workdir / FILE
    learned.write(path)
  first, last = (np.mean(learned.facts[name]) for name in ("first_error", "last_error"))
  print(
    f"{path}: {len(learned.arrays)} arrays, {disk.size_text(path.stat().st_size)}; error over the "
    f"first trajectory {first:.3f}, over the last {last:.3f}; {learned.facts['steps']} steps"
  )
