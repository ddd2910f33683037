"""The console entries of the package; the scripts at the root of a checkout call them too."""

import runpy
import sys

# Packages of pyproject.toml's extras that a command needs, with the extra that brings each.
_EXTRAS = {"av": "video"}


def _run(module: str):
  """Runs a module as `python -m` would, so that `--help` shows its docstring and flags."""
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except ModuleNotFoundError as error:
    if error.name not in _EXTRAS:
      raise
    extra = _EXTRAS[error.name]
    print(f"error: {error}; install it by pip install 'freqformer[{extra}]'.", file=sys.stderr)
    sys.exit(2)


def train():
  """Runs `freqformer-train` and `train.py`."""
  _run("freqformer.command.train")


def evaluate():
  """Runs `freqformer-eval` and `eval.py`."""
  _run("freqformer.command.eval")


def sweep():
  """Runs `freqformer-sweep` and `python -m freqformer.sweep`."""
  _run("freqformer.command.sweep")


def simulate():
  """Runs `freqformer-simulate` and `python -m freqformer.simulate`."""
  _run("freqformer.simulation.command")


def demo():
  """Runs `python -m freqformer.demo`."""
  _run("freqformer.command.demo")


def report():
  """Runs `python -m freqformer.report`."""
  _run("freqformer.pages.run")
