"""The console entries of the package; the scripts at the root of a checkout call them too."""

import functools
import runpy
import sys


def _run(module: str):
  """Runs a module as `python -m` would, so that `--help` shows its docstring and flags."""
  try:
    # Ctrl-C may come while the command's modules are imported, which takes seconds.
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except KeyboardInterrupt:
    print("stopped by Ctrl-C", file=sys.stderr)
    sys.exit(130)
  except ModuleNotFoundError as error:
    if error.name != "av":  # the one package of an extra that a command needs
      raise
    print(f"error: {error}; install it by pip install 'freqformer[video]'.", file=sys.stderr)
    sys.exit(2)


train = functools.partial(_run, "freqformer.command.train")
evaluate = functools.partial(_run, "freqformer.command.eval")
encode = functools.partial(_run, "freqformer.command.encode")
measure = functools.partial(_run, "freqformer.command.measure")
sweep = functools.partial(_run, "freqformer.command.sweep")
simulate = functools.partial(_run, "freqformer.simulation.command")
demo = functools.partial(_run, "freqformer.command.demo")
report = functools.partial(_run, "freqformer.command.report")
export = functools.partial(_run, "freqformer.command.export")
pans = functools.partial(_run, "freqformer.command.pans")
theory = functools.partial(_run, "freqformer.analysis.theory")
