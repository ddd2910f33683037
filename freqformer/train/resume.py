"""Agreement of a checkpoint with the run that goes on from it.

Other data are always refused: the commonest silent bug is another normalisation. Changes of `data`,
`model`, `seed` or `train.batch_size` are refused unless `--resume_changed` is given; others may
happen. Every change is logged and kept with its step in the run's record.
"""

import dataclasses
import json

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from freqformer.config import ConfigError
from freqformer.train.experiment import Experiment, of_record

# Prefixes of keys that may change; `train.batch_size` may not.
_FREE = (
  "train.",
  "sample.",
  "mesh.",
  "data.root",
  "data.cache",
  "data.workers",
  "model.remat",
  "model.attention.implementation",
  "model.attention.schedule.",
)
_LISTED = 12  # changes that a message names


def settings(exp: Experiment) -> dict:
  """Returns all that a run uses, by dotted key, as JSON values; no method that no layer runs."""
  values = dataclasses.asdict(exp)
  attention = exp.model.attention
  del values["model"]["attention"]["methods"]
  for _, name in attention.runs(exp.model.depth):
    values["model"]["attention"][name] = dataclasses.asdict(attention.named(name))
  return flatten_dict(json.loads(json.dumps(values)), sep=".")


def changes(old: Experiment, new: Experiment) -> dict[str, list]:
  """Returns `{"train.lr": [before, now], ...}`; of a changed method no settings."""
  before = settings(old)
  now = settings(new)
  return {key: [before[key], now[key]] for key in before if key in now and before[key] != now[key]}


def change_text(changed: dict[str, list]) -> str:
  """Returns `train.lr 0.001 -> 0.1, ...`, at most a dozen."""
  texts = [f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items()]
  more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
  return ", ".join(texts[:_LISTED]) + more


def check_same_config(record: dict, new: Experiment, allow: bool = False) -> dict[str, list]:
  """Logs and returns the changes since a checkpoint's record was written.

  Raises:
    ConfigError: names changes of data, model, seed or train.batch_size, unless they are allowed.
  """
  step = record["step"]
  try:
    old = of_record(record["config"])
  except ConfigError as error:
    raise ConfigError(
      f"the config in the checkpoint of step {step} is not one of this code ({error}); go on with "
      f"the revision that wrote it ({record.get('git')}), or start a new --workdir."
    ) from error
  changed = changes(old, new)
  fixed = {k: v for k, v in changed.items() if not k.startswith(_FREE) or k == "train.batch_size"}
  if fixed and not allow:
    raise ConfigError(
      f"the checkpoint of step {step} was trained with another config: {change_text(fixed)}; "
      "start a new --workdir, or go on with these changes by --resume_changed."
    )
  if changed:
    text = change_text(changed)
    logging.warning("the config has changed since the checkpoint of step %d: %s", step, text)
  return changed


def with_seed(state, fresh, changed: dict):
  """Returns the restored state; if the seed was changed, with the fresh state's random key."""
  return dataclasses.replace(state, key=fresh.key) if "seed" in changed else state


def order_seed(seed: int, rollbacks: int) -> int:
  """Returns the seed of the data's order, which is another one behind a rollback."""
  if not rollbacks:
    return seed
  return int(np.random.SeedSequence((seed, rollbacks)).generate_state(1)[0])


def with_other_noise(state):
  """Returns the state with another random key, for all steps to come."""
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 1)
  return dataclasses.replace(state, key=jax.random.key_data(key))


def check_same_statistics(old: dict, new: dict, between: str, remedy: str):
  """Raises ConfigError if latents are not normalised alike; says `between` what, and the remedy."""
  for name in ("mean", "std"):
    before = np.asarray(old[name])
    now = np.asarray(new[name])
    # Not bit-equal: statistics that are computed anew may add in another order. Another protocol
    # moves them far more.
    if before.shape != now.shape or not np.allclose(before, now, rtol=1e-6, atol=1e-8):
      gap = np.abs(before - now).max() if before.shape == now.shape else np.inf
      raise ConfigError(
        f"latent statistics differ between {between} ({name}: by up to {gap:.3g}); {remedy}."
      )


def check_same_data(old: dict, new: dict):
  """Raises ConfigError if latents' shape, statistics or class map of two records differ."""
  before = tuple(old["latent_shape"])
  now = tuple(new["latent_shape"])
  if before != now:
    raise ConfigError(
      f"the checkpoint was trained on latents {before}, the cache holds {now}; use the same data "
      "protocol or a new --workdir."
    )
  check_same_statistics(
    old["statistics"],
    new["statistics"],
    "checkpoint and cache",
    "the cache was encoded by another protocol or from other clips: restore that cache or start a "
    "new --workdir",
  )
  before = old["class_names"]
  now = new["class_names"]
  if before != now:
    pairs = enumerate(zip(before, now, strict=False))
    examples = [f"{i}: {a} -> {b}" for i, (a, b) in pairs if a != b]
    raise ConfigError(
      f"the class map differs between checkpoint and cache ({len(before)} against {len(now)} "
      f"classes; {', '.join(examples[:3])}); use the same data or a new --workdir."
    )
