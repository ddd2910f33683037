"""Cases that the tests of the simulator share: a plan, and the rows that a command line gives."""

import json

from freqformer.simulation import command
from freqformer.simulation.descriptions import load_model
from freqformer.simulation.forward import Plan, make_method


def rows_of(*argv) -> list[dict]:
  return json.loads(command.run([*argv, "--format=json"]))


def plan(model="wan2.1-1.3b", method="dense", grid=(21, 30, 52), **fields) -> Plan:
  return Plan(load_model(model), method, make_method(method), grid, **fields)
