"""Orbax checkpoints: everything a run needs to go on bit for bit, and everything a sampler needs to use it.

Arrays are saved as one flat `{path: array}` tree, so that a checkpoint of another model is refused by naming the leaves that
differ. Beside them lies a JSON record: step, config, class map, latent statistics, codec, data iterator, versions.
"""

import contextlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from freqformer.config import ConfigError
from freqformer.versions import git_revision, versions

SCHEMA = 1
# Distributions whose versions shape results.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


class Mismatch(ConfigError):
  """A checkpoint of another model. `missing`: the leaves that the model wants and the checkpoint lacks."""

  def __init__(self, message: str, missing: list[str]):
    super().__init__(message)
    self.missing = missing


def flatten(tree) -> dict[str, Any]:
  """`{"params/embed/kernel": array, ...}`."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path) -> str:
  # NNX wraps each array in a variable whose leaf is called "value": no news to a reader.
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def differences(expected: dict, found: dict, limit: int = 12) -> list[str]:
  """One line per leaf whose presence or shape differs; values need only a `.shape`."""
  wrong, unknown = [], []
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      wrong.append(
        f"{name}: missing in the checkpoint, the model wants {tuple(expected[name].shape)}"
      )
    elif name not in expected:
      unknown.append(f"{name}: {tuple(found[name].shape)} in the checkpoint, unknown to the model")
    elif tuple(expected[name].shape) != tuple(found[name].shape):
      wrong.append(
        f"{name}: {tuple(found[name].shape)} in the checkpoint, the model wants {tuple(expected[name].shape)}"
      )
  lines = wrong + unknown
  return lines if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more"]


class Checkpoints:
  """The checkpoints of one run, `<workdir>/checkpoints/<step>/`."""

  def __init__(self, workdir, keep: int = 2, create: bool = True):
    self.path = (pathlib.Path(workdir) / "checkpoints").absolute()
    if not create and not self.path.is_dir():
      raise ConfigError(
        f"no checkpoints under {self.path}; train first (python train.py --config=... --workdir={workdir}) "
        "or name another --workdir."
      )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=create, enable_async_checkpointing=False
    )
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(
      self.path, options=options, item_names=tuple(handlers), item_handlers=handlers
    )

  def latest(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All complete steps, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, record: dict):
    """Saves a pytree of arrays and its JSON record; a step that exists already is left alone."""
    if step in self._manager.all_steps():
      return
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
    record = {
      "schema": SCHEMA,
      "step": step,
      "versions": versions(PACKAGES),
      "git": git_revision(),
      **record,
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        record=ocp.args.JsonSave(json.loads(json.dumps(record))),
      ),
    )
    self._manager.wait_until_finished()
    logging.info("checkpoint of step %d in %s", step, self.path)

  def record(self, step: int | None = None) -> dict:
    """The JSON record of a step (default: newest).

    Raises:
      ConfigError: if there is no such step, it cannot be read, or it was written by another schema.
    """
    step = self._step(step)
    with self._readable(step):
      record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
        "record"
      ]
      schema = record["schema"]
    if schema != SCHEMA:
      raise ConfigError(
        f"checkpoint {self.path}/{step} has schema {schema}, this code reads {SCHEMA}; "
        f"use the revision that wrote it ({record.get('git')})."
      )
    return record

  def restore(self, template, step: int | None = None, *, ignore_extra: bool = False):
    """The arrays of a step in the form of `template` (arrays or ShapeDtypeStructs).

    Args:
      ignore_extra: leaves of the checkpoint that the template lacks are dropped (another method on the same weights).

    Raises:
      Mismatch: lists the leaves that differ.
      ConfigError: if there is no such step, or it cannot be read.
    """
    step = self._step(step)
    with self._readable(step):
      metadata = self._manager.item_metadata(step)["arrays"]
      found = dict(getattr(metadata, "tree", metadata))
    wanted = flatten(template)
    if ignore_extra:
      # Only whole groups are optional: the checkpoint's optimizer, raw weights, or another method's parameters.
      candidates = {k: v for k, v in found.items() if k in wanted}
    else:
      candidates = found
    lines = differences(wanted, candidates)
    if lines:
      raise Mismatch(
        f"checkpoint {self.path}/{step} does not fit this model; leaves that differ:\n  "
        + "\n  ".join(lines),
        sorted(wanted.keys() - found.keys()),
      )
    abstract = {k: np.zeros(v.shape, v.dtype) for k, v in found.items()}
    with self._readable(step):
      arrays = self._manager.restore(
        step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
      )["arrays"]
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree_util.tree_unflatten(
      treedef, [arrays[_name(path)].astype(leaf.dtype) for path, leaf in leaves]
    )

  @contextlib.contextmanager
  def _readable(self, step):
    """What goes wrong inside is a damaged checkpoint, and said to be one."""
    try:
      yield
    except Exception as error:
      # Any: what Orbax raises depends on which file is broken and how, mostly a lookup error that hides the cause, and it
      # documents none of it. Nothing is hidden here: the error's first words and its trace go with ours.
      cause = (
        str(error) if len(str(error)) <= 300 else f"{str(error)[:300]} ..."
      )  # Orbax adds its spec, in pages of JSON.
      before = [s for s in self.steps() if s < step]
      wayout = (
        f"to go on from step {before[-1]}" if before else "to start over: there is no earlier one"
      )
      raise ConfigError(
        f"checkpoint {self.path}/{step} is damaged and cannot be read ({type(error).__name__}: {cause}); "
        f"delete that folder {wayout}."
      ) from error

  def _step(self, step):
    known = self.steps()
    if not known:
      raise ConfigError(f"no checkpoint under {self.path}; train first, or name another --workdir.")
    if step is None:
      return known[-1]
    if step not in known:
      raise ConfigError(f"no checkpoint of step {step} under {self.path}; there are {known}.")
    return step

  def close(self):
    """Waits for what is being written."""
    self._manager.close()
