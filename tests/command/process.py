"""Commands as a user runs them, on a small rendered data set.

They run in this process: to import JAX is most of what a process of their own would cost.
"""

import contextlib
import io
import logging
import pathlib
import runpy
import sys
import types

import jax
from absl import flags

from freqformer.data.render import RenderedSet, render_ucf101

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny_config.py"


def render(place, classes):
  sizes = RenderedSet(classes=classes, groups=3, clips_per_group=1, rows=48, cols=64)
  render_ucf101(place / "ucf", sizes)


def call(place, script, *args, code=0):
  """Returns what a script printed and logged; it must end with `code` and without a traceback.

  train.py takes the tiny config and the data in `place`, if it is given no config.
  """
  if script == "train.py" and not any(arg.startswith("--config=") for arg in args):
    data = (f"--config.data.root={place / 'ucf'}", f"--config.data.cache={place / 'cache'}")
    args = (f"--config={TINY}", *data, *args)
  caches = jax.config.jax_compilation_cache_dir
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  out, err = io.StringIO(), io.StringIO()
  log = logging.StreamHandler(err)
  argv, sys.argv = sys.argv, [script, *args]
  logging.getLogger("absl").addHandler(log)
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(place):
      runpy.run_path(str(ROOT / script), run_name="__main__")
  except SystemExit as end:
    assert (end.code or 0) == code, err.getvalue()[-3000:]
  finally:
    sys.argv = argv
    logging.getLogger("absl").removeHandler(log)
    jax.config.update("jax_compilation_cache_dir", caches)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    for name in set(flags.FLAGS):  # the next script has flags of its own
      module = flags.FLAGS.find_module_defining_flag(name)
      if name.split(".")[0] == "config" or module.startswith(str(ROOT)):
        delattr(flags.FLAGS, name)
  assert "Traceback" not in err.getvalue(), err.getvalue()[-3000:]
  return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
