"""The console entries of the package; the scripts at the root of a checkout call them too."""

import functools
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


train = functools.partial(_run, "freqformer.command.train")
evaluate = functools.partial(_run, "freqformer.command.eval")
sweep = functools.partial(_run, "freqformer.command.sweep")
simulate = functools.partial(_run, "freqformer.simulation.command")
demo = functools.partial(_run, "freqformer.command.demo")
report = functools.partial(_run, "freqformer.pages.run")
