"""Commands as a user runs them, in processes of their own, on a small rendered data set."""

import pathlib
import subprocess
import sys

from freqformer.data.render import RenderedSet, render_ucf101

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny_config.py"


def render(place, classes):
  sizes = RenderedSet(classes=classes, groups=3, clips_per_group=1, rows=48, cols=64)
  render_ucf101(place / "ucf", sizes)


def command(place, script, *args):
  """The command line of a script of the checkout; train.py takes the tiny config and the data."""
  flags = []
  if script == "train.py":
    data = (f"--config.data.root={place / 'ucf'}", f"--config.data.cache={place / 'cache'}")
    flags = [f"--config={TINY}", *data]
  return [sys.executable, str(ROOT / script), *flags, *args]


def call(place, script, *args, code=0):
  """Returns what a script printed, which must end with `code` and without a traceback."""
  line = command(place, script, *args)
  done = subprocess.run(line, capture_output=True, text=True, cwd=place, timeout=300)
  assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-3000:]
  return done
