"""Block-sparse attention against dense attention on the same machine in the same run.

  python -m benchmarks.attention --device=cpu      # 5 minutes on 2 idle cores; attention_cpu.json
  python -m benchmarks.attention --device=cpu --quick          # small shapes, no rows
  python -m benchmarks.attention --device=gpu --minutes=18     # attention_gpu_*.json

The measurements on a CPU and on a GPU have little in common: benchmarks/cpu/attention.py and
benchmarks/gpu/run.py. docs/benchmarks.md says how to read the rows in benchmarks/results.
"""

import argparse
import sys

import jax
from absl import logging

from benchmarks.arg_specs import SPECS
from benchmarks.gpu import run as gpu_run


def command_line() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  cpu = parser.add_argument_group("CPU")
  cpu.add_argument("--quick", action="store_true", help="small shapes, few repeats, no rows")
  cpu.add_argument(
    "--memory_of",
    choices=("forward", "backward"),
    help="only run this once and print its peak memory",
  )
  cpu.add_argument(
    "--spec", choices=sorted(SPECS), default="cpu_64k", help="the shape of --memory_of"
  )
  gpu = parser.add_argument_group("GPU")
  gpu.add_argument("--minutes", type=float, default=18, help="stop by then; a later run goes on")
  gpu.add_argument("--out", help="folder for rows and plot; default $OUT, else benchmarks/results")
  gpu.add_argument("--implementation", help="attention backend; default the GPU kernel")
  gpu.add_argument("--parts", default="", help="only these parts, separated by commas")
  gpu.add_argument("--only", default="", help="regular expression: only rows whose name it finds")
  gpu.add_argument(
    "--config",
    default="",
    help="fields of kernels.block_sparse.tuning.TuningConfig to change, e.g. take_turns=False",
  )
  gpu.add_argument(
    "--rehearse",
    action="store_true",
    help="the whole run on tiny shapes with a stand-in, on a CPU; needs --out",
  )
  return parser


def main() -> int:
  options = command_line().parse_args()
  logging.set_verbosity(logging.INFO)
  if options.device == "gpu":
    run = gpu_run.main(
      options.minutes,
      options.out,
      options.implementation,
      options.rehearse,
      parts=[part for part in options.parts.split(",") if part],
      only=options.only,
      configuration=options.config,
    )
    return 1 if run.troubles or run.skipped else 0
  # Needs flax, which a machine that only measures GPU kernels may lack.
  from benchmarks.cpu import attention as cpu_attention

  jax.config.update("jax_platforms", "cpu")
  if options.memory_of:
    cpu_attention.print_memory(SPECS[options.spec], options.memory_of)
  else:
    command = "python -m benchmarks.attention --device=cpu" + (" --quick" if options.quick else "")
    cpu_attention.main(options.quick, command)
  return 0


if __name__ == "__main__":
  sys.exit(main())
