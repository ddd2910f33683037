"""Simulates a model with a method on a GPU: FLOPs, traffic, seconds, memory. Every row says so.

  python -m freqformer.simulate --model=wan2.1-14b --method=freqformer --gpu=h100 \\
    --tokens=64k,128k,1m --compare=dense
  python -m freqformer.simulate --model=hunyuanvideo --grid=30,48,80 \\
    --method='sliding_tile(window=(18, 24, 24))'
  python -m freqformer.simulate --model=wan2.1-14b --gpus=8 --run \\
    --method='freqformer(router=dict(prior=(1, 1, 2)))'
  python -m freqformer.simulate --method=radial --run --schedule="dense_first=0.1"
  python -m freqformer.simulate --calibrate=freqformer/simulation/published/h100.json --gpu=h100

Rows are for one forward of the whole model at batch 1 with the text of the model's card; with
--gpus, on so many GPUs: seconds of the busiest one, rates of all together. What cannot run or does
not fit has a row that says why, unless there is no other row. `--gpu` and `--model` also take the
path of a JSON file.
"""

import sys

import jax

from freqformer.command import cli
from freqformer.config import ConfigError, split_outside_brackets
from freqformer.model.schedule import parse_schedule
from freqformer.simulation import arguments, calibrate, plots, scaling
from freqformer.simulation.descriptions import Gpu, load_gpu, load_model, write_gpu
from freqformer.simulation.forward import Plan, dense_baseline, make_method
from freqformer.simulation.output import render


def _rows(args, gpu: Gpu) -> list[dict]:
  """Returns a row per grid and method; raises ConfigError if every one is refused."""
  card = load_model(args.model)
  names = dict.fromkeys([args.method, *split_outside_brackets(args.compare)])
  methods = {name: make_method(name) for name in names}
  if args.gpus > card.heads:
    raise ConfigError(
      f"--gpus={args.gpus} must lie in 1..{card.heads}, the heads of {card.name}: each needs a "
      "whole head."
    )
  rows = []
  for grid in arguments.grids(args, card):
    for name, method in methods.items():
      plan = Plan(card, name, method, grid, args.block)
      try:
        rows.append(_simulated(plan, gpu, args))
      except ConfigError as error:
        rows.append(scaling.refused_row(plan, gpu, args.gpus, str(error)))
      except MemoryError as error:
        reason = (
          f"counting it takes more memory than this machine has ({error}); give fewer tokens or a "
          "larger --block."
        )
        rows.append(scaling.refused_row(plan, gpu, args.gpus, reason))
  if all("error" in row for row in rows):
    raise ConfigError(rows[0]["error"])
  return rows


def _simulated(plan: Plan, gpu: Gpu, args) -> dict:
  scaling.check_fits(plan, gpu, args.gpus)
  found = scaling.row(plan, gpu, args.gpus)
  dense = scaling.parallel(dense_baseline(plan), gpu, args.gpus).seconds
  found |= {"unpadded_dense_seconds": dense, "speedup_over_dense": dense / found["seconds"]}
  if args.run:
    schedule = parse_schedule(args.schedule or "")
    found |= scaling.denoising_run(plan, gpu, args.gpus, args.steps, schedule)
    largest = scaling.largest_video(plan, gpu, args.gpus)
    found |= {
      "largest_grid": list(largest),
      "largest_video_seconds": plan.card.video_seconds(largest),
    }
  return found


def run(argv) -> str:
  """Returns what the command prints; raises ConfigError for anything that the user got wrong."""
  args = arguments.parse(argv, __doc__.split("\n")[0])
  gpu = load_gpu(args.gpu)
  if args.calibrate:
    fit = calibrate.fit_file(gpu, args.calibrate)
    gpu = fit.gpu
    if args.write_gpu:
      write_gpu(gpu, args.write_gpu)
    if args.plot and not args.rows:
      plots.save(plots.validation_figure(fit.rows), args.plot)
    if not args.rows and args.format == "table":
      return fit.report()
    print(fit.report(), file=sys.stderr)  # also what was left out and why a fit is doubtful
    if not args.rows:
      return render(fit.rows, args.format)
  rows = _rows(args, gpu)
  if args.plot:
    plots.save(plots.scaling_figure(rows), args.plot)
  print(f"{gpu.name}: {gpu.rates_note}. {gpu.rates_from}", file=sys.stderr)
  return render(rows, args.format)


def main(argv=None):
  """Prints rows; whatever ends it is one sentence, as of other commands."""
  # Counting needs no accelerator and should not wait for one.
  jax.config.update("jax_platforms", "cpu")
  cli.guarded(lambda: print(run(sys.argv[1:] if argv is None else argv)))()


if __name__ == "__main__":
  cli.run_plain(main)
