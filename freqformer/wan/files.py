"""Weights and configs of a downloaded model: safetensors and JSON, never a pickle.

A folder has one `.safetensors` file, or shards and a `*.safetensors.index.json` that says which
tensor is in which. Headers are read at once, and everything that does not fit is refused then;
tensors are read one by one, when they are asked for.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors

from freqformer.config import ConfigError
from freqformer.wan.json_file import read_object

_ENDING = ".safetensors"
_INDEX = ".safetensors.index.json"
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
# By the names in a file's header. NumPy knows bfloat16 by name since ml_dtypes was imported:
# without that, safetensors cannot make such an array.
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_AGAIN = "download it again"


class Tensors(Mapping[str, np.ndarray]):
  """Tensors of one file or folder by name; each is read when it is asked for, and not kept.

  Attributes:
    folder: where they were found.
    shapes: of all tensors, by name.
    dtypes: likewise: float32, float16 or bfloat16.
  """

  def __init__(self, folder: pathlib.Path, opened: Mapping[pathlib.Path, object]):
    """Merges the headers of files.

    Raises:
      ConfigError: a tensor is in two files, is no weight, or belongs to a LoRA.
    """
    self.folder = folder
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, np.dtype] = {}
    self._opened = dict(opened)
    self._files: dict[str, pathlib.Path] = {}
    for path, file in self._opened.items():
      for name in file.keys():
        self._add(name, path, file.get_slice(name))

  def _add(self, name: str, path: pathlib.Path, header) -> None:
    if name in self._files:
      raise ConfigError(
        f"{name} is in two files, {self._files[name]} and {path}; keep one set of weights in the "
        "folder."
      )
    if "lora_" in name.lower():
      raise ConfigError(
        f"{path} holds a LoRA ({name}), which is not supported yet; name a folder of full weights, "
        "e.g. with the LoRA merged into them."
      )
    dtype = header.get_dtype()
    if dtype not in _DTYPES:
      raise ConfigError(
        f"{path} has {name} as {dtype}; weights may be {', '.join(_DTYPES)}: download them "
        "unquantised."
      )
    self._files[name] = path
    self.shapes[name] = tuple(header.get_shape())
    self.dtypes[name] = _DTYPES[dtype]

  def file_of(self, name: str) -> pathlib.Path:
    """Returns the file that a tensor is in."""
    return self._files[name]

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads a tensor.

    Raises:
      KeyError: there is none of that name.
      ConfigError: the file cannot be read any more.
    """
    path = self._files[name]
    try:
      return self._opened[path].get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
      raise ConfigError(f"{path}: {name} cannot be read ({error}); {_AGAIN}.") from error

  def first_row(self, name: str) -> np.ndarray:
    """Reads the first entry of a tensor along its first axis, all of one with fewer than two.

    Raises:
      KeyError: there is none of that name.
      ConfigError: the file cannot be read any more.
    """
    if len(self.shapes[name]) < 2:
      return self[name]
    path = self._files[name]
    try:
      return self._opened[path].get_slice(name)[0:1]
    except (OSError, safetensors.SafetensorError) as error:
      raise ConfigError(f"{path}: {name} cannot be read ({error}); {_AGAIN}.") from error

  def __contains__(self, name: object) -> bool:
    return name in self._files  # a Mapping's own reads the tensor to find out

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def open_tensors(path: str | pathlib.Path) -> Tensors:
  """Opens the weights of a folder, or of a single file.

  Raises:
    ConfigError: there are none, they are pickles, a file is cut, or files do not belong together;
      also as of `Tensors`.
  """
  path = pathlib.Path(path)
  if path.is_file():
    refuse_pickles(path)
    return Tensors(path.parent, {path: _open(path)})
  if not path.is_dir():
    raise ConfigError(f"there is no folder {str(path)!r}; name one that a model was downloaded to.")
  files = _visible(path, _ENDING)
  indices = _visible(path, _INDEX)
  if not files and not indices:
    refuse_pickles(path)
    raise ConfigError(
      f"{str(path)!r} holds no {_ENDING} file; name the folder that the weights are in."
    )
  if len(indices) > 1 or (len(files) > 1 and not indices):
    found = ", ".join(file.name for file in (indices if len(indices) > 1 else files)[:4])
    raise ConfigError(
      f"{str(path)!r} holds more than one set of weights ({found}) and nothing that says which is "
      f"meant; keep one file, or shards with their *{_INDEX}."
    )
  if not indices:
    return Tensors(path, {files[0]: _open(files[0])})
  return _open_shards(path, indices[0], files)


def refuse_pickles(path: pathlib.Path) -> None:
  """Refuses a file, or a folder with a file, that could run programs when it is loaded.

  Raises:
    ConfigError: says which file, and what to download in its place.
  """
  candidates = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
  for file in candidates:
    if file.suffix.lower() in _PICKLES:
      raise ConfigError(
        f"{file} is a pickle, which could run any program when it is loaded, and is never read; "
        "download the repository whose name ends in -Diffusers, which has safetensors, e.g. "
        "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR."
      )


def read_config(folder: str | pathlib.Path) -> dict:
  """Reads `config.json` of a folder.

  Raises:
    ConfigError: there is none, or it is no JSON object.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.is_file():
    refuse_pickles(path.parent)
  return read_object(path)


def part(folder: str | pathlib.Path, name: str) -> pathlib.Path:
  """Returns the folder of a part of a model, e.g. "vae": below `folder`, or `folder` itself."""
  below = pathlib.Path(folder) / name
  return below if below.is_dir() else pathlib.Path(folder)


def _visible(folder: pathlib.Path, ending: str) -> list[pathlib.Path]:
  """Returns the files with an ending, in order; systems leave hidden ones beside others' names."""
  found = (path for path in folder.iterdir() if path.name.endswith(ending) and path.is_file())
  return sorted(path for path in found if not path.name.startswith("."))


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, framework="np")
  except (OSError, safetensors.SafetensorError) as error:
    raise ConfigError(f"{path} is cut or no safetensors file ({error}); {_AGAIN}.") from error


def _open_shards(folder: pathlib.Path, index: pathlib.Path, files: list[pathlib.Path]) -> Tensors:
  """Opens shards, all of which and whose tensors are as an index says."""
  places = _read_index(index)
  named = {folder / name for name in places.values()}
  for path in sorted(named):
    if not path.is_file():
      raise ConfigError(f"{index} names {path.name}, which is not there; download that file, too.")
  for path in files:
    if path not in named:
      raise ConfigError(
        f"{path} is not named by {index.name} beside it; keep one set of weights in the folder."
      )
  tensors = Tensors(folder, {path: _open(path) for path in sorted(named)})
  for name, file in places.items():
    if name not in tensors or tensors.file_of(name).name != file:
      raise ConfigError(
        f"{folder / file} lacks {name}, which {index.name} says is in it; download both again."
      )
  for name in tensors:
    if name not in places:
      raise ConfigError(
        f"{tensors.file_of(name)} holds {name}, which {index.name} does not name; download both "
        "again."
      )
  return tensors


def _read_index(index: pathlib.Path) -> dict[str, str]:
  """Reads the names of files by the names of tensors."""
  try:
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    sound = isinstance(places, dict) and all(isinstance(file, str) for file in places.values())
  except (OSError, ValueError, KeyError, TypeError):
    sound = False
  if not sound or not places:
    raise ConfigError(f"{index} is no index of shards, a JSON object with a weight_map; {_AGAIN}.")
  for file in places.values():
    # A file of another folder is none of this download.
    if pathlib.PurePath(file).name != file or not file.endswith(_ENDING):
      raise ConfigError(f"{index} names {file!r}, which is no {_ENDING} file beside it; {_AGAIN}.")
  return places
