"""Block-sparse attention against dense attention on the same machine in the same run.

  python -m benchmarks.attention --device=cpu            # 5 minutes on 2 idle cores; rows go to results/attention_cpu.json
  python -m benchmarks.attention --device=cpu --quick    # small shapes, no rows
  python -m benchmarks.attention --device=gpu --minutes=18    # docs/benchmarks.md; rows go to results/attention_gpu_*.json

What is measured on a CPU and on a GPU has little in common: `cpu_attention.py` and `gpu_run.py`.
"""

import sys

import jax
from absl import app, flags, logging

from benchmarks.arg_specs import SPECS
from benchmarks.gpu import run as gpu_run

_DEVICE = flags.DEFINE_enum(
  "device", "cpu", ["cpu", "gpu"], "Where to measure.", allow_override=True
)
_QUICK = flags.DEFINE_bool(
  "quick", False, "CPU: small shapes and few repeats; writes no rows.", allow_override=True
)
_MEMORY_OF = flags.DEFINE_enum(
  "memory_of", None, ["forward", "backward"], "CPU: only run this once and print its peak memory."
)
_SPEC = flags.DEFINE_enum(
  "spec", "cpu_64k", sorted(SPECS), "The shape of --memory_of.", allow_override=True
)
_MINUTES = flags.DEFINE_float(
  "minutes",
  18,
  "GPU: stop by then with what there is; rows already there are skipped.",
  0,
  allow_override=True,
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "GPU: folder for rows and plot; default $OUT, else benchmarks/results.",
  allow_override=True,
)
_IMPLEMENTATION = flags.DEFINE_string(
  "implementation",
  None,
  "GPU: attention backend to measure; default the GPU kernel.",
  allow_override=True,
)
_PARTS = flags.DEFINE_list(
  "parts",
  None,
  "GPU: only these parts, by their names in gpu_run.py; default all but those asked for by name only.",
)
_ONLY = flags.DEFINE_string(
  "only", "", "GPU: regular expression: only rows whose name it finds.", allow_override=True
)
_CONFIG = flags.DEFINE_string(
  "config",
  "",
  "GPU: fields of kernels.block_sparse.tuning.TuningConfig to change for the attention kernels, e.g. take_turns=False.",
  allow_override=True,
)
_REHEARSE = flags.DEFINE_bool(
  "rehearse",
  False,
  "GPU: the whole run on tiny shapes with a stand-in, on a CPU; needs --out.",
  allow_override=True,
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  if _DEVICE.value == "gpu":
    run = gpu_run.main(
      _MINUTES.value,
      _OUT.value,
      _IMPLEMENTATION.value,
      _REHEARSE.value,
      parts=_PARTS.value or (),
      only=_ONLY.value,
      config=_CONFIG.value,
    )
    troubles = gpu_run.troubles(run)
    if troubles:
      print(f"failed or wrong: {', '.join(troubles)}")
    sys.exit(1 if troubles or run.skipped else 0)
  # needs flax, which a machine that only measures GPU kernels may lack
  from benchmarks.cpu import attention as cpu_attention

  jax.config.update("jax_platforms", "cpu")
  if _MEMORY_OF.value:
    cpu_attention.print_memory(SPECS[_SPEC.value], _MEMORY_OF.value)
  else:
    cpu_attention.main(
      _QUICK.value,
      "python -m benchmarks.attention --device=cpu" + (" --quick" if _QUICK.value else ""),
    )


if __name__ == "__main__":
  app.run(main)
