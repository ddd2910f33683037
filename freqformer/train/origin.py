"""The weights that a run starts from, where they are another run's: `train.init_from`."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from freqformer.config import ConfigError
from freqformer.data.sources import class_names
from freqformer.methods.base import Method
from freqformer.model.dit import VideoDiT
from freqformer.train.checkpoint import Checkpoints, flatten, leaf_name
from freqformer.train.experiment import Experiment, experiment, of_record
from freqformer.train.resume import check_same_statistics

# The model's settings that no array's shape tells.
_ALIKE = ("patch", "precondition")
_LISTED = 4  # arrays that a message names
Runs = Sequence[tuple[int, Method]]  # of `ModelConfig.runs`


@dataclasses.dataclass(frozen=True)
class Origin:
  """Averaged weights of another run's checkpoint.

  Attributes:
    workdir: of that run.
    record: of the checkpoint.
    arrays: by name; of a run of layers one array per layer, by the layer's number, so that other
      runs of layers can take them. Names of a method's own parameters have its class.
  """

  workdir: pathlib.Path
  record: dict
  arrays: dict[str, np.ndarray]

  @classmethod
  def read(cls, init_from: str) -> "Origin":
    """Reads the newest checkpoint of a run's folder, or that of a step as in "runs/dense:500".

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
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
      "workdir": str(self.workdir),
      "step": self.record["step"],
      "matched": len(matched),
      "new": sorted(new),
      "left_over": sorted(left_over),
    }
    logging.info(
      "starting from step %d of %s: %d arrays taken; new: %s; left over: %s",
      self.record["step"],
      self.workdir,
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
      f"step {self.record['step']} of {self.workdir} and this run's data",
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
      f"train.init_from: step {self.record['step']} of {self.workdir} does not fit: {reason}."
    )


def _parameters(exp: Experiment, names: Sequence[str]):
  """Returns the shapes of a model's parameters."""

  def build():
    return VideoDiT(exp.model, exp.latent_shape, rngs=nnx.Rngs(0), **exp.conditioned_on(names))

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


def _some(texts: Iterable[str]) -> str:
  """Returns the first of some texts and the number of the others."""
  texts = sorted(texts)
  more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
  return (", ".join(texts[:_LISTED]) or "none") + more
