"""What a model, a method and a GPU come to: FLOPs, traffic, seconds, memory. Simulated, and every row says so.

  python -m freqformer.simulate --model=wan2.1-14b --method=freqformer --gpu=h100 --tokens=64k,128k,1m --compare=dense
  python -m freqformer.simulate --model=hunyuanvideo --method='sliding_tile(window=(18, 24, 24))' --grid=30,48,80
  python -m freqformer.simulate --calibrate=freqformer/simulation/published/h100.json --gpu=h100

Rows are for one forward of the whole model at batch 1 with the text of the model's card; with --gpus, on so many GPUs.
`--gpu` and `--model` also take the path of a JSON file.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import pathlib
import sys

import jax

from freqformer.config import ConfigError
from freqformer.methods.registry import METHODS
from freqformer.simulation import calibrate, plots
from freqformer.simulation.descriptions import Gpu, known, load_gpu, load_model
from freqformer.simulation.forward import Plan, cubic_grid, make_method, row, run_seconds, simulate
from freqformer.simulation.scaling import check_fits, largest_video, memory_bytes, parallel

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


def parse_tokens(text: str) -> list[int]:
  """`64k,75600,1m` -> [65536, 75600, 1048576]; k is 1,024 and m 1,048,576.

  Raises:
    ConfigError: for anything that is not a positive whole number of tokens.
  """
  found = []
  for word in text.split(","):
    word = word.strip().lower()
    try:
      value = float(word[:-1]) * _SUFFIXES[word[-1]] if word[-1:] in _SUFFIXES else float(word)
    except ValueError:
      value = math.nan
    if not value >= 1 or value != int(value):
      raise ConfigError(
        f"--tokens: {word!r} is no positive whole number of tokens; write 75600, 64k (65,536) or 1m (1,048,576)."
      )
    found.append(int(value))
  return found


def parse_grid(text: str) -> tuple[int, int, int]:
  """`21,45,80` or `21x45x80` -> (21, 45, 80)."""
  words = text.replace("x", ",").split(",")
  if len(words) != 3 or not all(w.strip().isdigit() and int(w) for w in words):
    raise ConfigError(f"--grid: {text!r} must be three positive token counts t,y,x, as in 21,45,80.")
  return tuple(int(w) for w in words)


def split_methods(text: str) -> list[str]:
  """Splits at commas outside brackets: `dense,block_topk(density=0.2, coarse=none)`."""
  found, depth = [""], 0
  for c in text:
    depth += (c == "(") - (c == ")")
    found = [*found, ""] if c == "," and depth == 0 else [*found[:-1], found[-1] + c]
  return [f.strip() for f in found if f.strip()]


def grids(args, card) -> list[tuple[int, int, int]]:
  """The grids that were asked for: given, of the model's usual video, or the most cubic factorisation (said on stderr)."""
  if not args.tokens:
    return [parse_grid(args.grid) if args.grid else card.grid]
  counts = parse_tokens(args.tokens)
  if args.grid:
    grid = parse_grid(args.grid)
    if counts != [math.prod(grid)]:
      raise ConfigError(f"--grid={args.grid} has {math.prod(grid)} tokens, --tokens={args.tokens}; give one, or equal ones.")
    return [grid]
  found = [cubic_grid(n) for n in counts]
  for n, grid in zip(counts, found, strict=True):
    print(f"{n:,} tokens: grid {'x'.join(map(str, grid))}, the most cubic (choose with --grid)", file=sys.stderr)
  return found


def simulated_rows(args, gpu: Gpu) -> list[dict]:
  """A row per grid and method; `speedup_over_dense` where dense is among them."""
  card, rows = load_model(args.model), []
  names = list(dict.fromkeys([args.method, *split_methods(args.compare)]))
  methods = {name: make_method(name) for name in names}
  for grid in grids(args, card):
    at = {}
    for name, method in methods.items():
      plan = Plan(card, name, method, grid, args.block)
      check_fits(plan, gpu, args.gpus)
      forward = simulate(plan, gpu)
      several = parallel(plan, gpu, args.gpus, forward)
      at[name] = row(plan, gpu, forward) | {"seconds": several.seconds, "memory_bytes": memory_bytes(plan, args.gpus)}
      if args.gpus > 1:
        at[name] |= {k: v for k, v in dataclasses.asdict(several).items() if k != "seconds"}
      if args.run:
        seconds, phases = run_seconds(plan, gpu, args.steps or None)
        at[name] |= {"run_seconds": seconds * several.seconds / forward.seconds, "run_phases": phases}
        largest = largest_video(plan, gpu, args.gpus)
        at[name] |= {"largest_grid": list(largest), "largest_video_seconds": card.video_seconds(largest)}
    for found in at.values():
      found |= {"speedup_over_dense": at["dense"]["seconds"] / found["seconds"]} if "dense" in at else {}
    rows += at.values()
  return rows


# ---- output --------------------------------------------------------------------------------------------------------------

_COLUMNS = (
  ("tokens", lambda r: f"{r['tokens']:,}"),
  ("grid", lambda r: "x".join(map(str, r["grid"]))),
  ("method", lambda r: r["method"]),
  ("density", lambda r: f"{r['density']:.4f}"),
  ("attention TFLOP", lambda r: f"{r['attention_flops'] / 1e12:,.1f}"),
  ("linear TFLOP", lambda r: f"{r['linear_flops'] / 1e12:,.1f}"),
  ("device memory GB", lambda r: f"{r['hbm_bytes'] / 1e9:,.1f}"),
  ("KV GB", lambda r: f"{r['kv_bytes'] / 1e9:,.1f}"),
  ("FLOP/byte", lambda r: f"{r['flops_per_byte']:,.0f}"),
  ("seconds", lambda r: f"{r['seconds']:.4g}"),
  ("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
  ("video s", lambda r: f"{r['video_seconds']:.1f}"),
  ("run s", lambda r: f"{r['run_seconds']:,.0f}" if "run_seconds" in r else "-"),
  ("resident GB", lambda r: f"{r['memory_bytes'] / 1e9:.1f}"),
  ("dense / this", lambda r: f"{r['speedup_over_dense']:.2f}" if "speedup_over_dense" in r else "-"),
  ("measured", lambda r: "yes" if r["measured"] else "no"),
)


def table(rows: list[dict]) -> str:
  """The rows for people."""
  cells = [[name for name, _ in _COLUMNS], *([show(r) for _, show in _COLUMNS] for r in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
  return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def render(rows: list[dict], form: str) -> str:
  """Rows as "table", "json" or "csv"."""
  if form == "json":
    return json.dumps(rows, indent=1)
  if form == "table":
    return table(rows)
  out = io.StringIO()
  writer = csv.DictWriter(out, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
  writer.writeheader()
  writer.writerows({k: "x".join(map(str, v)) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
  return out.getvalue().rstrip("\n")


def _arguments(argv):
  parser = argparse.ArgumentParser(prog="python -m freqformer.simulate", description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("--model", default="wan2.1-1.3b", help=f"{', '.join(known('models'))}, or a JSON file")
  add("--method", default="freqformer", help=f"{', '.join(METHODS)}, with fields as in block_topk(density=0.2)")
  add("--compare", default="", help="further methods, separated by commas")
  add("--gpu", default="h100", help=f"{', '.join(known('gpus'))}, or a JSON file")
  add("--gpus", type=int, default=1, help="sequence-parallel GPUs")
  add("--tokens", default="", help="64k,128k,1m or any whole numbers; default: the model's usual video")
  add("--grid", default="", help="tokens t,y,x")
  add("--block", type=int, default=128, help="rows of a tile")
  add("--run", action="store_true", help="also a whole denoising run and the longest video that fits")
  add("--steps", type=int, default=0, help="denoising steps of --run; default: the model's")
  add("--calibrate", default="", help="JSON rows of measurements: fit the rates, report every row; uses them for the rest")
  add("--write_gpu", default="", help="with --calibrate: write the calibrated GPU to this file")
  add("--format", default="table", choices=("table", "json", "csv"))
  add("--plot", default="", help="write a plot of the rows to this file")
  return parser.parse_args(argv)


def run(argv) -> str:
  """What the command prints.

  Raises:
    ConfigError: for anything that the user got wrong.
  """
  args = _arguments(argv)
  gpu = load_gpu(args.gpu)
  if args.block < 1 or args.gpus < 1 or args.steps < 0:
    raise ConfigError(f"--block={args.block} and --gpus={args.gpus} must be at least 1, --steps={args.steps} at least 0.")
  if args.calibrate:
    fit = calibrate.calibrate(gpu, calibrate.load_rows(args.calibrate, gpu.name))
    gpu = fit.gpu
    if args.write_gpu:
      pathlib.Path(args.write_gpu).write_text(json.dumps(dataclasses.asdict(gpu), indent=1) + "\n")
    if not (args.tokens or args.grid):
      return json.dumps(fit.rows, indent=1) if args.format == "json" else fit.report()
    print(fit.report(), file=sys.stderr)
  rows = simulated_rows(args, gpu)
  if args.plot:
    plots.scaling_plot(rows, args.plot)
  if not gpu.calibrated:
    print(f"{gpu.name}: {gpu.rates_from}", file=sys.stderr)
  return render(rows, args.format)


def main(argv=None):
  """Prints rows; what the user got wrong is one sentence and exit code 2."""
  jax.config.update("jax_platforms", "cpu")  # counting needs no accelerator, and should not wait for one
  try:
    print(run(sys.argv[1:] if argv is None else argv))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
