"""Bytes and launches around a layer's attention, counted in programs compiled for an H100.

  python -m benchmarks.compiled.layer_traffic --device=offline
  python -m benchmarks.compiled.layer_traffic --device=offline --only=adaspa@search

Bytes of every operation but the attention kernels, in passes over a bf16 array of tokens `[n, D]`;
`parts_passes` splits them by the part of the layer (`jax.named_scope`). `method(fields)@phase` is a
layer of 16 x 32 x 32 tokens; `freqformer/simulation/traffic.py` is made of their differences.
`shape/method` is one on a shape of `benchmarks/arg_specs.py`.
Rows `around/<shape>`: FreqFormer with a mid band of 5 % on the shapes of `benchmarks/arg_specs.py`;
with `_xla` without the kernels around attention. `a100/...` is the same on an A100, by Triton's
kernels. Counted in a program, not measured on a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import collections  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
from unittest import mock  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402
from flax import nnx  # noqa: E402
from freqformer.kernels.around.lift import LIFT  # noqa: E402
from freqformer.kernels.around.prepare import PREPARE  # noqa: E402
from freqformer.kernels.selection.topk import TOP_K  # noqa: E402

from benchmarks.arg_specs import SPECS  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from freqformer.analysis.hlo_bytes import operations  # noqa: E402
from freqformer.grid.layout import TileLayout  # noqa: E402
from freqformer.methods.base import Cond, Method  # noqa: E402
from freqformer.model.attention import AttentionDims, SpectralAttention  # noqa: E402
from freqformer.simulation.forward import make_method  # noqa: E402
from tools.offline import Compilation, compile_for  # noqa: E402

_DEVICE = flags.DEFINE_enum(
  "device", "offline", ["offline"], "An absent GPU is compiled for.", allow_override=True
)
_ONLY = flags.DEFINE_multi_string("only", [], "Names of rows; default: all.", allow_override=True)

LAYOUT = TileLayout((16, 32, 32), (4, 4, 8), 128)
HEADS = 12
HEAD_DIM = 128
BANDS = "freqformer(allocation=(3, 6, 3)"
AXES = BANDS + ", basis=dict(kind=dct)"
LAYERS = (
  "dense",
  f"{BANDS})",
  f"{BANDS}, filter=v)",
  f"{BANDS}, filter=qkv)",
  f"{BANDS}, low_op=linear)",
  f"{BANDS}, summary=4)",
  f"{BANDS}, summary=16)",
  "freqformer",
  f"{AXES})",
  f"{AXES}, filter=v)",
  f"{AXES}, filter=qkv)",
  f"{AXES}, summary=4)",
  "freqformer(basis=dict(kind=dct))",
  "freqformer(allocation=measured)@profile",
  "freqformer(allocation=measured)@run",
  "sparseflow(allocation=(7, 5))",
  "sparseflow",
  "block_topk(coarse=none)",
  "block_topk",
  "sparse_linear",
  "spatial_temporal@run",
  "spatial_temporal(profile=dict(rows=32))@profile",
  "spatial_temporal@profile",
  "adaspa@reuse",
  "adaspa@search",
  "octaves",
  "octaves(levels=2, factor=4)",
  "octaves(levels=2, basis=haar)",
  "octaves(levels=2, basis=haar, factor=4)",
  "octaves(basis=haar)",
  "octaves(router=dict(statistics=True))",
  "a_64k/dense",
  "a_64k/octaves(levels=2)",
  "a_64k/octaves",
  "a_64k/octaves(levels=5)",
  "a_1m/octaves(levels=6, window=(2, 2, 2), deal=octant)",
)
SHAPES = ("a_64k", "a_128k", "a_1m", "a_64k_filter_v", "a_64k_filter_qkv")
AROUND = tuple(f"around/{shape}{end}" for end in ("", "_xla") for shape in SHAPES)
_A100 = "a100/"
ON_A100 = tuple(
  f"{_A100}around/a_64k{filtered}{end}" for filtered in ("", "_filter_qkv") for end in ("", "_xla")
)
_TITLES = {"h100": "NVIDIA H100 80GB HBM3", "a100": "NVIDIA A100-SXM4-80GB"}
MID_DENSITY = 0.05  # of the mid band in `AROUND`
PARTS = ("prepare", "norm_rotary", "compress", "filter", "pool", "select", "pack", "lift")
# The selection's bisection stops when every row of a chunk is known; how often it runs is not in
# the program. Counted on normal scores: 8 passes of 7 trial values for lists of 5 % of 512 tiles, 9
# for those of 1,024, 8,192 and 16,384.
BISECTION_PASSES = 9


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer to be compiled.

  Attributes:
    method: of attention.
    phase: of it.
    layout: of the tokens.
    kernels: GPU kernels may run around attention.
    gpu: a name of tools/targets.
  """

  method: str
  phase: str = ""
  layout: TileLayout = LAYOUT
  kernels: bool = True
  gpu: str = "h100"

  @classmethod
  def named(cls, name: str) -> "Case":
    if name.startswith(_A100):
      return dataclasses.replace(cls.named(name.removeprefix(_A100)), gpu="a100")
    if not name.startswith("around/"):
      shape, slash, method = name.rpartition("/")
      method, _, phase = method.partition("@")
      return cls(method, phase, SPECS[shape].layout if slash else LAYOUT)
    shape, _, fields = name.removeprefix("around/").partition("_filter_")
    layout = SPECS[shape.removesuffix("_xla")].layout
    filtered = fields.removesuffix("_xla") or "none"
    method = f"{BANDS}, mid_tiles={int(layout.tiles * MID_DENSITY)}, filter={filtered})"
    return cls(method, layout=layout, kernels=not name.endswith("_xla"))


def program(
  method: Method,
  layout: TileLayout,
  heads: int,
  head_dim: int,
  phase: str = "",
  implementation: str = "hopper",
):
  """Returns a layer of one bf16 sample as a function and the shapes of its arguments."""
  width = heads * head_dim
  dims = AttentionDims(width, heads, width)

  def build():
    return SpectralAttention(
      dims, method, layout, nnx.Rngs(0), dtype=jnp.bfloat16, implementation=implementation
    )

  graphdef, params = nnx.split(nnx.eval_shape(build))
  state = jax.eval_shape(lambda: method.init_state(1, dims.for_method, layout)) if phase else {}

  def forward(params, x, arrays, tables, state):
    cond = Cond(jnp.full(1, 0.5), jnp.ones((1, width)), phase=phase)
    return nnx.merge(graphdef, params)(x, cond, arrays, tables, state)[:2]

  x = jax.ShapeDtypeStruct((1, layout.n_buffer, width), jnp.bfloat16)
  return forward, (params, x, layout.arrays(), method.tables(layout), state)


def compiled(case: Case) -> Compilation:
  """Compiles a layer for its GPU."""
  sizes = (case.layout, HEADS, HEAD_DIM, case.phase)
  implementation = "hopper" if case.gpu == "h100" else "triton"
  forward, args = program(make_method(case.method), *sizes, implementation)
  with contextlib.ExitStack() as stack:
    for op in () if case.kernels else (PREPARE, LIFT, TOP_K):
      for name in filter(op.is_for_gpu, op.implementations):
        refusing = mock.patch.object(op.module(name), "unsupported", lambda *_: "not wanted")
        stack.enter_context(refusing)
    return compile_for(forward, *args, device=case.gpu)


def parts_of(scopes) -> str:
  """Returns the parts of the layer that an operation's scopes name, the innermost of each scope."""
  found = set()
  for scope in scopes:
    found.update([name for name in scope.split("/") if name in PARTS][-1:])
  return "+".join(part for part in PARTS if part in found)


def measure(name: str) -> dict:
  """Returns a row: bytes and launches beside the attention kernels."""
  case = Case.named(name)
  moved = collections.Counter()
  launches = 0
  attention_launches = 0
  for op in operations(compiled(case).compiled.as_text(), unknown_trips=BISECTION_PASSES):
    if op.kernel and any("attention_forward" in scope for scope in op.scopes):
      attention_launches += 1
    else:
      moved[parts_of(op.scopes) or "other"] += op.bytes
      launches += int(op.runs)
  unit = 2 * case.layout.n_buffer * HEADS * HEAD_DIM
  return {
    "device": f"{_TITLES[case.gpu]} (compiled for, absent)",
    "name": name,
    "expected": True,
    "tokens": case.layout.n,
    "bytes": int(moved.total()),
    "passes": round(moved.total() / unit, 2),
    "parts_passes": {part: round(b / unit, 2) for part, b in moved.most_common()},
    "launches": launches,
    "attention_launches": attention_launches,
  }


def main(_) -> None:
  command = "python -m benchmarks.compiled.layer_traffic --device=offline"
  for name in _ONLY.value or LAYERS + AROUND + ON_A100:
    row = measure(name)
    write_rows("layer_traffic", [row], command)
    print(
      f"{name}: {row['passes']} passes, {row['launches']} launches beside "
      f"{row['attention_launches']} of attention; {row['parts_passes']}",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
