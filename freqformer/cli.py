"""Entry points: flags are parsed, what the user got wrong is one clear sentence and exit code 2, not a traceback."""

import pathlib
import re
import sys

import jax
from absl import app, flags, logging

from freqformer.config import ConfigError, did_you_mean


def run(main):
  """`app.run` with our error messages; also turns on JAX's compile cache (`.cache/jax` beside the code)."""
  cache = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(None)

  def guarded(argv):
    try:
      return main(argv)
    except ConfigError as error:
      fail(error)

  app.run(guarded, flags_parser=_parse)


def fail(error):
  """Prints the sentence and leaves with code 2."""
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)


def _parse(argv):
  """Parses flags; an unknown override or a wrong type names the keys that exist."""
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
    fail(_explain(error))
  except flags.Error as error:
    fail(_explain(error))


def _explain(error) -> str:
  text = str(error).strip("'\"").replace("\n", " ")
  unknown = re.search(r"--config\.([\w.]+)", text) or re.search(r"[Kk]ey \"?([\w.]+)\"? does not exist", text)
  config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  if unknown is None or config is None:
    return text
  name = unknown.group(1)
  known = _keys(config)
  return text if name in known else f"config.{name} does not exist; {did_you_mean(name, known)}"


def _keys(config, prefix="") -> list[str]:
  """All dotted keys of a config dict."""
  out = []
  for key, value in config.items():
    out.append(prefix + key)
    if hasattr(value, "items"):
      out.extend(_keys(value, prefix + key + "."))
  return out
