"""Simulates a model with a method on a GPU: FLOPs, traffic, seconds, memory. Every row says so.

  python -m freqformer.simulate --model=wan2.1-14b --method=freqformer --gpu=h100 \\
    --tokens=64k,128k,1m --compare=dense
  python -m freqformer.simulate --model=hunyuanvideo --grid=30,48,80 \\
    --method='sliding_tile(window=(18, 24, 24))'
  python -m freqformer.simulate --model=wan2.1-14b --gpus=8 --run \\
    --method='freqformer(router=dict(prior=(1, 1, 2)))'
  python -m freqformer.simulate --calibrate=freqformer/simulation/published/h100.json --gpu=h100

Rows are for one forward of the whole model at batch 1 with the text of the model's card; with
--gpus,
on so many GPUs: seconds of the busiest one, rates of all together (`simulation/scaling.py`). What
cannot run or does not fit has a row that says why, unless there is no other row. `--gpu` and
`--model` also take the path of a JSON file.
"""

import math
import sys

import jax

from freqformer.config import ConfigError
from freqformer.simulation import arguments, calibrate, plots
from freqformer.simulation.descriptions import Gpu, load_gpu, load_model, write_gpu
from freqformer.simulation.forward import Plan, dense_baseline, make_method
from freqformer.simulation.output import REFUSED, render, table
from freqformer.simulation.scaling import (
  check_fits,
  check_gpus,
  largest_video,
  parallel,
  parallel_row,
  parallel_run,
)

__all__ = ["main", "render", "run", "simulated_rows", "table"]


def simulated_rows(args, gpu: Gpu) -> list[dict]:
  """Returns a row per grid and method; `speedup_over_dense`: over `dense_baseline`, on as many
  GPUs.

  Raises:
    ConfigError: for an invalid model, method or grid, or if every row is refused: the first reason.
  """
  card = load_model(args.model)
  rows = []
  refused = []
  names = list(dict.fromkeys([args.method, *arguments.split_methods(args.compare)]))
  methods = {name: make_method(name) for name in names}
  check_gpus(card, args.gpus)
  for grid in arguments.grids(args, card):
    at = {}
    for name, method in methods.items():
      plan = Plan(card, name, method, grid, args.block)
      try:
        at[name] = _simulated(plan, gpu, args)
      except (ConfigError, MemoryError) as error:
        refused.append(error)
        at[name] = _refused(plan, gpu, args.gpus, _reason(error))
    rows += at.values()
  if len(refused) == len(rows):
    raise ConfigError(_reason(refused[0])) from refused[0]
  return rows


def _simulated(plan: Plan, gpu: Gpu, args) -> dict:
  check_fits(plan, gpu, args.gpus)
  found = parallel_row(plan, gpu, args.gpus)
  dense = parallel(dense_baseline(plan), gpu, args.gpus).seconds
  found |= {"unpadded_dense_seconds": dense, "speedup_over_dense": dense / found["seconds"]}
  if args.run:
    seconds, phases = parallel_run(plan, gpu, args.gpus, args.steps)
    largest = largest_video(plan, gpu, args.gpus)
    found |= {
      "run_seconds": seconds,
      "run_phases": phases,
      "largest_grid": list(largest),
      "largest_video_seconds": plan.card.video_seconds(largest),
    }
  return found


def _refused(plan: Plan, gpu: Gpu, gpus: int, reason: str) -> dict:
  return {
    "model": plan.card.name,
    "method": plan.name,
    "gpu": gpu.name,
    "tokens": math.prod(plan.grid),
    "grid": list(plan.grid),
    **dict.fromkeys(REFUSED),
    "measured": False,
    "gpus": gpus,
    "error": reason,
  }


def _reason(error: Exception) -> str:
  if isinstance(error, MemoryError):
    return (
      f"counting it takes more memory than this machine has ({error}); give fewer tokens or a "
      "larger --block."
    )
  return str(error)


def run(argv) -> str:
  """Returns what the command prints.

  Raises:
    ConfigError: for anything that the user got wrong.
  """
  args = arguments.parse(argv, __doc__.split("\n")[0])
  gpu = load_gpu(args.gpu)
  if args.calibrate:
    fit = calibrate.fit_file(gpu, args.calibrate)
    gpu = fit.gpu
    if args.write_gpu:
      write_gpu(gpu, args.write_gpu)
    if args.plot and not args.rows:
      plots.validation_plot(fit.rows, args.plot)
    if not args.rows and args.format == "table":
      return fit.report()
    print(fit.report(), file=sys.stderr)  # also what was left out and why a fit is doubtful
    if not args.rows:
      return render(fit.rows, args.format)
  rows = simulated_rows(args, gpu)
  if args.plot:
    plots.scaling_plot(rows, args.plot)
  print(f"{gpu.name}: {gpu.rates_note}. {gpu.rates_from}", file=sys.stderr)
  return render(rows, args.format)


def main(argv=None):
  """Prints rows; a mistake of the user's is one sentence and exit code 2."""
  # Counting needs no accelerator and should not wait for one.
  jax.config.update("jax_platforms", "cpu")
  try:
    print(run(sys.argv[1:] if argv is None else argv))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
