"""Runs `python -m freqformer.report`; the code is in freqformer/pages/run.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("freqformer.pages.run", run_name="__main__", alter_sys=True)
