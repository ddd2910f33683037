"""Orbax checkpoints: all that a run needs to go on bit for bit, and all that a sampler needs.

`arrays` is one flat `{path: array}` tree, so that a checkpoint of another model is refused by
naming the leaves that differ. `record` is JSON: step, config, class map, statistics, data iterator.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import AbstractMesh

from freqformer import disk
from freqformer.config import ConfigError
from freqformer.model.leaves import flatten, leaf_name
from freqformer.versions import git_revision, versions

SCHEMA = 1
# Distributions whose versions shape results.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")
_DELETING_SECONDS = 0.2  # that a checkpoint's folder stays while what is in it is deleted
_LISTED = 12  # differing leaves that a refusal names
_QUOTED = 300  # characters of Orbax's own error; it adds its specification, in pages of JSON


class Mismatch(ConfigError):
  """A checkpoint of another model, which lacks the leaves `missing`."""

  def __init__(self, message: str, missing: list[str]):
    super().__init__(message)
    self.missing = missing


class Gone(ConfigError):
  """A checkpoint that was deleted while it was read: the run that trains there goes on."""


def _bytes(state) -> int:
  """Returns the size of a pytree of arrays; on disk it is a little smaller."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _differences(wanted: dict, found: dict) -> list[str]:
  """Returns one line per leaf whose presence or shape differs."""
  lines = []
  for name, leaf in sorted(wanted.items()):
    have = f"{tuple(found[name].shape)} in" if name in found else "missing in"
    if name not in found or found[name].shape != leaf.shape:
      lines.append(f"{name}: {have} the checkpoint, the model wants {tuple(leaf.shape)}")
  for name in sorted(found.keys() - wanted.keys()):
    lines.append(f"{name}: {tuple(found[name].shape)} in the checkpoint, unknown to the model")
  more = len(lines) - _LISTED
  return lines if more <= 0 else [*lines[:_LISTED], f"... and {more} more"]


def _abstract(saved, wanted):
  """Returns what a leaf is read into: an array on devices if it is `wanted` there, else NumPy's."""
  placed = wanted.sharding if isinstance(wanted, jax.ShapeDtypeStruct) else None
  # Shapes that were found where a mesh is set lie on its abstract form, which has no devices.
  if placed is None or isinstance(getattr(placed, "mesh", None), AbstractMesh):
    return np.zeros(saved.shape, saved.dtype)
  return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=placed)


@dataclasses.dataclass
class _NewestAndBest:
  """Which checkpoints Orbax does not delete.

  Attributes:
    keep: number of newest ones.
    keep_best: the best one, too.
    loss: returns the validation loss of a step, or None.
  """

  keep: int
  keep_best: bool
  loss: Callable[[int], float | None]

  def best(self, steps: Sequence[int]) -> int | None:
    """Returns the step of least loss; of equal ones the newest."""
    losses = {step: self.loss(step) for step in sorted(steps, reverse=True)}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    return min(known, key=known.get, default=None)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Is called by Orbax."""
    steps = [each.step for each in checkpoints]
    wanted = set(sorted(steps)[-self.keep :])
    if self.keep_best:
      wanted.add(self.best(steps))
    return [step in wanted for step in steps]


class Checkpoints:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>/`."""

  def __init__(
    self,
    workdir,
    keep: int = 2,
    create: bool = True,
    keep_best: bool = False,
    in_background: bool = False,
  ):
    """Opens the folder.

    Args:
      workdir: the run's folder.
      keep: number of newest checkpoints that stay.
      create: make the folder.
      keep_best: the checkpoint whose record has the least `val_loss` stays, too.
      in_background: `save` returns once it has copied the arrays; a thread writes them.
    """
    self.path = (pathlib.Path(workdir) / "checkpoints").absolute()
    self._in_background = in_background
    self._losses: dict[int, float | None] = {}  # of validation at steps that were looked at
    self._most = keep + int(keep_best)
    self._writing: tuple[int, int] | None = None  # step and bytes of what is not on disk yet
    self._kept = _NewestAndBest(keep, keep_best, self._loss)
    if not create and not self.path.is_dir():
      raise ConfigError(
        f"no checkpoints under {self.path}; train first (python train.py --config=... "
        f"--workdir={workdir}) or name another --workdir."
      )
    if create:  # Orbax would find out at the first save that a file is in the way
      self.path.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self.path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept, create=create, enable_async_checkpointing=in_background
      ),
      item_handlers={
        "arrays": ocp.StandardCheckpointHandler(),
        "record": ocp.JsonCheckpointHandler(),
      },
    )

  def latest(self) -> int | None:
    """Returns the newest complete step, or None."""
    self.wait()
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns all complete steps, ascending."""
    self.wait()
    return sorted(self._manager.all_steps())

  def best(self) -> dict | None:
    """Returns `step` and `val_loss` of the checkpoint that validated best, None if none did."""
    step = self._kept.best(self.steps())
    return None if step is None else {"step": step, "val_loss": self._loss(step)}

  def _loss(self, step: int) -> float | None:
    """Returns the validation loss in a checkpoint's record; None if it is not known."""
    if step not in self._losses:
      with contextlib.suppress(ConfigError):  # a damaged one may go
        self._losses[step] = self.record(step).get("val_loss")
    return self._losses.get(step)

  def intact(self) -> str:
    """Returns a clause for a message about the disk: "step 10 is intact", or that there is none."""
    known = self.steps()
    return f"step {known[-1]} is intact" if known else "there is no earlier checkpoint"

  def remove_unfinished(self):
    """Removes what a process that was killed while it saved has left, and says what goes on.

    Of several processes the first one does it.
    """
    if jax.process_index():
      return
    newest = self.latest()
    for part in self.path.glob("[0-9]*.*tmp*"):
      shutil.rmtree(part, ignore_errors=True)
      step = int(part.name.partition(".")[0])
      if newest is None or step > newest:
        goes_on = "starting over" if newest is None else f"going on from step {newest}"
        logging.warning("the checkpoint of step %d was not finished; %s", step, goes_on)

  def newest_before(self, step: int) -> int | None:
    """Returns the newest complete step before another one, or None."""
    return max((known for known in self.steps() if known < step), default=None)

  def delete_after(self, step: int):
    """Deletes the checkpoints of later steps."""
    for known in self.steps():
      if known > step:
        self._manager.delete(known)

  def check_space(self, state):
    """Compares the free space with what the checkpoints of a state will take.

    A new checkpoint is written before the oldest one is deleted.

    Raises:
      ConfigError: not even one has space.
    """
    one = _bytes(state)
    free = disk.free_bytes(self.path)
    if one > free:
      raise ConfigError(disk.no_space(self.path, "a checkpoint", one, self.intact()))
    more = max(1, self._most + 1 - len(self.steps()))
    if more * one > free:
      logging.warning(
        "%s has %s of free space, but %d more checkpoints of %s each will be there at a time; "
        "free some, or lower train.keep",
        self.path,
        disk.size_text(free),
        more,
        disk.size_text(one),
      )

  def save(self, step: int, state, record: dict):
    """Saves a pytree of arrays and its JSON record; a step that exists already is left alone.

    It waits for the save before, if that is still under way.

    Raises:
      ConfigError: the disk is full, for this checkpoint or for that before; names what is intact.
    """
    if step in self.steps():
      return
    # JAX's own stay as they are: each process writes its parts.
    arrays = {
      name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
      for name, leaf in flatten(state).items()
    }
    own = {"schema": SCHEMA, "step": step, "versions": versions(PACKAGES), "git": git_revision()}
    plain = json.loads(json.dumps(own | record))
    self._losses[step] = plain.get("val_loss")
    self.best()  # the losses of earlier ones are read before Orbax, in a save, asks for them
    items = ocp.args.Composite(
      arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(plain)
    )
    # Refused before Orbax begins: its threads print traces of their own about a full disk.
    if _bytes(state) > disk.free_bytes(self.path):
      what = f"the checkpoint of step {step}"
      raise ConfigError(disk.no_space(self.path, what, _bytes(state), self.intact()))
    with self._whole(step, _bytes(state)):
      self._manager.save(step, args=items)
    self._writing = step, _bytes(state)
    if not self._in_background:
      self.wait()

  def poll(self):
    """Ends a save whose writing has ended, and does not wait for one that has not.

    Raises:
      ConfigError: as `save`.
    """
    if self._writing is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self):
    """Waits until all that was saved is on disk; raises as `save`."""
    if self._writing is None:
      return
    step, size = self._writing
    self._writing = None  # what names the intact checkpoints does not wait
    with self._whole(step, size):
      self._manager.wait_until_finished()
    logging.info("checkpoint of step %d in %s", step, self.path)

  @contextlib.contextmanager
  def _whole(self, step: int, size: int):
    """Says that the disk is full; removes the half-written folder of a step that is not saved."""
    with disk.space_for(f"the checkpoint of step {step}", self.path, size, self.intact):
      try:
        yield
      except Exception:  # is raised again, whatever it is
        for part in self.path.glob(f"{step}.*tmp*"):
          shutil.rmtree(part, ignore_errors=True)
        raise

  def record(self, step: int | None = None) -> dict:
    """Reads the JSON record of a step (default: the newest); raises ConfigError if it cannot."""
    step = self._step(step)
    with self._readable(step):
      wanted = ocp.args.Composite(record=ocp.args.JsonRestore())
      record = self._manager.restore(step, args=wanted)["record"]
      schema = record["schema"]
    if schema != SCHEMA:
      raise ConfigError(
        f"checkpoint {self.path}/{step} has schema {schema}, this code reads {SCHEMA}; "
        f"use the revision that wrote it ({record.get('git')})."
      )
    return record

  def restore(self, template, step: int | None = None, *, ignore_extra: bool = False):
    """Reads the arrays of a step (default: the newest) in the form of `template`.

    Args:
      template: a pytree of arrays or ShapeDtypeStructs. What is read for one of the latter that
        has a sharding lies as that says, whatever mesh it was saved on; the rest is NumPy's.
      ignore_extra: drop leaves that the template lacks, as a sampler does the optimizer's.

    Raises:
      Mismatch: lists the leaves that differ.
      ConfigError: there is no such step, or it cannot be read.
    """
    step = self._step(step)
    newest = self.latest()
    with self._readable(step):
      metadata = self._manager.item_metadata(step)["arrays"]
      found = dict(getattr(metadata, "tree", metadata))
    wanted = flatten(template)
    compared = {k: v for k, v in found.items() if k in wanted} if ignore_extra else found
    lines = _differences(wanted, compared)
    if lines:
      if self._is_gone(step, newest):  # what lists its leaves was deleted
        raise self._gone(step)
      raise Mismatch(
        f"checkpoint {self.path}/{step} does not fit this model; leaves that differ:\n  "
        + "\n  ".join(lines),
        sorted(wanted.keys() - found.keys()),
      )
    abstract = {k: _abstract(v, wanted.get(k)) for k, v in found.items()}
    with self._readable(step):
      asked = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
      arrays = self._manager.restore(step, args=asked)["arrays"]
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: arrays[leaf_name(path)].astype(leaf.dtype), template
    )

  @contextlib.contextmanager
  def _readable(self, step: int):
    """Calls the checkpoint deleted or damaged in a ConfigError, whatever goes wrong inside."""
    before = self.latest()
    try:
      yield
    except Exception as error:  # Orbax documents none of its errors; they differ by broken file
      if self._is_gone(step, before):
        raise self._gone(step) from error
      cause = str(error)
      if len(cause) > _QUOTED:
        cause = f"{cause[:_QUOTED]} ..."
      before = [known for known in self.steps() if known < step]
      remedy = f"to go on from step {before[-1]}" if before else "to start over: it is the first"
      raise ConfigError(
        f"checkpoint {self.path}/{step} is damaged and cannot be read ({type(error).__name__}: "
        f"{cause}); delete that folder {remedy}."
      ) from error

  def _gone(self, step: int) -> Gone:
    return Gone(
      f"checkpoint {self.path}/{step} was deleted while it was read, because training goes on "
      f"there and keeps few; there are {self.steps()}: run the same command again."
    )

  def _is_gone(self, step: int, before: int | None) -> bool:
    """Tells whether a step was deleted, or a newer one than `before` has come, which deletes it."""
    for wait in (0, _DELETING_SECONDS):
      time.sleep(wait)
      self._manager.reload()
      if step not in self.steps() or self.latest() != before:
        return True
    return False

  def _step(self, step: int | None) -> int:
    known = self.steps()
    if not known:
      raise ConfigError(f"no checkpoint under {self.path}; train first, or name another --workdir.")
    if step is None:
      return known[-1]
    if step not in known:
      raise ConfigError(f"no checkpoint of step {step} under {self.path}; there are {known}.")
    return step

  def close(self):
    """Waits for what is being written; raises as `save`."""
    self.wait()
    self._manager.close()
