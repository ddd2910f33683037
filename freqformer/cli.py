"""Entry points: flags are parsed, what the user got wrong is one clear sentence and exit code 2, not a traceback."""

import pathlib
import re
import sys

import jax
from absl import app, flags, logging

from freqformer.config import ConfigError
from freqformer.config_file import check_keys, load_config

_ROOT = pathlib.Path(__file__).parent.parent


def run(main):
  """`app.run` with our error messages; also turns on JAX's compile cache (`.cache/jax` beside the code)."""
  cache = _ROOT / ".cache" / "jax"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(None)
  logging.get_absl_handler().addFilter(_ours_or_warning)

  def guarded(argv):
    try:
      return main(argv)
    except ConfigError as error:
      fail(error)

  app.run(guarded, flags_parser=_parse)


def _ours_or_warning(record) -> bool:
  """Orbax and grain log to absl too: of theirs only errors interest a user (their warnings are about their own plumbing)."""
  ours = pathlib.Path(record.pathname).is_relative_to(_ROOT) and ".venv" not in record.pathname
  return ours or record.levelno >= 40


def fail(error):
  """Prints the sentence and leaves with code 2."""
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)


def _parse(argv):
  """Parses flags; what is wrong with the config file or an override is said before ml_collections meets it."""
  try:
    file = [arg.split("=", 1)[1].split(":")[0] for arg in argv if re.match(r"--?config=", arg)]
    if file:
      overrides = [match.group(1) for arg in argv if (match := re.match(r"--?config\.([\w.]+)", arg))]
      check_keys(load_config(file[-1]).get_config(), overrides)
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
    fail(str(error).strip("'\"").replace("\n", " "))
