"""Files of kernel configurations by key, as a search writes them and kernels look them up."""

import json
import pathlib


def read(path: pathlib.Path, key: type, config: type) -> dict:
  """Returns the configurations of a file by key; none where there is no file.

  Args:
    path: of the file.
    key: dataclass of the keys.
    config: dataclass of the configurations; `check(key)` returns one that fits.

  Raises:
    ValueError: if a configuration does not fit its key.
  """
  if not path.exists():
    return {}
  rows = json.loads(path.read_text())["configs"]
  return {key(**row["key"]): config(**row["config"]).check(key(**row["key"])) for row in rows}


def write(configs: dict, facts: dict, path: pathlib.Path) -> None:
  """Writes what was found, and `facts` on where (device, versions, command)."""
  rows = [{"key": vars(key), "config": vars(configs[key])} for key in sorted(configs)]
  path.write_text(json.dumps({"facts": facts, "configs": rows}, indent=1) + "\n")
