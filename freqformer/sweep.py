"""Runs `python -m freqformer.sweep`; the code is in freqformer/command/sweep.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("freqformer.command.sweep", run_name="__main__", alter_sys=True)
