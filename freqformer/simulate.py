"""Runs `python -m freqformer.simulate`; the code is in freqformer/simulation/command.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("freqformer.simulation.command", run_name="__main__", alter_sys=True)
