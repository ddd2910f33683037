"""Cases that the tests of the simulator share: plans, measured rows, the rows of a command line."""

import json

from freqformer.simulation import command
from freqformer.simulation.descriptions import load_model
from freqformer.simulation.forward import Plan, make_method


def rows_of(*argv) -> list[dict]:
  return json.loads(command.run([*argv, "--format=json"]))


def plan(model="wan2.1-1.3b", method="dense", grid=(21, 30, 52), **fields) -> Plan:
  return Plan(load_model(model), method, make_method(method), grid, **fields)


CALL = dict(name="x", gpu="h100", heads=16, head_dim=128, tokens=16384, seconds=3.4e-3)


def written(path, *rows):
  """Writes measured rows and returns the path."""
  path.write_text(json.dumps(rows))
  return path
