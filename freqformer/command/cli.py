"""Entry points of commands: what ends one is one sentence, no traceback.

Exit codes: 2 for what a user can mend, 130 for Ctrl-C, 141 where the reader of the output has gone,
1 for anything else.
"""

import ctypes
import decimal
import functools
import itertools
import logging as python_logging
import math
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping

import jax
from absl import app, flags, logging

from freqformer import CHECKOUT, disk
from freqformer.command.files import check_keys, dotted, read_config
from freqformer.config import ConfigError
from freqformer.kernels.core.op import NoImplementation
from freqformer.versions import versions

INTERRUPTED = 130  # exit code of a command that Ctrl-C ended, as shells have it
_PIPE_CLOSED = 141  # as shells have it, too
_VERBOSE = "--verbosity=1"
_DIGITS = 18  # of an integer; more would not fit into 64 bits
_CODE = CHECKOUT or pathlib.Path(__file__).parents[1]
_DEVICES = "jax._src.xla_bridge"  # the logger by which JAX says that it falls back to the CPU
_QUOTED = 300  # characters of a line that others log

# --help of a command lists the flags that it defines by `define_path` as its own.
flags.disclaim_key_flags()


def run(main: Callable):
  """Runs `main(argv)` with flags parsed, our error messages and JAX's compile cache."""
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  cache = CHECKOUT / ".cache" / "jax" if CHECKOUT else caches / "freqformer" / "jax"
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache))
  # A model's first weights are a hundred small programs, which JAX would compile in every process.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if "JAX_PLATFORMS" not in os.environ and gpu_wheels_without_gpu():
    jax.config.update("jax_platforms", "cpu")
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(None)
  logging.get_absl_handler().addFilter(_worth_reading)
  app.run(guarded(main), flags_parser=guarded(parse))


def run_plain(main: Callable):
  """Runs `main(None)` of a command that reads its own arguments, as `guarded` does.

  `--verbosity=1` is taken out of them before.
  """
  if _VERBOSE in sys.argv:
    sys.argv.remove(_VERBOSE)
    logging.set_verbosity(logging.DEBUG)
  guarded(main)(None)


def define_path(name: str, default: str | None, text: str, **given) -> flags.FlagHolder:
  """Defines a flag that names a file or a folder; `~` is the user's home."""
  return flags.DEFINE(_Path(), name, default, text, **given)


def define_paths(name: str, text: str) -> flags.FlagHolder:
  """Defines a flag like those of `define_path` that may be given several times."""
  return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, None, text)


class _Path(flags.ArgumentParser):
  """Parses a path; a shell leaves the `~` of `--flag=~/folder` as it is."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)

  def flag_type(self) -> str:
    return "path"


def gpu_wheels_without_gpu() -> bool:
  """Tells whether JAX's CUDA plugin is installed but no NVIDIA driver is.

  `make setup` installs the plugin to compile for absent GPUs. It would print tracebacks about
  itself before JAX goes on with the CPU.
  """
  if versions(["jax-cuda13-plugin"])["jax-cuda13-plugin"] == "absent":
    return False
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return True
  return False


def guarded(main: Callable) -> Callable:
  """Wraps `main` so that whatever it raises ends the process with one sentence."""

  @functools.wraps(main)
  def run_main(*args):
    try:
      return main(*args)
    except KeyboardInterrupt:
      print("stopped by Ctrl-C", file=sys.stderr)
      sys.exit(INTERRUPTED)
    except BrokenPipeError:  # who read the output has gone, as `| head` does
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
      sys.exit(_PIPE_CLOSED)
    except Exception as error:  # the last resort: no command ends in a trace that nobody asked for
      sys.exit(told(error)[1])

  return run_main


def told(error: BaseException) -> tuple[str, int]:
  """Prints an error as one sentence, with --verbosity=1 also where it comes from.

  Returns:
    the sentence, and the exit code of a command that it ends.
  """
  text, code = _explained(error)
  if _wants_trace():
    traceback.print_exception(error)
  print(f"error: {text}", file=sys.stderr)
  return text, code


def _explained(error: BaseException) -> tuple[str, int]:
  """Returns the sentence about an error, and the exit code."""
  if isinstance(error, KeyboardInterrupt):
    return "stopped by Ctrl-C", INTERRUPTED
  if isinstance(error, ConfigError | NoImplementation):
    return str(error), 2
  if disk.is_full(error):
    files = (each.filename for each in disk.chain(error) if _names_a_file(each))
    folder = pathlib.Path(next(files, "file of this folder")).absolute().parent
    return disk.no_space(folder, "what is written"), 2
  if isinstance(error, FileExistsError | NotADirectoryError) and _names_a_file(error):
    return (
      f"{error.filename} is a file where a folder is needed; name another, or move it away.",
      2,
    )
  if _names_a_file(error):
    return f"{error.filename} cannot be used: {error.strerror}.", 2
  line = str(error).strip().split("\n")[0]
  if "RESOURCE_EXHAUSTED" in line:  # of XLA
    return (
      "the device's memory is full: lower train.batch_size, or sample.batch_size where samples are "
      f"drawn. ({line})",
      2,
    )
  hint = "" if _wants_trace() else f" ({_VERBOSE} shows where it comes from.)"
  return f"{type(error).__name__}: {line}{hint}", 1


def _names_a_file(error: BaseException) -> bool:
  """Tells whether the system refused something with a file: it is not readable, not there, ..."""
  return isinstance(error, OSError) and error.filename is not None and error.strerror is not None


def _worth_reading(record: python_logging.LogRecord) -> bool:
  """Keeps our log lines, errors of others, and what JAX says about the choice of devices.

  Other warnings are left out: Orbax and grain warn of their own plumbing. What others log becomes
  one line without a trace: what an error leads to is told in the end.
  """
  path = pathlib.Path(record.pathname)
  ours = path.is_relative_to(_CODE) and "site-packages" not in path.relative_to(_CODE).parts
  least = python_logging.WARNING if record.name == _DEVICES else python_logging.ERROR
  if not ours and not logging.level_debug():
    text = record.getMessage()
    if record.exc_info:
      text += f" ({record.exc_info[1]})"
    record.msg = textwrap.shorten(text, _QUOTED, placeholder=" ...")
    record.args = record.exc_info = record.exc_text = None
  return ours or record.levelno >= least


def _wants_trace() -> bool:
  """Tells whether --verbosity=1 is given; flags may not have been parsed yet."""
  return logging.level_debug() or _VERBOSE in sys.argv


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses flags into `values` and returns what is left over, at most the program's name.

  The config file and its overrides are checked before ml_collections sees them.

  Raises:
    ConfigError: a value is wrong, an argument belongs to no flag, or a number is not finite.
  """
  config = {}
  try:
    if file := _config_file(argv):
      config = read_config(*file.split(":", 1))
      matches = [re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in argv]
      check_keys(config, [match.group(1) for match in matches if match])
    rest = values(_with_whole_numbers(argv, config, values))
  except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
    # The text of a KeyError is its message in quotes.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    raise ConfigError(str(message).replace("\n", " ")) from error
  if rest[1:]:
    raise ConfigError(_left_over(rest[1], config))
  for name, value in values.flag_values_dict().items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f"--{name}={value} must be a finite number.")
  return rest


def _with_whole_numbers(argv: list[str], config: Mapping, values: flags.FlagValues) -> list[str]:
  """Returns the arguments with integers written out, as 1e5 is in `--config.train.steps=1e5`.

  Raises:
    ConfigError: a number that must be whole is not.
  """

  def is_whole(name: str) -> bool:
    if config and name.startswith("config."):  # without a file these are flags as others
      value = functools.reduce(lambda group, key: group[key], name.split(".")[1:], config)
      return isinstance(value, int) and not isinstance(value, bool)
    return name in values and isinstance(values[name].parser, flags.IntegerParser)

  found = list(argv)
  for i, argument in enumerate(argv):
    match = re.fullmatch(r"--?([\w.]+)(?:=(.*))?", argument)
    if not match or not is_whole(match[1]):
      continue
    place = i if match[2] is not None else i + 1
    text = match[2] if match[2] is not None else argv[place] if place < len(argv) else ""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
      continue  # an integer's own parser answers
    number = decimal.Decimal(text)
    if abs(number.adjusted()) > _DIGITS or number != int(number):
      raise ConfigError(f"--{match[1]}={text} must be a whole number, e.g. 1000 or 1e3.")
    found[place] = found[place].removesuffix(text) + str(int(number))
  return found


def _config_file(argv: list[str]) -> str | None:
  """Returns the last of `--config=FILE` and `--config FILE`."""
  found = None
  for argument, following in itertools.pairwise([*argv, None]):
    if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
      found = following if match.group(1) is None else match.group(1)
  return found


def _left_over(argument: str, config: Mapping) -> str:
  """Refuses an argument of no flag; usually it is an override without its leading `--config.`."""
  key, equals, value = argument.removeprefix("config.").partition("=")
  near = [known for known in dotted(config) if f".{known}".endswith(f".{key}")]
  if equals and near:
    full = key if key in near else near[0]
    return f"{argument!r} belongs to no flag; did you mean --config.{full}={value}?"
  return (
    f"{argument!r} belongs to no flag; flags begin with --, and one that takes a value is written "
    "--flag=value."
  )
