"""Memory traffic around the attention kernel: what the layer moves besides it, counted in a program compiled for an H100.

  python -m benchmarks.compiled.memory_bound --device=offline

The layer is compiled for an absent GPU and its scheduled HLO read: every operation's operands and results are bytes through
device memory, unless a fusion reads a slice only. Operations are named by the part of the layer they hold (`jax.named_scope`);
one that holds several is listed under all their names. `over_rotary_*`, selection and transforms alone, is what any method's
norm and rotary do not need: q, k and v read and written once, tables of angles written and read once. Rows named `..._before`
or `..._earlier` are of the commits that they name. Times are expected ones, bytes over 3.0 TB/s and FLOPs over 700 TFLOP/s
(what H100s reach in copies and dense attention elsewhere): nothing here was measured on a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import collections  # noqa: E402
import contextlib  # noqa: E402
import math  # noqa: E402
from unittest import mock  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from flax import nnx  # noqa: E402
from freqformer.kernels.selection import hopper_topk as hopper_topk  # noqa: E402

import freqformer.model.attention  # noqa: E402
from benchmarks.arg_specs import SPECS  # noqa: E402
from benchmarks.compiled.hlo_bytes import operations  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from freqformer.methods.base import Cond  # noqa: E402
from freqformer.methods.freqformer import FILTERS, FreqFormer  # noqa: E402
from freqformer.model.attention import AttentionDims, SpectralAttention  # noqa: E402
from tools.offline import compile_for  # noqa: E402

_DEVICE = flags.DEFINE_enum(
  "device",
  "offline",
  ["offline"],
  "Where the layer is compiled for: an absent H100.",
  allow_override=True,
)
_SPECS = flags.DEFINE_multi_string(
  "spec", ["a_64k", "a_128k", "a_1m"], "Shapes of benchmarks/arg_specs.py.", allow_override=True
)
_FILTER = flags.DEFINE_enum(
  "filter",
  "none",
  FILTERS,
  "Which projections are band-filtered; part of the rows' names unless none.",
  allow_override=True,
)
_XLA = flags.DEFINE_bool(
  "xla",
  False,
  "Without kernels around attention; the rows' names then end in _xla.",
  allow_override=True,
)
_NOTE = flags.DEFINE_string(
  "note", "", "Added to the rows' names, to keep two versions side by side."
)
BYTES_PER_S, FLOPS_PER_S = 3.0e12, 700e12
PARTS = ("prepare", "norm_rotary", "compress", "filter", "pool", "select", "pack", "lift")
DENSITY = 0.05  # of the mid band
# The selection's bisection stops when every row of a chunk is known; how often it runs is not in the program. Counted on normal
# scores: 8 passes of 7 trial values for lists of 5 % of 512 tiles, 9 for those of 1,024, 8,192 and 16,384.
_PASSES = 9


def bands(spec) -> FreqFormer:
  """3 low, 6 mid, 3 high heads of 12."""
  share = spec.heads // 4
  mid = max(1, int(spec.layout.tiles * DENSITY))
  return FreqFormer(
    allocation=(share, spec.heads - 2 * share, share),
    mid_tiles=mid,
    window=(3, 3, 3),
    filter=_FILTER.value,
  )


def layer(spec, method):
  """The compilation of a layer of a shape."""
  width = spec.heads * spec.head_dim
  dims = AttentionDims(width, spec.heads, width)

  def build():
    return SpectralAttention(
      dims, method, spec.layout, nnx.Rngs(0), dtype=jnp.bfloat16, implementation="pallas_mgpu"
    )

  graphdef, params = nnx.split(nnx.eval_shape(build))

  def forward(params, x, arrays, tables):
    cond = Cond(jnp.full(1, 0.5), jnp.ones((1, width)))
    return nnx.merge(graphdef, params)(x, cond, arrays, tables, {})[0]

  x = jax.ShapeDtypeStruct((1, spec.layout.n_buffer, width), jnp.bfloat16)
  with contextlib.ExitStack() as stack:
    for module in (freqformer.model.attention, hopper_topk) if _XLA.value else ():
      stack.enter_context(
        mock.patch.object(module, "unsupported", lambda *_: "asked to do without")
      )
    return compile_for(forward, params, x, spec.layout.arrays(), method.tables(spec.layout))


def parts_of(scopes) -> str:
  """The parts of the layer that an operation's scopes name; the innermost known name of each counts."""
  found = set()
  for scope in scopes:
    names = [name for name in scope.split("/") if name in PARTS]
    found.update(names[-1:])
  return "+".join(part for part in PARTS if part in found)


def traffic(compilation):
  """Bytes per part around attention, and of all else but the attention kernel."""
  moved, rest = collections.Counter(), 0.0
  for op in operations(compilation.compiled.as_text(), unknown_trips=_PASSES):
    if part := parts_of(op.scopes):
      moved[part] += op.bytes
    elif not op.kernel:
      rest += op.bytes
  return moved, rest


def measure(spec) -> dict:
  """One row: bytes per part, their expected time, and the attention call's beside them."""
  method = bands(spec)
  compilation = layer(spec, method)
  moved, rest = traffic(compilation)
  flops = method.cost(spec.layout, spec.heads, spec.head_dim).attention_flops
  width = spec.heads * spec.head_dim
  unit = 2 * spec.layout.n_buffer * width  # one bf16 array of tokens
  attention_s = max(flops / FLOPS_PER_S, 4 * unit / BYTES_PER_S)
  total = sum(moved.values())
  over_rotary = (
    total - 6 * unit - 2 * 4 * spec.layout.n_buffer * spec.head_dim
  )  # two float32 tables of half the channels
  filtered = f"_filter_{method.filter}" if method.filter != "none" else ""
  return {
    "name": f"memory_bound_{spec.name}{filtered}{'_xla' * _XLA.value}{_NOTE.value}",
    "expected": True,
    "tokens": spec.n,
    "parts_bytes": {k: int(v) for k, v in moved.most_common()},
    "parts_arrays": {k: round(v / unit, 2) for k, v in moved.most_common()},
    "bytes": int(total),
    "arrays": round(total / unit, 2),
    "other_bytes": int(rest),
    "temp_bytes": compilation.temp_bytes,
    "expected_parts_ms": 1e3 * total / BYTES_PER_S,
    "expected_attention_ms": 1e3 * attention_s,
    "share_of_attention": total / BYTES_PER_S / attention_s,
    "over_rotary_arrays": round(over_rotary / unit, 2),
    "over_rotary_share_of_attention": over_rotary / BYTES_PER_S / attention_s,
  }


def main(_):
  logging.set_verbosity(logging.INFO)
  rows = [measure(SPECS[name]) for name in _SPECS.value]
  context = {"device": "NVIDIA H100 80GB HBM3 (compiled for, absent)"}
  command = (
    "python -m benchmarks.compiled.memory_bound --device=offline"
    + f" --filter={_FILTER.value}" * (_FILTER.value != "none")
  )
  command += " --xla" * _XLA.value
  write_rows("memory_bound", [context | row for row in rows], command)
  for row in rows:
    print(
      f"{row['name']}: {row['arrays']} arrays of tokens, expected {row['expected_parts_ms']:.2f} ms beside "
      f"{row['expected_attention_ms']:.2f} ms of attention ({row['share_of_attention']:.0%}); "
      f"{row['over_rotary_arrays']} arrays ({row['over_rotary_share_of_attention']:.1%}) are not norm and rotary"
    )
    for part, arrays in row["parts_arrays"].items():
      print(f"  {part:<32} {arrays:6.2f}")
    if not math.isfinite(row["bytes"]):
      raise ValueError(f"{row['name']}: no bytes counted")


if __name__ == "__main__":
  app.run(main)
