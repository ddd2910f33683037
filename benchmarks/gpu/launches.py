"""One launch against three: FreqFormer's bands in one attention call, or one call per band, in turns.

The three calls get inputs of their own, so that nothing is sliced or packed for them: the best case of separate launches.
XLA runs them one after the other; under `CONCURRENT` they are captured into one command buffer and may overlap. Such flags
bind a process, hence `in_child`. Both forms are compared by the wall clock: sums of kernel times know neither gaps nor overlap.
"""

import functools
import json

import jax
from freqformer.kernels.block_sparse.api import attention

from benchmarks import timing
from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu.masks import Composition
from benchmarks.gpu.timing import Call, Effort, Measured, measure

# Names and values as jaxlib 0.11.2 parses them; an unknown one ends the process. Without a minimum of 1, XLA captures no
# group of fewer than five kernels.
CONCURRENT = (
  "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT --xla_gpu_graph_min_graph_size=1 "
  "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
)


def attend(q, k, v, mask, implementation):
  """One call of the kernel under test."""
  return attention(q, k, v, mask, implementation=implementation)


def fused_call(spec: AttentionSpec, of: Composition, implementation: str) -> Call:
  """All bands at once."""
  problem = gpu_masks.fused(spec, of)
  return Call(
    functools.partial(attend, implementation=implementation),
    (*problem.inputs(), gpu_masks.on_device(problem.mask)),
  )


def separate_call(spec: AttentionSpec, of: Composition, implementation: str) -> Call:
  """Band by band, in one jit; mid first, so that the chain runs through the dearest."""
  low, mid, high = gpu_masks.separate(spec, of)
  problems = (mid, high, low)
  inputs = [problem.inputs() for problem in problems]
  masks = [gpu_masks.on_device(problem.mask) for problem in problems]

  def run(q, rest, masks):
    calls = zip((q, *(r[0] for r in rest[1:])), rest, masks, strict=True)
    # Every q waits for the chain's, else XLA could start the other bands of the next call early.
    return [attend(_after(q, x), r[-2], r[-1], m, implementation) for x, r, m in calls]

  return Call(run, (inputs[0][0], [tuple(inputs[0][1:]), *(tuple(x) for x in inputs[1:])], masks))


def _after(first, x):
  """x, but not before `first` is there."""
  return x if x is first else jax.lax.optimization_barrier((x, first[0, 0, 0, 0]))[0]


def compare(
  spec: AttentionSpec, of: Composition, implementation: str, effort: Effort
) -> dict[str, Measured]:
  """Both forms, in turns."""
  return measure(
    {
      "fused": fused_call(spec, of, implementation),
      "separate": separate_call(spec, of, implementation),
    },
    effort,
  )


def in_child(
  spec: AttentionSpec, of: Composition, implementation: str, effort: Effort, timeout_s: float
) -> dict[str, dict]:
  """`compare` in a process whose command buffers run independent kernels concurrently.

  Returns:
    the fields of a results row for `fused` and `separate`.
  """
  code = (
    "from benchmarks import gpu_launches as g; from benchmarks.arg_specs import AttentionSpec; "
    "from benchmarks.gpu.masks import Composition; from benchmarks.gpu.timing import Effort; "
    f"g.child({spec!r}, {of!r}, {implementation!r}, {effort!r})"
  )
  on_gpu = jax.default_backend() == "gpu"
  environment = {
    "JAX_PLATFORMS": "cuda" if on_gpu else "cpu",
    "XLA_FLAGS": CONCURRENT,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  return json.loads(timing.in_child(["-c", code], environment, timeout_s))


def child(spec: AttentionSpec, of: Composition, implementation: str, effort: Effort):
  """The body of that process: one line of JSON."""
  print(
    json.dumps(
      {name: measured.row() for name, measured in compare(spec, of, implementation, effort).items()}
    )
  )
