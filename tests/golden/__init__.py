"""Golden tables: numbers that code is held to, kept as JSON so that a change shows in the diff.

python -m tests.golden memory              measures and prints what differs
python -m tests.golden memory --write      writes tests/golden/memory.json
"""

import json
import pathlib

FOLDER = pathlib.Path(__file__).parent


def path(name: str) -> pathlib.Path:
  return FOLDER / f"{name}.json"


def read(name: str) -> dict:
  """The table `name`; empty if there is none yet."""
  return json.loads(path(name).read_text()) if path(name).exists() else {}


def write(name: str, table: dict) -> pathlib.Path:
  path(name).write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
  return path(name)
