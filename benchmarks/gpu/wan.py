"""Holds Wan's transformer to its float32 numbers on a GPU, and times its autoencoder.

  python3 -m benchmarks.gpu.wan --part=parity --out=$OUT
  python3 -m benchmarks.gpu.wan --part=decode --out=$OUT     # 81 frames of 480x832
  python3 -m benchmarks.gpu.wan --part=decode --rehearse --out=/tmp/x     # tiny, on a CPU

Weights are a formula's or random, at published widths: nothing is downloaded. How long sampling
takes, `eval.py --pretrained=random:wan2.1-1.3b` says (docs/gpu_queue.md).
"""

import argparse
import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from benchmarks.gpu.attempt import Job, attempts
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.device import Deadline, command_line, open_device, open_store
from freqformer.model.config import DTYPES, AttentionConfig
from freqformer.model.leaves import leaf_name
from freqformer.model.wan import WanConfig, WanDiT, is_narrow, load_params
from freqformer.wan import vae
from tools.formula import values, weights
from tools.program_cost import program_cost

PARTS = ("parity", "decode")
METHODS = ("dense", "freqformer(allocation=(2, 4, 6))")
GOLDENS = ROOT / "tests" / "golden"
# Of diffusers' tiny model in bfloat16, from the same in float32 (docs/pretrained.md).
DIFFUSERS_ERROR = 6.2e-3
FLOAT32_ERROR = 1e-5
# A kernel may err this much more than the plain computation in bfloat16 does, as in the checks.
_MORE = 2.0
_REPEATS = 3  # of a decode
_DENSE = AttentionConfig(methods=(), method="dense")
# Two layers of the 1.3B, 4,608 tokens.
_FULL = WanConfig(attention=_DENSE, width=1536, depth=2, heads=12, mlp=8960)
_FULL_SHAPE = (9, 32, 64, 16)
_TINY = WanConfig(
  attention=_DENSE, width=768, depth=1, heads=12, mlp=64, text_width=16, text_length=8
)
_TINY_SHAPE = (3, 8, 8, 4)
_BLOCK = 128
_TINY_BLOCK = 16
_VIDEO = (21, 60, 104)  # latents of 81 frames of 480x832
_TINY_VIDEO = (2, 2, 2)


def error(found, wanted) -> float:
  """Returns the norm of the difference over that of the array that is wanted."""
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _forward(model, params, *inputs) -> jax.Array:
  """Returns a model's velocity; products of float32 are exact."""
  graphdef = nnx.graphdef(model)
  x = inputs[0]

  @jax.jit
  def run(params, tables, *inputs):
    with jax.default_matmul_precision("highest"):
      return nnx.merge(graphdef, params)(*inputs, tables)[0]

  return run(params, model.tables(x.shape[1:]), *inputs)


def goldens() -> dict:
  """Compares diffusers' tiny model, whose weights are a formula's, with ours on this device."""
  with np.load(GOLDENS / "wan.npz") as arrays:
    wanted = np.moveaxis(arrays["dit"], 1, -1)
  tensors = weights(json.loads((GOLDENS / "wan_names.json").read_text())["transformer"])
  sizes = dict(width=48, depth=2, heads=3, mlp=72, text_width=12, text_length=5, frequencies=16)
  attention = dataclasses.replace(_DENSE, block=16, tile=(2, 2, 3))
  x = np.moveaxis(values("x", (2, 4, 3, 6, 10)), 1, -1)
  inputs = (x, np.float32([0.737, 0.012]), values("text", (2, 5, 12)))
  found = {}
  for dtype in ("float32", "bfloat16"):
    config = WanConfig(attention=attention, dtype=dtype, **sizes)
    model = nnx.eval_shape(functools.partial(WanDiT, config, x.shape[1:], nnx.Rngs(0)))
    params, _ = load_params(model, tensors, DTYPES[dtype])
    found[f"error_{dtype}"] = error(_forward(model, params, *inputs), wanted)
  right = found["error_float32"] <= FLOAT32_ERROR and found["error_bfloat16"] <= DIFFUSERS_ERROR
  return found | {"limit_float32": FLOAT32_ERROR, "limit": DIFFUSERS_ERROR, "correct": right}


def layers(method: str, rehearse: bool) -> dict:
  """Compares layers in bfloat16, with kernels and without, with the plain ones in float32.

  Args:
    method: whose choices do not hang on rounding: its heads are dealt, its lists fixed or pooled.
    rehearse: a small layer, without kernels.
  """
  base, shape = (_TINY, _TINY_SHAPE) if rehearse else (_FULL, _FULL_SHAPE)
  block = _TINY_BLOCK if rehearse else _BLOCK
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, *shape), np.float32)
  text = rng.standard_normal((1, base.text_length, base.text_width), np.float32)
  inputs = (x, np.float32([0.6]), text)
  found = {}
  for dtype, implementation in (
    ("float32", "xla"),
    ("bfloat16", "xla"),
    ("bfloat16", "xla" if rehearse else "hopper"),
  ):
    attention = dataclasses.replace(_DENSE, implementation=implementation, block=block)
    own = dataclasses.replace(base, attention=attention, dtype=dtype).with_method(method)
    make = functools.partial(WanDiT, own, shape)
    params = _narrow(nnx.jit(lambda make=make: nnx.state(make(nnx.Rngs(0))))(), DTYPES[dtype])
    model = nnx.eval_shape(lambda make=make: make(nnx.Rngs(0)))
    name = {"float32": "exact"}.get(dtype, "plain" if "plain" not in found else "kernels")
    found[name] = _forward(model, params, *inputs)
  errors = {name: error(found[name], found["exact"]) for name in ("plain", "kernels")}
  return {
    "tokens": base.layout(shape).n,
    "error_plain": errors["plain"],
    "error_kernels": errors["kernels"],
    "limit": _MORE * errors["plain"],
    "correct": errors["kernels"] <= _MORE * errors["plain"],
  }


def _narrow(params, dtype):
  """Returns parameters whose matrices are as a downloaded model's are kept."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(dtype) if is_narrow(leaf_name(path)) else x, params
  )


def decode(rehearse: bool, deadline: Deadline) -> dict:
  """Times decoding a video with Wan 2.1's autoencoder, whose weights are random."""
  if rehearse:
    shapes = json.loads((GOLDENS / "wan_names.json").read_text())["vae21"]
  else:
    shapes = json.loads((GOLDENS / "wan_vae_shapes.json").read_text())["2.1"]
  params = {name: jnp.asarray(x) for name, x in weights(shapes).items()}
  structure = vae.read_structure(vae.shapes_of(params))
  grid = _TINY_VIDEO if rehearse else _VIDEO
  latents = jnp.asarray(values("latents", (1, *grid, structure.channels)))

  def run(params, latents):
    return vae.decode(params, latents, 0.0, 1.0)

  flops = program_cost(run, params, latents).flops
  started = time.monotonic()
  compiled = jax.jit(run).lower(params, latents).compile()
  compile_seconds = time.monotonic() - started
  video = jax.block_until_ready(compiled(params, latents))
  seconds = []
  for _ in range(_REPEATS):
    started = time.monotonic()
    jax.block_until_ready(compiled(params, latents))
    seconds.append(time.monotonic() - started)
    if deadline.left < 2 * seconds[-1]:
      break
  memory = jax.devices()[0].memory_stats() or {}
  return {
    "video": list(video.shape[1:4]),
    "seconds": min(seconds),
    "compile_seconds": compile_seconds,
    "flops": flops,
    "tflops": flops / min(seconds) / 1e12,
    "peak_bytes": memory.get("peak_bytes_in_use"),  # None where unknown, as on a CPU
    "correct": bool(jnp.isfinite(video).all()),
  }


def jobs(part: str, rehearse: bool, deadline: Deadline) -> list[Job]:
  """Returns the rows of a part."""
  if part == "decode":
    return [Job("wan/decode_480p", functools.partial(decode, rehearse, deadline), 20.0)]
  found = [Job("wan/goldens", goldens, 10.0)]
  for method in METHODS:
    name = f"wan/layers_{method.split('(')[0]}"
    found.append(Job(name, functools.partial(layers, method, rehearse), 20.0))
  return found


def parser() -> argparse.ArgumentParser:
  """Returns the options of this program."""
  parser = command_line(__doc__, minutes=2)
  parser.set_defaults(out=ROOT / "runs" / "gpu")
  parser.add_argument("--part", choices=PARTS, required=True, help="what is measured")
  return parser


def main() -> int:
  options = parser().parse_args()
  logging.set_verbosity(logging.INFO)
  open_device(options.rehearse)
  deadline = Deadline(60 * options.minutes)
  wanted = jobs(options.part, options.rehearse, deadline)
  for job in wanted:
    print(f"wanted {job.name}", flush=True)
  command = f"python -m benchmarks.gpu.wan --part={options.part}"
  store = open_store("gpu_wan_{device}", command, options.out, options.rehearse)
  # Measured anew each time: the rows depend on more code than the store's hash covers.
  rows = [row for _, row in attempts(store, wanted, deadline, again=True)]
  return 0 if all(row and row["correct"] for row in rows) else 1


if __name__ == "__main__":
  sys.exit(main())
