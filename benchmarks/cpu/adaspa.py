"""AdaSpa's parts on this CPU: their time, the size of the state, and the recall of masks in a run.

  python -m benchmarks.cpu.adaspa --part=time     # a minute on 2 CPU cores
  python -m benchmarks.cpu.adaspa --part=state    # bytes, by shapes alone
  python -m benchmarks.cpu.adaspa --part=recall --workdir=runs/compare/dense-seed0-steps800
                                                  # two minutes; a dense checkpoint

Rows go to `results/adaspa.json`. Recall is the share of the true softmax mass (by each step's own
dense LSE, on AdaSpa's own trajectory) that lies on the listed tiles. It is compared with the oracle
(searched in that very step), with the masks of the first search kept for good, and with random
tiles, all at the base budget.
"""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.selection.block_scores import block_mass

from benchmarks import rows, timing
from benchmarks.arg_specs import AttentionSpec
from benchmarks.cpu.competitors import call, sparse
from benchmarks.trained.runs import aux_of_run, with_method
from freqformer.evaluate.restore import load_run
from freqformer.grid.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa
from freqformer.methods.base import Cond, Projected
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT
from freqformer.tables.adaspa_memory import store_lse, top_bits, unpack_bits
from tools.offline import compile_for

_PART = flags.DEFINE_enum("part", "time", ["time", "state", "recall"], "What to measure.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "recall: run of a dense model.", allow_override=True
)
_STEPS = flags.DEFINE_integer("steps", 50, "recall: denoising steps.", allow_override=True)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "time: turns of every part.", allow_override=True)

CACHES = {
  "row_f32": dict(lse_dtype="float32"),
  "row_bf16": {},
  "row_uint8": dict(lse_dtype="uint8"),
  "tile_bf16": dict(lse_cache="tile"),
}


# ---- time --------------------------------------------------------------------------------


def time_rows() -> list[dict]:
  """Times each part of a step by itself, and whole steps.

  The shape is 8,192 tokens, 4 heads of 64, tiles of 128 rows.
  """
  spec = AttentionSpec("time", (8, 32, 32), 4, 64, dtype="float32")
  layout = spec.layout
  method = AdaSpa()
  arrays = layout.arrays()
  tables = method.tables(layout)
  q, k, v = spec.inputs()
  dense = call(lambda q, k, v: attention(q, k, v, tables["dense"]), q, k, v)
  lse = dense()[1]
  mass = call(lambda q, k, lse: block_mass(q, k, lse, arrays.kv_len, layout.block), q, k, lse)
  find = call(lambda q, k, lse: method.find(q, k, lse, arrays, tables["fixed"]), q, k, lse)
  select = call(lambda mass: top_bits(mass, method.budgets(layout), tables["fixed"]), mass())
  lists = call(lambda bits: method.mask(bits, arrays), find()[0])
  mask = lists()
  calls = {
    "dense attention": dense,
    "block mass": mass,
    "selection": select,
    "mass and selection (find)": find,
    "lists from bits": lists,
    "sparse attention": call(sparse, q, k, v, mask),
  }
  state = {"bits": find()[0], **store_lse(method.lse_cache, method.lse_dtype, lse, arrays)}

  def unrotated(x, positions):
    return x

  for phase in ("warmup", "search_first", "search", "reuse"):
    cond = Cond(jnp.zeros(1), jnp.zeros((1, 1)), phase=phase)

    def step(q, k, v, state, cond=cond):
      qkv = Projected(q, k, v, unrotated, unrotated, arrays)
      return method(None, qkv, cond, tables, state)[:2]

    calls[f"step {phase}"] = call(step, q, k, v, state)
  times = timing.interleave(calls, _ROUNDS.value)
  density = float(mask.density(layout.n).mean())
  return [
    rows.goal_row(f"time/{name}", t.median, None, unit="s", density=density, **t.row())
    for name, t in times.items()
  ]


# ---- state -------------------------------------------------------------------------------


def state_rows() -> list[dict]:
  """Counts the bytes that the sampler carries for 40 layers of 40 heads at 75,600 tokens.

  The grid is 21x45x80 in tiles of 128 rows, sampling is guided.
  """
  shape = (21, 45, 80, 16)
  found = []
  for name, tile, fields in (
    ("default tile", (), {}),
    ("tile 7x9x2", (7, 9, 2), {}),
    ("default tile, lse_dtype=uint8", (), dict(lse_dtype="uint8")),
    ("default tile, lse_cache=tile", (), dict(lse_cache="tile")),
  ):
    attention = dict(method="adaspa", block=128, tile=tile, adaspa=fields)
    config = model_config(
      dict(size="custom", width=5120, depth=40, heads=40, patch=(1, 1, 1), attention=attention)
    )
    model = nnx.eval_shape(lambda config=config: VideoDiT(config, shape, 1, nnx.Rngs(0)))
    state = jax.eval_shape(lambda model=model: model.init_state(2, shape, guided=True))
    sizes = {
      f"{k}_bytes": math.prod(x.shape) * x.dtype.itemsize for run in state for k, x in run.items()
    }
    total = sum(sizes.values())
    layout = config.layout(shape)
    fields = dict(mebibytes=total / 2**20, tile=layout.tile, tiles=layout.tiles, **sizes)
    found.append(rows.goal_row(f"state/{name}", total / 1e6, "<= 320", unit="MB", **fields))
  return found + [_search_memory(TileLayout.fit(shape[:3], 128))]


def _search_memory(layout) -> dict:
  """Counts the temporary bytes of a layer's search, compiled for an H100 that need not be there."""
  arrays = layout.arrays()
  method = AdaSpa()
  q = jax.ShapeDtypeStruct((1, layout.n_buffer, 40, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 40, layout.n_buffer), jnp.bfloat16)

  def find(q, k, lse, fixed):
    return method.find(q, k, lse, arrays, fixed)

  megabytes = compile_for(find, q, q, lse, method.tables(layout)["fixed"]).temp_bytes / 1e6
  scores = 4 * layout.n_buffer**2 / 1e6
  return rows.goal_row(
    "search memory, H100", megabytes, None, unit="MB", scores_of_one_head_mb=scores
  )


# ---- recall ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Audited(AdaSpa):
  """AdaSpa that also reports in every step the share of that step's true mass that its masks keep.

  It runs dense attention in addition. Budgets are equal (`adaptive=False`), so that all sets of
  tiles have one size.
  """

  adaptive: bool = False

  def init_state(self, batch, dims, layout):
    state = super().init_state(batch, dims, layout)
    return state | {"first": state["bits"]}

  def __call__(self, module, qkv, cond, tables, state):
    own = {name: value for name, value in state.items() if name != "first"}
    out, new, aux = super().__call__(module, qkv, cond, tables, own)
    first = new["bits"] if cond.phase == "search_first" else state["first"]
    if cond.phase in ("search_first", "search", "reuse"):
      aux = aux | {"kept": self._kept(qkv, tables, {"adaspa": new["bits"], "first": first})}
    return out, new | {"first": first}, aux

  def _kept(self, qkv, tables, bits) -> dict:
    """Returns the share of the true mass on each set of tiles, `[samples, h]` each."""
    arrays = qkv.layout
    q, k = qkv.rotated()
    _, lse = attention(q, k, qkv.v, tables["dense"], implementation=qkv.implementation)
    samples = bits["first"].shape[0]
    mass = block_mass(q[:samples], k[:samples], lse[:samples], arrays.kv_len, arrays.block)
    base = self.budgets(arrays.layout)[1]
    anything = jax.random.uniform(jax.random.key(0), mass.shape)
    bits["oracle"] = top_bits(mass, [base])[..., 0, :]
    bits["random"] = top_bits(anything, [base], tables["fixed"])[..., 0, :]

    def kept(bits):
      return jnp.where(unpack_bits(bits, arrays.tiles), mass, 0).sum((-1, -2))

    return {name: kept(x) / mass.sum((-1, -2)) for name, x in bits.items()}


def recall_rows(workdir: str, steps: int) -> list[dict]:
  """Measures the mass kept with each form of the LSE cache.

  Shares are means over samples, heads and layers, by phase and at the worst step.
  """
  restored = load_run(workdir, method="dense")
  config = dataclasses.replace(restored.experiment.sample, steps=steps, batch_size=4)
  labels = np.arange(4, dtype=np.int32) % len(restored.class_names)
  found = []
  for name, fields in CACHES.items():
    method = Audited(**fields)
    model = with_method(restored, method)
    aux = aux_of_run(dataclasses.replace(restored, model=model), labels, labels, config)
    kept = collections.defaultdict(list)  # by kind and phase
    worst = 1.0
    for (phase, *_), (own, *_) in zip(model.schedule(steps), aux, strict=True):
      shares = {kind: float(share.mean()) for kind, share in own.get("kept", {}).items()}
      for kind, share in shares.items():
        kept[f"{kind}_{phase}"].append(share)
      worst = min(worst, shares["adaspa"] / shares["oracle"]) if shares else worst
    overall = float(np.mean(kept["adaspa_search"] + kept["adaspa_reuse"]))
    means = {key: float(np.mean(x)) for key, x in kept.items() if not key.endswith("first")}
    layout = model.config.layout(restored.latent_shape)
    sizes = dict(tokens=layout.n, tiles=layout.tiles, listed=method.budgets(layout)[1])
    row = rows.goal_row(f"recall/{name}", overall, None, unit="", **means)
    found.append(row | sizes | {"worst_of_oracle": worst})
  return found


def main(_):
  part = _PART.value
  command = f"python -m benchmarks.cpu.adaspa --part={part}"
  if part == "recall":
    if not _WORKDIR.value:
      raise app.UsageError(
        "--part=recall needs --workdir, a run of a dense model "
        "(python -m benchmarks.trained.demo_compare makes some)."
      )
    command += f" --workdir={_WORKDIR.value} --steps={_STEPS.value}"
    found = recall_rows(_WORKDIR.value, _STEPS.value)
  else:
    found = timing.beside_others(time_rows) if part == "time" else state_rows()
  logging.info("rows in %s", rows.write_rows("adaspa", found, command))
  print(rows.table(found))


if __name__ == "__main__":
  app.run(main)
