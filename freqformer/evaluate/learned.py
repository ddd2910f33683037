"""The file of a method's learned leaves: small, beside a pretrained model, and of that model alone.

It is safetensors: arrays by name, and in the header under "freqformer" what they are of, as JSON.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16, also where safetensors makes arrays
import numpy as np
import safetensors
import safetensors.numpy

from freqformer import disk
from freqformer.config import ConfigError
from freqformer.versions import git_revision, versions
from freqformer.wan.files import Tensors
from freqformer.wan.weights import diffusers_names

ENDING = ".safetensors"
_HEADER = "freqformer"
_SCHEMA = 1  # raise it when leaves of the same name come to mean something else
_PACKAGES = ("jax", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Learned:
  """Learned leaves of a method on a pretrained model.

  Attributes:
    method: as a command line names it.
    base: `weights_hash` of the model that they were learned on.
    arrays: by name, as in a model under the method.
    facts: how they were learned, plain JSON.
    origin: the file that they were read from, for messages.
  """

  method: str
  base: str
  arrays: Mapping[str, np.ndarray]
  facts: dict = dataclasses.field(default_factory=dict)
  origin: str = "what was learned"

  @classmethod
  def read(cls, path: str | pathlib.Path) -> "Learned":
    """Reads a file.

    Raises:
      ConfigError: it is not there, damaged, or no file of learned leaves.
    """
    path = pathlib.Path(path).expanduser()
    try:
      with safetensors.safe_open(path, framework="np") as file:
        told = (file.metadata() or {}).get(_HEADER)
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
      raise ConfigError(f"learned: {path} cannot be read ({error}).") from error
    header = json.loads(told) if told else {}
    if not {"method", "base"} <= header.keys():
      raise ConfigError(
        f"learned: {path} does not say which method and model its arrays are of; name a "
        "learned.safetensors that train.py wrote (configs/wan.py)."
      )
    if header["schema"] != _SCHEMA:
      raise ConfigError(
        f"learned: {path} has schema {header['schema']}, this code reads {_SCHEMA}; use the "
        f"revision that wrote it ({header['git']})."
      )
    return cls(header["method"], header["base"], arrays, header["facts"], str(path))

  def write(self, path: str | pathlib.Path):
    """Writes the file, whole or not at all.

    Raises:
      ConfigError: it has another ending, or the disk is full.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix != ENDING:
      raise ConfigError(f"{path} must end in {ENDING}.")
    header = {
      "schema": _SCHEMA,
      "method": self.method,
      "base": self.base,
      "facts": self.facts,
      "versions": versions(_PACKAGES),
      "git": git_revision(),
    }
    arrays = {name: np.ascontiguousarray(x) for name, x in self.arrays.items()}
    contents = safetensors.numpy.save(arrays, {_HEADER: json.dumps(header)})
    with disk.space_for(str(path), path.parent, len(contents)):
      path.parent.mkdir(parents=True, exist_ok=True)
      disk.write_whole(path, contents)

  def check_base(self, base: str, folder: pathlib.Path):
    """Raises ConfigError if a folder's weights, of this hash, are not those of the learning."""
    if base != self.base:
      raise ConfigError(
        f"{self.origin} was learned on other weights ({self.base[:12]}) than those of {folder} "
        f"({base[:12]}); name the folder that it was learned on, or learn anew."
      )

  def check_leaves(self, shapes: Mapping[str, tuple[int, ...]]):
    """Raises ConfigError if these are not the leaves of a method, given by name and shape."""
    found = {name: array.shape for name, array in self.arrays.items()}
    wrong = sorted(name for name in found.keys() | shapes if found.get(name) != shapes.get(name))
    if wrong:
      name = wrong[0]
      raise ConfigError(
        f"{self.origin} does not fit {self.method}: {name} is {found.get(name, 'missing')} there, "
        f"{shapes.get(name, 'unknown')} here; it is damaged, or was written by other code."
      )


def weights_hash(tensors: Tensors) -> str:
  """Returns a hash that tells a model's weights from others', hex.

  All names, shapes and types count, and of each tensor the first row, a vector whole: merging a
  LoRA or training on changes rows of every matrix that it touches, and little is read. Dates and
  names of files do not count, as a file of leaves goes with the model to other machines. Names are
  diffusers', so that a folder with the authors' is the same model.
  """
  found = hashlib.sha256()
  places = diffusers_names({name: name for name in tensors})
  for name, place in sorted(places.items()):
    row = tensors.first_row(place)
    found.update(json.dumps([name, tensors.shapes[place], str(row.dtype)]).encode())
    found.update(np.ascontiguousarray(row).tobytes())
  return found.hexdigest()
