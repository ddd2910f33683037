"""Shipped configs with the method, tiles and windows of when rows and golden tables were made."""

import pathlib

from ml_collections import ConfigDict

from freqformer.command.files import read_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Below `model.attention`.
SETTINGS = {
  "comparison": {
    "method": "freqformer",
    "tile": (4, 4, 4),
    "freqformer.deal": "as_is",
    "sparseflow.schedule.frames": (1, 2),
    "sparseflow.around": (1, 2),
  },
  "ucf101": {"method": "freqformer", "freqformer.window": (1, 3, 3), "freqformer.deal": "as_is"},
}


def earlier_config(name: str) -> ConfigDict:
  """Returns the complete config of configs/<name>.py as it was."""
  config = read_config(CONFIGS / f"{name}.py")
  settings = SETTINGS[name].items()
  config.update_from_flattened_dict({f"model.attention.{key}": value for key, value in settings})
  return config
