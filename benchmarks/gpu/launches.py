"""One launch against three: FreqFormer's bands in one attention call, or one call per band.

The three calls get inputs of their own, so that nothing is sliced or packed for them: the best case
of separate launches. XLA runs them one after the other; under `CONCURRENT` they are captured into
one command buffer and may overlap. Such flags bind a process, hence `in_child`. Both forms are
compared by the wall clock: sums of kernel times know neither gaps nor overlap.
"""

import functools
import json

import jax
from freqformer.kernels.block_sparse.api import attention

from benchmarks import timing
from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks
from benchmarks.gpu.masks import Composition
from benchmarks.gpu.timing import Call, Effort, Measured, measure

# Names and values as jaxlib 0.11.2 parses them; an unknown one ends the process. Without a minimum
# of 1, XLA captures no group of fewer than five kernels.
CONCURRENT = (
  "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT --xla_gpu_graph_min_graph_size=1 "
  "--xla_gpu_enable_command_buffer="
  "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
)


def attend(q, k, v, mask, implementation):
  """One call of the kernel under test."""
  return attention(q, k, v, mask, implementation=implementation)


def separate_call(spec: AttentionSpec, of: Composition, implementation: str) -> Call:
  """Returns the calls band by band, in one jit; mid first: a chain runs through the costliest."""
  low, mid, high = masks.separate(spec, of)
  operands = [(*problem.inputs(), masks.on_device(problem.mask)) for problem in (mid, high, low)]
  (q_mid, *rest_mid), *others = operands

  def run(q_mid, rest_mid, others):
    found = [attend(q_mid, *rest_mid, implementation)]
    for q, *rest in others:
      # Every q waits for the chain's, else XLA could start these bands of the next call early.
      q = jax.lax.optimization_barrier((q, q_mid[0, 0, 0, 0]))[0]
      found.append(attend(q, *rest, implementation))
    return found

  return Call(run, (q_mid, rest_mid, others))


def compare(
  spec: AttentionSpec, of: Composition, implementation: str, effort: Effort
) -> dict[str, Measured]:
  """Times both forms, in turns."""
  problem = masks.fused(spec, of)
  run = functools.partial(attend, implementation=implementation)
  fused = Call(run, (*problem.inputs(), masks.on_device(problem.mask)))
  separate = separate_call(spec, of, implementation)
  return measure({"fused": fused, "separate": separate}, effort)


def in_child(
  spec: AttentionSpec, of: Composition, implementation: str, effort: Effort, timeout_s: float
) -> dict[str, dict]:
  """Runs `compare` in a process whose command buffers run independent kernels concurrently.

  It returns the fields of a results row for `fused` and `separate`.
  """
  code = (
    "from benchmarks.gpu.launches import child; from benchmarks.arg_specs import AttentionSpec; "
    "from benchmarks.gpu.masks import Composition; from benchmarks.gpu.timing import Effort; "
    f"child({spec!r}, {of!r}, {implementation!r}, {effort!r})"
  )
  environment = {
    "JAX_PLATFORMS": "cuda" if jax.default_backend() == "gpu" else "cpu",
    "XLA_FLAGS": CONCURRENT,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  return json.loads(timing.in_child(["-c", code], environment, timeout_s))


def child(spec: AttentionSpec, of: Composition, implementation: str, effort: Effort):
  """Prints one line of JSON: the body of that process."""
  found = compare(spec, of, implementation, effort)
  print(json.dumps({name: measured.row() for name, measured in found.items()}))
