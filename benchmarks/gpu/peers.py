"""Kernels that ours are measured against on a GPU: cuDNN, and PyTorch in a child process."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import jax

from benchmarks.gpu.code import ROOT
from benchmarks.gpu.timing import Call


def cudnn(q, k, v):
  """Dense attention as JAX users get it.

  On a machine without a GPU, XLA's stands in for it: for rehearsals only.
  """
  on_gpu = jax.default_backend() == "gpu"
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if on_gpu else "xla")


def backward_call(
  f: Callable, inputs: tuple, cotangents: tuple, tables: tuple = ()
) -> tuple[Call, tuple]:
  """Returns the backward pass alone, from stored residuals, and the result of the forward pass.

  Args:
    f: `f(q, k, v, *tables) -> out` or a tuple of results.
    inputs: q, k, v.
    cotangents: one per result, the output's first; the call's chain runs through it.
    tables: further arguments, not differentiated.
  """
  forward = jax.jit(lambda inputs, tables: jax.vjp(lambda *a: f(*a, *tables), *inputs))
  found, pullback = forward(inputs, tables)
  single = not isinstance(found, tuple)

  def run(d_out, rest, pullback):
    return pullback(d_out if single else (d_out, *rest))

  return Call(run, (cotangents[0], tuple(cotangents[1:]), pullback)), found


def torch_rows(arguments: list[str], timeout_s: float) -> list[dict]:
  """Returns the rows that `benchmarks.gpu.torch_peers` prints, also if it is cut short.

  Raises:
    RuntimeError: if there is no torch, or no row at all came back.
  """
  if importlib.util.find_spec("torch") is None:
    raise RuntimeError("torch is not installed for this interpreter")
  command = [sys.executable, "-m", "benchmarks.gpu.torch_peers", *arguments]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=timeout_s
    )
    output = done.stdout
    trouble = done.stderr
  except subprocess.TimeoutExpired as error:
    output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    trouble = f"stopped after {timeout_s:.0f} s"
  found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
  if not found:
    raise RuntimeError(f"benchmarks.gpu.torch_peers gave no rows: {trouble[-500:]}")
  return found
