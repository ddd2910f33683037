"""The JSON files that describe the parts of a pretrained model."""

import json
import pathlib

from freqformer.config import ConfigError


def read_object(path: pathlib.Path) -> dict:
  """Returns the object that a JSON file holds.

  Raises:
    ConfigError: the file is missing, is not JSON, or holds another value than an object.
  """
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ConfigError(
      f"{path} is missing; name the folder of a whole model in diffusers' layout."
    ) from error
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON ({error}); download it again.") from error
  if not isinstance(found, dict):
    raise ConfigError(f"{path} holds no JSON object; download it again.")
  return found
