"""The weights that a run starts from, where they are another run's: `train.init_from`.

They come from a run's checkpoint, or from a file that `python -m freqformer.export` made of one:
safetensors, with the arrays by name and, under the key "freqformer" of its header, the checkpoint's
record as JSON.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from flax import nnx

from freqformer import disk
from freqformer.config import ConfigError
from freqformer.data.sources import class_names
from freqformer.methods.base import Method
from freqformer.model.architectures import make_model
from freqformer.model.leaves import flatten, leaf_name
from freqformer.train.checkpoint import SCHEMA, Checkpoints
from freqformer.train.experiment import Experiment, experiment, of_record
from freqformer.train.resume import check_same_statistics

# The model's settings that no array's shape tells.
_ALIKE = ("patch", "precondition")
_LISTED = 4  # arrays that a message names
ENDING = ".safetensors"
_HEADER = "freqformer"  # its key that holds the record
# What of a record a file keeps: what the checks below, readers and samplers need.
_TOLD = (
  "schema",
  "step",
  "config",
  "class_names",
  "statistics",
  "latent_shape",
  "video_shape",
  "fps",
  "val_loss",
  "versions",
  "git",
)
Runs = Sequence[tuple[int, Method]]  # of `ModelConfig.runs`


@dataclasses.dataclass(frozen=True)
class Origin:
  """Averaged weights of another run's checkpoint.

  Attributes:
    path: that run's folder, or a file of its weights.
    record: of the checkpoint, or what a file tells of it.
    arrays: by name; of a run of layers one array per layer, by the layer's number, so that other
      runs of layers can take them. Names of a method's own parameters have its class.
  """

  path: pathlib.Path
  record: dict
  arrays: dict[str, np.ndarray]

  @classmethod
  def read(cls, init_from: str) -> "Origin":
    """Reads the averaged weights that `train.init_from` names.

    They are of the newest checkpoint in a run's folder, of one of its steps as in "runs/dense:500",
    or in a file as "dense.safetensors".

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    if init_from.endswith(ENDING):
      return cls._of_file(pathlib.Path(init_from).expanduser().absolute())
    folder, step = re.fullmatch(r"(.+?)(?::(\d+))?", init_from).groups()
    workdir = pathlib.Path(folder).expanduser().absolute()
    checkpoints = Checkpoints(workdir, create=False)
    record = checkpoints.record(None if step is None else int(step))
    old = of_record(record["config"])
    weights = {"ema": _parameters(old, record["class_names"])}
    tree = checkpoints.restore(weights, record["step"], ignore_extra=True)
    checkpoints.close()
    arrays = {}
    for name, leaf in flatten(tree["ema"]).items():
      names = _names(name, old.model.runs())
      arrays |= zip(names, leaf if _is_stacked(name) else [leaf], strict=True)
    return cls(workdir, record, arrays)

  @classmethod
  def _of_file(cls, path: pathlib.Path) -> "Origin":
    try:
      with safetensors.safe_open(path, framework="np") as file:
        told = (file.metadata() or {}).get(_HEADER)
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
      raise ConfigError(f"{path} cannot be read ({error}); name a file of weights.") from error
    if told is None:
      raise ConfigError(
        f"{path} does not say what model its {len(arrays)} arrays are of; name a file that "
        "python -m freqformer.export wrote."
      )
    record = json.loads(told)
    if record["schema"] != SCHEMA:
      raise ConfigError(
        f"{path} has schema {record['schema']}, this code reads {SCHEMA}; use the revision that "
        f"wrote it ({record['git']})."
      )
    return cls(path, record, arrays)

  def write(self, path: pathlib.Path):
    """Writes the file that `read` takes; it names no folder of this machine.

    Raises:
      ConfigError: the file has another ending, or the disk is full.
    """
    if path.suffix != ENDING:
      raise ConfigError(f"{path} must end in {ENDING}, by which train.init_from knows a file.")
    record = {key: self.record[key] for key in _TOLD if key in self.record}
    record["config"] = _without_folders(record["config"])
    arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
    part = path.with_name(f".{path.name}.part")
    size = sum(array.nbytes for array in arrays.values())
    with disk.space_for(str(path), path.parent, size):
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(arrays, part, {_HEADER: json.dumps(record)})
        part.replace(path)
      finally:
        part.unlink(missing_ok=True)

  def fitted(self, config: Mapping) -> tuple[Experiment, dict]:
    """Checks that a run of this config can start here, before its data are encoded.

    Returns:
      The experiment, which keeps what the other run's grid decided, and facts for its records.

    Raises:
      ConfigError: they have other codecs, classes or arrays, or `train.freeze` leaves nothing.
    """
    exp = experiment(config, self.record["config"])
    old = of_record(self.record["config"])
    names = class_names(exp.data)
    pairs = {f"model.{key}": (getattr(old.model, key), getattr(exp.model, key)) for key in _ALIKE}
    pairs["data.condition"] = (old.data.condition, exp.data.condition)
    pairs["data.codec"] = (getattr(old.data, "codec", None), getattr(exp.data, "codec", None))
    pairs["the class map"] = (self.record["class_names"], list(names))
    for key, (there, here) in pairs.items():
      if there != here:
        raise self._refusal(f"{key} is {there!r} there, {here!r} here")
    wanted = {}
    for name, leaf in flatten(_parameters(exp, names)).items():
      shape = leaf.shape[1:] if _is_stacked(name) else leaf.shape
      wanted |= dict.fromkeys(_names(name, exp.model.runs()), shape)
    found = {name: array.shape for name, array in self.arrays.items()}
    matched = wanted.keys() & found.keys()
    new = wanted.keys() - found.keys()
    left_over = found.keys() - wanted.keys()
    other = [name for name in matched if found[name] != wanted[name]]
    wrong = [f"{name} is {found[name]} there, {wanted[name]} here" for name in other]
    wrong += [f"{name} is missing there" for name in new if not _is_of_method(name)]
    wrong += [f"{name} is unknown here" for name in left_over if not _is_of_method(name)]
    if wrong:
      raise self._refusal(_some(wrong) + "; only what belongs to the attention method may differ")
    if exp.train.freeze and not any(map(_is_of_method, wanted)):
      raise ConfigError(
        f"train.freeze={exp.train.freeze!r} leaves nothing to train: attention method "
        f"{exp.model.attention.method!r} has no parameters of its own."
      )
    facts = {
      "path": str(self.path),
      "step": self.record["step"],
      "matched": len(matched),
      "new": sorted(new),
      "left_over": sorted(left_over),
    }
    logging.info(
      "starting from step %d of %s: %d arrays taken; new: %s; left over: %s",
      self.record["step"],
      self.path,
      len(matched),
      _some(new),
      _some(left_over),
    )
    return exp, facts

  def check_statistics(self, statistics: dict):
    """Raises ConfigError if latents are normalised otherwise than the other run's."""
    check_same_statistics(
      self.record["statistics"],
      statistics,
      f"step {self.record['step']} of {self.path} and this run's data",
      "train.init_from needs the same codec and normalisation",
    )

  def into(self, params, exp: Experiment):
    """Returns fresh parameters of an experiment that `fitted` with these arrays in their place."""

    def taken(path, fresh):
      name = leaf_name(path)
      names = _names(name, exp.model.runs())
      if not _is_stacked(name):
        return jnp.asarray(self.arrays.get(name, fresh))
      return jnp.stack([self.arrays.get(own, x) for own, x in zip(names, fresh, strict=True)])

    return jax.tree_util.tree_map_with_path(taken, params)

  def _refusal(self, reason: str) -> ConfigError:
    return ConfigError(
      f"train.init_from: step {self.record['step']} of {self.path} does not fit: {reason}."
    )


def _parameters(exp: Experiment, names: Sequence[str]):
  """Returns the shapes of a model's parameters."""

  def build():
    return make_model(exp.model, exp.latent_shape, nnx.Rngs(0), **exp.conditioned_on(names))

  return nnx.state(nnx.eval_shape(build))


def _is_stacked(name: str) -> bool:
  return name.startswith("runs/")


def _is_of_method(name: str) -> bool:
  return "/method " in name


def _names(name: str, runs: Runs) -> list[str]:
  """Returns the names, in `Origin.arrays`, of what a model's array holds."""
  if not _is_stacked(name):
    return [name]
  _, run, rest = name.split("/", 2)
  count, method = runs[int(run)]
  first = sum(own for own, _ in runs[: int(run)])
  rest = rest.replace("attention/method/", f"method {type(method).__name__}/", 1)
  return [f"layer {layer}/{rest}" for layer in range(first, first + count)]


def _without_folders(config: Mapping) -> dict:
  """Returns a recorded config in which folders have their last names alone."""
  found = {**config, "data": dict(config["data"]), "train": dict(config["train"])}
  for group, key in (("data", "root"), ("data", "cache"), ("train", "init_from")):
    if key in found[group]:
      found[group][key] = pathlib.Path(found[group][key]).name
  return found


def _some(texts: Iterable[str]) -> str:
  """Returns the first of some texts and the number of the others."""
  texts = sorted(texts)
  more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
  return (", ".join(texts[:_LISTED]) or "none") + more
