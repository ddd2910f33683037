"""Compiles the training steps of benchmarks/gpu/study.py for an H100, without one.

  python -m benchmarks.compiled.study --device=offline     # writes results/study_compiled.json

A row has an arm's parameters, FLOPs, temporary memory, and spills of its kernels; and how long a
core of this machine draws one clip.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.gpu import study  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from freqformer.config import numbers  # noqa: E402
from freqformer.data.fields import Fields  # noqa: E402
from freqformer.model.dit import VideoDiT, make_tables  # noqa: E402
from freqformer.train.experiment import Experiment, experiment  # noqa: E402
from freqformer.train.mesh import all_devices  # noqa: E402
from freqformer.train.step import init_state, make_train_step  # noqa: E402
from freqformer.train.throughput import Throughput  # noqa: E402
from tools.offline import NO_AUTOTUNING, Compilation, compile_for  # noqa: E402

_CLIPS = 40  # that are drawn to time one


def compile_step(exp: Experiment, split: Fields) -> tuple[Compilation, int]:
  """Returns the compiled training step, and the model's parameters."""
  shape = exp.latent_shape
  classes = len(split.class_names)
  model = nnx.eval_shape(lambda: VideoDiT(exp.model, shape, classes, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  state = jax.eval_shape(lambda params: init_state(params, exp.train, 0), params)
  size = exp.train.batch_size
  batch = {
    "latent": jax.ShapeDtypeStruct((size, *shape), jnp.float32),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32),
  }
  step = make_train_step(graphdef, exp.train)
  tables = make_tables(exp.model, shape)
  given = (tables, numbers(exp.train), split.target)
  found = compile_for(step, state, batch, *given, options=NO_AUTOTUNING)
  return found, sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def measure(arm: str) -> dict:
  """Returns the row of an arm."""
  exp = experiment(study.arm_config(arm, rehearse=False))
  split = Fields(exp.data, "train")
  compiled, parameters = compile_step(exp, split)
  started = time.process_time()
  for number in range(_CLIPS):
    split[number]
  drawing = (time.process_time() - started) / _CLIPS
  flops = Throughput.of(exp.model, exp.latent_shape, exp.train.batch_size, all_devices()[:1]).flops
  return {
    "device": "NVIDIA H100 80GB HBM3 (compiled for, absent)",
    "name": f"study/{arm}",
    "expected": True,
    "tokens": exp.model.layout(exp.latent_shape).n,
    "parameters": parameters,
    "step_flops": flops,
    "temporary_bytes": compiled.temp_bytes,
    "kernels": [kernel.name.rsplit("_", 1)[0] for kernel in compiled.kernels],
    "spills": sum(kernel.spill_stores + kernel.spill_loads for kernel in compiled.kernels),
    "clip_cpu_seconds": drawing,
  }


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--device", choices=["offline"], default="offline")
  parser.parse_args()
  for arm in study.ARMS:
    row = measure(arm)
    write_rows("study_compiled", [row], "python -m benchmarks.compiled.study --device=offline")
    print(
      f"{arm}: {row['step_flops'] / 1e12:.1f} TFLOP, {row['temporary_bytes'] / 2**30:.1f} GiB, "
      f"{row['spills']} spills in {', '.join(row['kernels'])}",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
