"""Runs `python -m freqformer.demo`; the code is in freqformer/command/demo.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("freqformer.command.demo", run_name="__main__", alter_sys=True)
