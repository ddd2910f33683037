"""What must agree between a checkpoint and the run that goes on from it.

Data that differ are refused always: the commonest silent bug is another normalisation. A config that differs in what the
checkpoint was trained on or as is refused unless it is asked for; the rest may change. Every change is said, and kept in the
record of the run, which would otherwise claim that all of it ran as only its end did.
"""

import dataclasses
import json

import numpy as np
from absl import logging

from freqformer.config import ConfigError
from freqformer.train.experiment import Experiment, experiment

_FREE = (
  "train.",
  "sample.",
  "data.root",
  "data.cache",
  "data.workers",
  "model.remat",
  "model.attention.implementation",
)


def settings(exp: Experiment) -> dict:
  """All that a run uses by dotted key, as JSON values: defaults filled in, methods that no layer runs left out."""
  values = dataclasses.asdict(exp)
  attention = exp.model.attention
  del values["model"]["attention"]["methods"]
  for _, name in attention.runs(exp.model.depth):
    values["model"]["attention"][name] = dataclasses.asdict(attention.named(name))
  return _flat(json.loads(json.dumps(values)))


def _flat(values: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def changes(old: Experiment, new: Experiment) -> dict[str, list]:
  """`{"train.lr": [before, now], ...}`, in order of the keys. Of another method only that it is another, not its settings."""
  before, now = settings(old), settings(new)
  return {key: [before[key], now[key]] for key in before if key in now and before[key] != now[key]}


def change_text(changed: dict[str, list]) -> str:
  """`train.lr 0.001 -> 0.1, ...`, at most a dozen."""
  texts = [f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items()]
  return ", ".join(texts[:12]) + (f" and {len(texts) - 12} more" if len(texts) > 12 else "")


def check_same_config(record: dict, new: Experiment, allow: bool = False) -> dict[str, list]:
  """The changes since a checkpoint's record was written, once they are said.

  Args:
    allow: also what is refused otherwise: data, model, seed and train.batch_size.

  Raises:
    ConfigError: names what differs and what to do.
  """
  try:
    old = experiment(record["config"])
  except ConfigError as error:
    raise ConfigError(
      f"the config in the checkpoint of step {record['step']} is not one of this code ({error}); go on with the revision that "
      f"wrote it ({record.get('git')}), or start a new --workdir."
    ) from error
  changed = changes(old, new)
  fixed = {k: v for k, v in changed.items() if not k.startswith(_FREE) or k == "train.batch_size"}
  if fixed and not allow:
    raise ConfigError(
      f"the checkpoint of step {record['step']} was trained with another config: {change_text(fixed)}; start a new --workdir, "
      "or go on with these changes by --resume_changed."
    )
  if changed:
    logging.warning(
      "the config has changed since the checkpoint of step %d: %s",
      record["step"],
      change_text(changed),
    )
  return changed


def with_seed(state, fresh, changed: dict):
  """The restored state; where the seed was changed, with the fresh state's random key."""
  return dataclasses.replace(state, key=fresh.key) if "seed" in changed else state


def check_same_data(old: dict, new: dict):
  """Compares two checkpoint records.

  Raises:
    ConfigError: if the latents' shape, their statistics or the class map differ.
  """
  if list(old["latent_shape"]) != list(new["latent_shape"]):
    raise ConfigError(
      f"the checkpoint was trained on latents {tuple(old['latent_shape'])}, the cache holds "
      f"{tuple(new['latent_shape'])}; use the same data protocol or a new --workdir."
    )
  for name in ("mean", "std"):
    before, now = (np.asarray(r["statistics"][name]) for r in (old, new))
    # Not bit-equal: a machine that computes the statistics anew adds in another order. Another protocol moves them far more.
    if before.shape != now.shape or not np.allclose(before, now, rtol=1e-6, atol=1e-8):
      gap = (
        "another number of channels"
        if before.shape != now.shape
        else f"by up to {np.abs(before - now).max():.3g}"
      )
      raise ConfigError(
        f"latent statistics differ between checkpoint and cache ({name}: {gap}); the cache was encoded by "
        "another protocol or from other clips: restore that cache or start a new --workdir."
      )
  if old["class_names"] != new["class_names"]:
    pairs = zip(old["class_names"], new["class_names"], strict=False)
    changed = [f"{i}: {a} -> {b}" for i, (a, b) in enumerate(pairs) if a != b]
    raise ConfigError(
      f"the class map differs between checkpoint and cache ({len(old['class_names'])} against "
      f"{len(new['class_names'])} classes; {', '.join(changed[:3])}); use the same data or a new --workdir."
    )
