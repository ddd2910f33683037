"""What a method moves and launches around its attention: a layer of each, compiled for an H100, beside the dense layer.

  python -m benchmarks.compiled.layer_traffic --device=offline

The scheduled HLO is read (benchmarks/compiled/hlo_bytes.py): bytes of every operation but the attention kernels, in passes over one
bf16 array of tokens `[n, D]`, and how many operations are launched. The model of costs takes its bytes and launches from
these rows (`tests/laws/test_costs.py` holds the two together). Counted in a program, not measured on a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.compiled.hlo_bytes import operations  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from freqformer.grid.layout import TileLayout  # noqa: E402
from freqformer.methods.base import Cond  # noqa: E402
from freqformer.model.attention import AttentionDims, SpectralAttention  # noqa: E402
from freqformer.simulation.forward import make_method  # noqa: E402
from tools.offline import compile_for  # noqa: E402

_DEVICE = flags.DEFINE_enum(
  "device",
  "offline",
  ["offline"],
  "Where the layer is compiled for: an absent H100.",
  allow_override=True,
)
_ONLY = flags.DEFINE_multi_string(
  "only", [], "Layers to compile, as `method(fields)@phase`; default: all."
)
LAYOUT = TileLayout((16, 32, 32), (4, 4, 8), 128)
HEADS, HEAD_DIM = 12, 128
# Rounds of the selection's bisection, which stop by themselves: as in benchmarks/compiled/memory_bound.py.
_PASSES = 9
FIXED = "freqformer(allocation=(3, 6, 3)"
AXES = FIXED + ", basis=dict(kind=dct)"
LAYERS = (
  "dense",
  f"{FIXED})",
  f"{FIXED}, filter=v)",
  f"{FIXED}, filter=qkv)",
  f"{FIXED}, low_op=linear)",
  f"{FIXED}, summary=4)",
  f"{FIXED}, summary=16)",
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
)


def compiled(text: str):
  """A layer of the method (and phase, behind an @) compiled for an H100."""
  text, _, phase = text.partition("@")
  method, width = make_method(text), HEADS * HEAD_DIM
  dims = AttentionDims(width, HEADS, width)

  def build():
    return SpectralAttention(
      dims, method, LAYOUT, nnx.Rngs(0), dtype=jnp.bfloat16, implementation="pallas_mgpu"
    )

  graphdef, params = nnx.split(nnx.eval_shape(build))
  state = jax.eval_shape(lambda: method.init_state(1, dims.for_method, LAYOUT)) if phase else {}

  def forward(params, x, arrays, tables, state):
    cond = Cond(jnp.full(1, 0.5), jnp.ones((1, width)), phase=phase)
    return nnx.merge(graphdef, params)(x, cond, arrays, tables, state)[:2]

  x = jax.ShapeDtypeStruct((1, LAYOUT.n_buffer, width), jnp.bfloat16)
  return compile_for(forward, params, x, LAYOUT.arrays(), method.tables(LAYOUT), state)


def measure(text: str) -> dict:
  """A row: bytes and launches beside the attention kernels."""
  found = operations(compiled(text).compiled.as_text(), unknown_trips=_PASSES)
  around = [
    op
    for op in found
    if not (op.kernel and any("attention_forward" in scope for scope in op.scopes))
  ]
  moved, unit = sum(op.bytes for op in around), 2 * LAYOUT.n_buffer * HEADS * HEAD_DIM
  return {
    "name": text,
    "expected": True,
    "tokens": LAYOUT.n,
    "bytes": int(moved),
    "passes": round(moved / unit, 2),
    "launches": int(sum(op.runs for op in around)),
    "attention_launches": len(found) - len(around),
  }


def main(_):
  logging.set_verbosity(logging.INFO)
  context = {"device": "NVIDIA H100 80GB HBM3 (compiled for, absent)"}
  for text in _ONLY.value or LAYERS:
    row = measure(text)
    write_rows(
      "layer_traffic",
      [context | row],
      "python -m benchmarks.compiled.layer_traffic --device=offline",
    )
    print(
      f"{text}: {row['passes']} passes, {row['launches']} launches beside {row['attention_launches']} of attention"
    )


if __name__ == "__main__":
  app.run(main)
