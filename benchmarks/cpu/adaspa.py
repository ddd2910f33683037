"""AdaSpa's parts: time of search, selection, lists and attention apart; recall of its masks in a real run; size of its state.

  python -m benchmarks.cpu.adaspa --part=time                                              # a minute on 2 CPU cores
  python -m benchmarks.cpu.adaspa --part=state                                             # bytes, by shapes alone
  python -m benchmarks.cpu.adaspa --part=recall --workdir=runs/compare/dense-seed0-steps800   # two minutes; a dense checkpoint

Rows go to `results/adaspa.json`. Recall is the share of the true softmax mass (by each step's own dense LSE, on AdaSpa's own
trajectory) that lies on the listed tiles, beside the same for the oracle (searched in that very step), for the masks of the
first search kept for good, and for random tiles, all at the base budget.
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.selection.block_scores import block_mass

from benchmarks import rows, timing
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.evaluate.restore import restore_model
from freqformer.grid.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa
from freqformer.methods.base import Cond, Projected
from freqformer.model.config import model_config
from freqformer.model.dit import VideoDiT
from freqformer.tables import lse_cache
from freqformer.tables.adaspa_memory import top_bits, unpack_bits
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


# ---- time ----------------------------------------------------------------------------------------------------------------


def time_rows() -> list[dict]:
  """8,192 tokens, 4 heads of 64, tiles of 128 rows: each part of a step by itself, and whole steps."""
  layout, method = TileLayout.fit((8, 32, 32), 128), AdaSpa()
  arrays, tables = layout.arrays(), AdaSpa().tables(layout)
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((1, layout.n_buffer, 4, 64)), jnp.float32) for _ in "qkv"
  )
  dense = jax.jit(lambda q, k, v: attention(q, k, v, tables["dense"]))
  lse = dense(q, k, v)[1]
  mass_of = jax.jit(lambda q, k, lse: block_mass(q, k, lse, arrays.kv_len, layout.block))
  find = jax.jit(lambda q, k, lse: method.find(q, k, lse, arrays, tables["fixed"]))
  select = jax.jit(lambda mass: top_bits(mass, method.budgets(layout), tables["fixed"]))
  lists, sparse = (
    jax.jit(lambda bits: method.mask(bits, arrays)),
    jax.jit(lambda q, k, v, mask: attention(q, k, v, mask)[0]),
  )
  mass, (bits, _) = mass_of(q, k, lse), find(q, k, lse)
  mask, state = (
    lists(bits),
    {"bits": bits, **lse_cache.store(method.lse_cache, method.lse_dtype, lse, arrays)},
  )

  def plain(x, positions):
    return x

  def cond(phase):
    return Cond(jnp.zeros(1), jnp.zeros((1, 1)), phase=phase)

  def whole(phase):
    def run(q, k, v, state):
      return method(None, Projected(q, k, v, plain, plain, arrays), cond(phase), tables, state)[:2]

    return functools.partial(jax.jit(run), q, k, v, state)

  calls = {
    "dense attention": lambda: dense(q, k, v),
    "block mass": lambda: mass_of(q, k, lse),
    "selection": lambda: select(mass),
    "mass and selection (find)": lambda: find(q, k, lse),
    "lists from bits": lambda: lists(bits),
    "sparse attention": lambda: sparse(q, k, v, mask),
  }
  calls |= {
    f"step {phase}": whole(phase) for phase in ("warmup", "search_first", "search", "reuse")
  }
  bystanders = timing.Bystanders()
  times = timing.interleave(calls, _ROUNDS.value)
  density, others = float(mask.density(layout.n).mean()), bystanders.share()
  cpu = {
    name: float(np.median([_cpu_seconds(c) for _ in range(_ROUNDS.value)]))
    for name, c in calls.items()
  }
  shape = dict(
    tokens=layout.n, heads=4, head_dim=64, block=128, density=density, others_cpu=others, unit="s"
  )
  found = [
    {
      "name": f"time/{name}",
      "value": t.median,
      "goal": None,
      "met": None,
      "cpu_s": cpu[name],
      **t.row(),
      **shape,
    }
    for name, t in times.items()
  ]
  for name in ("sparse attention", "step reuse"):
    for kind, ratio in (
      ("wall time", times["dense attention"].median / times[name].median),
      ("CPU time", cpu["dense attention"] / cpu[name]),
    ):
      fields = shape | {"unit": "", "speed_up": ratio, "largest_possible": 1 / density}
      found.append(
        rows.goal_row(f"time/{name}, retained by {kind}", ratio * density, ">= 0.6", **fields)
      )
  return found


def _cpu_seconds(call) -> float:
  """CPU time of one call over all threads: what a busy machine changes least."""
  start = time.process_time()
  jax.block_until_ready(call())
  return time.process_time() - start


# ---- state ---------------------------------------------------------------------------------------------------------------


def state_rows() -> list[dict]:
  """Bytes that the sampler carries for 40 layers of 40 heads at 21x45x80 = 75,600 tokens, tiles of 128 rows, guided."""
  found, shape = [], (21, 45, 80, 16)
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
    sizes = {k: math.prod(x.shape) * x.dtype.itemsize for run in state for k, x in run.items()}
    layout = config.layout(shape)
    fields = dict(
      unit="MB",
      **{f"{k}_bytes": v for k, v in sizes.items()},
      mebibytes=sum(sizes.values()) / 2**20,
      tile=layout.tile,
      tiles=layout.tiles,
    )
    found.append(rows.goal_row(f"state/{name}", sum(sizes.values()) / 1e6, "<= 320", **fields))
  return found + [_search_memory(TileLayout.fit(shape[:3], 128))]


def _search_memory(layout) -> dict:
  """Temporary bytes of one layer's search, compiled for an H100 (by XLA; no GPU is asked for)."""
  arrays, method = layout.arrays(), AdaSpa()
  q = jax.ShapeDtypeStruct((1, layout.n_buffer, 40, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 40, layout.n_buffer), jnp.bfloat16)
  fixed = method.tables(layout)["fixed"]
  compiled = compile_for(
    lambda q, k, lse, fixed: method.find(q, k, lse, arrays, fixed), q, q, lse, fixed
  )
  scores = 4 * layout.n_buffer**2 / 1e6
  return rows.goal_row(
    "search memory, H100", compiled.temp_bytes / 1e6, None, unit="MB", scores_of_one_head_mb=scores
  )


# ---- recall --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Audited(AdaSpa):
  """AdaSpa that also says in every step what its masks keep of that step's true mass. Runs dense attention beside it.

  Budgets are equal (`adaptive=False`), so that all sets of tiles have one size.
  """

  adaptive: bool = False

  def init_state(self, batch, dims, layout):
    state = super().init_state(batch, dims, layout)
    return state | {"first": state["bits"]}

  def __call__(self, module, qkv, cond, tables, state):
    out, new, aux = super().__call__(
      module, qkv, cond, tables, {k: v for k, v in state.items() if k != "first"}
    )
    first = new["bits"] if cond.phase == "search_first" else state["first"]
    if cond.phase in ("search_first", "search", "reuse"):
      aux = aux | {"kept": self._kept(qkv, cond, tables, {"adaspa": new["bits"], "first": first})}
    return out, new | {"first": first}, aux

  def _kept(self, qkv, cond, tables, bits) -> dict:
    """Share of the true mass on each set of tiles, `[samples, h]` each."""
    arrays, layout = qkv.layout, qkv.layout.layout
    q, k = qkv.rotated()
    _, lse = attention(q, k, qkv.v, tables["dense"], implementation=qkv.implementation)
    samples = bits["first"].shape[0]
    mass = block_mass(q[:samples], k[:samples], lse[:samples], arrays.kv_len, layout.block)
    base, anything = self.budgets(layout)[1], jax.random.uniform(jax.random.key(0), mass.shape)
    bits["oracle"] = top_bits(mass, [base])[..., 0, :]
    bits["random"] = top_bits(anything, [base], tables["fixed"])[..., 0, :]

    def kept(bits):
      return jnp.where(unpack_bits(bits, layout.tiles), mass, 0).sum((-1, -2))

    return {name: kept(x) / mass.sum((-1, -2)) for name, x in bits.items()}


def recall_rows(workdir: str, steps: int) -> list[dict]:
  """One row per form of the LSE cache: mass kept, mean over samples, heads and layers, by phase and at the worst step."""
  base, params, restored = restore_model(workdir, method="dense")
  shape, found = restored.latent_shape, []
  config = SampleConfig(**{**vars(restored.experiment.sample), "steps": steps, "batch_size": 4})
  labels = np.arange(4, dtype=np.int32) % len(restored.class_names)
  for name, fields in CACHES.items():
    method = Audited(**fields)
    attention_config = dataclasses.replace(
      base.config.attention, method="adaspa", methods=(("adaspa", method),)
    )

    def model_of(c):
      return nnx.eval_shape(lambda: VideoDiT(c, shape, len(restored.class_names), nnx.Rngs(0)))

    model = model_of(dataclasses.replace(base.config, attention=attention_config))
    step = make_step(nnx.graphdef(model), config)
    _, aux = sample(
      step, params, model, labels, labels, 0, model.tables(shape), shape, config, progress=False
    )
    phases = [p[0] for p in model.schedule(steps)]
    kept = {
      s: {k: float(v.mean()) for k, v in aux[s][0]["kept"].items()}
      for s in range(steps)
      if "kept" in aux[s][0]
    }

    def mean(which, kind, kept=kept, phases=phases):
      return float(np.mean([kept[s][kind] for s in kept if phases[s] in which]))

    kinds = ("adaspa", "first", "oracle", "random")
    row = rows.goal_row(f"recall/{name}", mean(("search", "reuse"), "adaspa"), None, unit="")
    row |= {
      f"{kind}_{phase}": mean((phase,), kind) for kind in kinds for phase in ("search", "reuse")
    }
    row |= dict(
      worst_of_oracle=min(kept[s]["adaspa"] / kept[s]["oracle"] for s in kept),
      tokens=model.config.layout(shape).n,
      tiles=model.config.layout(shape).tiles,
      listed=method.budgets(model.config.layout(shape))[1],
      by_step_of=kinds,
      by_step=[[s, *(round(kept[s][kind], 4) for kind in kinds)] for s in kept],
      checkpoint_steps=restored.step,
    )
    found.append(row)
  return found


def main(_):
  if _PART.value == "recall" and not _WORKDIR.value:
    raise app.UsageError(
      "--part=recall needs --workdir, a run of a dense model (python -m benchmarks.trained.demo_compare makes some)."
    )
  command = f"python -m benchmarks.cpu.adaspa --part={_PART.value}" + (
    f" --workdir={_WORKDIR.value}" if _WORKDIR.value else ""
  )
  if _PART.value == "recall":
    found = recall_rows(_WORKDIR.value, _STEPS.value)
    command += f" --steps={_STEPS.value}"
  else:
    found = time_rows() if _PART.value == "time" else state_rows()
  logging.info("rows in %s", rows.write_rows("adaspa", found, command))
  print(rows.table(found))


if __name__ == "__main__":
  app.run(main)
