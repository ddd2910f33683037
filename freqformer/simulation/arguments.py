"""The simulator's command line, checked before anything is counted."""

import argparse
import math
import os
import re
import sys

from freqformer.config import ConfigError
from freqformer.grid.layout import MOST_ROWS
from freqformer.methods.registry import METHODS
from freqformer.simulation import plots
from freqformer.simulation.descriptions import ModelCard, known
from freqformer.simulation.forward import cubic_grid

# Rows of a tile: far more than an SM can hold at once, which is how a work item is priced.
MOST_BLOCK = 1024
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}
# Giving any of these flags, or --run, requests result rows.
_DEFAULTS = {
  "model": "wan2.1-1.3b",
  "method": "freqformer",
  "compare": "",
  "tokens": "",
  "grid": "",
  "gpus": 1,
  "block": 128,
}
_WHOLE_NUMBERS = ("gpus", "block", "steps")


def parse(argv, description: str) -> argparse.Namespace:
  """Returns the arguments; `rows`: whether rows are requested (not with --calibrate alone).

  Raises:
    ConfigError: for a value out of range, or an argument that the others leave without effect.
  """
  parser = argparse.ArgumentParser(
    prog="python -m freqformer.simulate", description=description, allow_abbrev=False
  )
  texts = {
    "model": f"{', '.join(known('models'))} (default {_DEFAULTS['model']}), or a JSON file",
    "method": f"{', '.join(METHODS)}, with fields: block_topk(density=0.2), "
    "freqformer(router=dict(prior=(1,1,2)))",
    "compare": "further methods, separated by commas",
    "tokens": "64k,128k,1m or any whole numbers; default: the model's usual video",
    "grid": "tokens t,y,x",
    "gpus": "sequence-parallel GPUs",
    "block": f"rows of a tile, 1..{MOST_BLOCK}; default {_DEFAULTS['block']}",
    "steps": "denoising steps of --run; default: the model's",
    "schedule": "of --run, steps and layers that are dense: dense_first=0.1, dense_layers=(0, -1)",
    "calibrate": "JSON rows of measurements: fit rates, report every row, use them for the rest",
    "write_gpu": "with --calibrate: write the calibrated GPU to this file",
    "plot": "write a plot of the rows (with --calibrate alone: of the fit) to this file",
  }
  for name, text in texts.items():
    parser.add_argument(f"--{name}", type=int if name in _WHOLE_NUMBERS else str, help=text)
  parser.add_argument("--gpu", default="h100", help=f"{', '.join(known('gpus'))}, or a JSON file")
  parser.add_argument("--format", default="table", choices=("table", "json", "csv"))
  parser.add_argument(
    "--run", action="store_true", help="also a whole denoising run and the longest video that fits"
  )
  args = parser.parse_args(argv)
  for name in ("model", "gpu", "calibrate", "write_gpu", "plot"):
    if getattr(args, name):
      setattr(args, name, os.path.expanduser(getattr(args, name)))
  args.rows = not args.calibrate or any(getattr(args, name) for name in (*_DEFAULTS, "run"))
  for name, value in _DEFAULTS.items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  _check(args)
  return args


def _check(args) -> None:
  refusals = {
    f"--block={args.block} must lie in 1..{MOST_BLOCK}, rows of a tile that one SM works on.": (
      not 1 <= args.block <= MOST_BLOCK
    ),
    f"--gpus={args.gpus} must be at least 1.": args.gpus < 1,
    f"--steps={args.steps} must be at least 1 and is the length of --run; add --run.": (
      args.steps is not None and (args.steps < 1 or not args.run)
    ),
    f"--schedule={args.schedule} says which steps of --run are dense; add --run.": (
      args.schedule is not None and not args.run
    ),
    f"--write_gpu={args.write_gpu} writes what --calibrate=rows.json fits; add --calibrate.": (
      args.write_gpu and not args.calibrate
    ),
  }
  for message, holds in refusals.items():
    if holds:
      raise ConfigError(message)
  if args.plot:
    plots.check_format(args.plot)


def parse_tokens(text: str) -> list[int]:
  """Reads `64k,75600,1m` as [65536, 75600, 1048576]; raises ConfigError for anything else."""
  found = []
  for word in text.split(","):
    word = word.strip().lower()
    try:
      value = float(word[:-1]) * _SUFFIXES[word[-1]] if word[-1:] in _SUFFIXES else float(word)
    except ValueError:
      value = math.nan
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
      raise ConfigError(
        f"--tokens: {word!r} is no positive whole number of tokens; write 75600, 64k (65,536) or "
        "1m (1,048,576)."
      )
    if value > MOST_ROWS:
      raise ConfigError(
        f"--tokens: {int(value):,} are {value / MOST_ROWS:,.1f} times the {MOST_ROWS:,} tokens "
        "that an int32 index reaches; give fewer."
      )
    found.append(int(value))
  return found


def parse_grid(text: str) -> tuple[int, int, int]:
  """Reads `21,45,80` or `21x45x80` as (21, 45, 80); raises ConfigError for anything else."""
  words = [w.strip() for w in text.lower().replace("x", ",").split(",")]
  if len(words) != 3 or not all(re.fullmatch(r"0*[1-9][0-9]{0,17}", w) for w in words):
    raise ConfigError(
      f"--grid: {text!r} must be three positive token counts t,y,x, as in 21,45,80."
    )
  return tuple(int(w) for w in words)


def grids(args, card: ModelCard) -> list[tuple[int, int, int]]:
  """Returns --grid, or the model's own with so many --tokens, or the most cubic one; printed."""
  tokens = parse_tokens(args.tokens) if args.tokens else [math.prod(card.grid)]
  if args.grid:
    grid = parse_grid(args.grid)
    if args.tokens and tokens != [math.prod(grid)]:
      raise ConfigError(
        f"--grid={args.grid} has {math.prod(grid)} tokens, --tokens={args.tokens}; give one, or "
        "equal ones."
      )
    return [grid]
  found = []
  for n in tokens:
    own = card.grid_of(n)
    found.append(own or cubic_grid(n))
    kind = f"of a video of {card.name}" if own else "the most cubic"
    shown = "x".join(map(str, found[-1]))
    print(f"{n:,} tokens: grid {shown}, {kind} (choose with --grid)", file=sys.stderr)
  return found
