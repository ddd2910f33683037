"""Entry points: flags are parsed, what the user got wrong is one clear sentence and exit code 2, not a traceback."""

import ctypes
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import re
import sys
import traceback

import jax
from absl import app, flags, logging

from freqformer.command.files import check_keys, dotted, read_config
from freqformer.config import ConfigError
from freqformer.kernels.core.op import NoImplementation

_ROOT = pathlib.Path(__file__).parents[2]


def run(main):
  """`app.run` with our error messages; also turns on JAX's compile cache (`.cache/jax` beside the code)."""
  cache = _ROOT / ".cache" / "jax"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PLATFORMS" not in os.environ and gpu_wheels_without_gpu():
    jax.config.update("jax_platforms", "cpu")
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(None)
  logging.get_absl_handler().addFilter(_ours_or_warning)
  app.run(guarded(main), flags_parser=parse)


def gpu_wheels_without_gpu() -> bool:
  """Whether JAX's CUDA plugin is here (`make setup` brings it, to compile for absent GPUs) but no NVIDIA driver.

  The plugin would print tracebacks about itself before JAX goes on with the CPU.
  """
  if (
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
  ):
    return False
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return True
  return False


def guarded(main):
  """`main`, whose refusals end the process with one sentence; `--verbosity=1` prints where they come from, too."""

  @functools.wraps(main)
  def run_main(argv):
    try:
      return main(argv)
    except (ConfigError, NoImplementation) as error:
      fail(error)
    except (FileExistsError, NotADirectoryError) as error:
      fail(f"{error.filename} is a file where a folder is needed; name another, or move it away.")
    except (PermissionError, IsADirectoryError) as error:
      fail(f"{error.filename} cannot be used: {error.strerror}.")

  return run_main


def _ours_or_warning(record) -> bool:
  """Orbax and grain log to absl too: of theirs only errors interest a user (their warnings are about their own plumbing)."""
  ours = pathlib.Path(record.pathname).is_relative_to(_ROOT) and ".venv" not in record.pathname
  return ours or record.levelno >= 40


def fail(error):
  """Prints the sentence and leaves with code 2."""
  if logging.level_debug():
    traceback.print_exc()
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)


def parse(argv, values=flags.FLAGS):
  """Parses flags into `values`; what is wrong with the config file or an override is said before ml_collections meets it.

  Whatever belongs to no flag, and a number that is not finite, is refused.
  """
  config = None
  try:
    if file := _config_file(argv):
      config = read_config(*file.split(":", 1))
      overrides = [
        match.group(1) for arg in argv if (match := re.match(r"--?(?:no)?config\.([\w.]+)", arg))
      ]
      check_keys(config, overrides)
    rest = values(argv)
  except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
    # A KeyError's str is its message in quotes.
    fail(
      str(error.args[0] if isinstance(error, KeyError) and error.args else error).replace("\n", " ")
    )
  if rest[1:]:
    fail(_left_over(rest[1], config))
  for name, value in values.flag_values_dict().items():
    if isinstance(value, float) and not math.isfinite(value):
      fail(f"--{name}={value} must be a finite number.")
  return rest


def _config_file(argv) -> str | None:
  """The last of `--config=FILE` and `--config FILE`."""
  found = None
  for arg, after in itertools.zip_longest(argv, argv[1:]):
    if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
      found = after if match.group(1) is None else match.group(1)
  return found


def _left_over(argument: str, config) -> str:
  """Why an argument that belongs to no flag is refused; without its leading `--config.` an override is nothing."""
  key = argument.split("=")[0].removeprefix("config.")
  known = [] if config is None else dotted(config)
  if config is not None and "=" in argument:
    full = key if key in known else next((k for k in known if k.endswith(f".{key}")), None)
    if full:
      return f"{argument!r} belongs to no flag; did you mean --config.{full}={argument.split('=', 1)[1]}?"
  return f"{argument!r} belongs to no flag; flags begin with --, and one that takes a value is written --flag=value."
