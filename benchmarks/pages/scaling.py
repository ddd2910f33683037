"""Rows, tables and figure of docs/scaling.md: what GPUs exchange in a layer; its prose is by hand.

  python -m benchmarks.pages.scaling

Rows go to results/scaling.json. Bytes are counted, seconds simulated, nothing is measured; it takes
about a minute on two cores.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks import rows as row_files
from benchmarks.pages.complexity import fill, markdown
from freqformer.cost import branch_costs
from freqformer.methods.allocation import deal_heads
from freqformer.methods.octaves import Octaves
from freqformer.methods.static import StaticMethod
from freqformer.simulation import plots
from freqformer.simulation.descriptions import Gpu, ModelCard, load_gpu, load_model
from freqformer.simulation.forward import Plan, make_method
from freqformer.simulation.scaling import parallel
from freqformer.tables.exchange import TileExchange
from freqformer.tables.window import deal_out

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "figures" / "exchange.png"
ROWS = row_files.RESULTS / "scaling.json"
COMMAND = "python -m benchmarks.pages.scaling"
GRIDS = ((16, 64, 64), (32, 64, 64), (64, 64, 64), (64, 64, 128), (64, 128, 128), (256, 64, 64))
METHODS = (
  "dense",
  "octaves",
  "freqformer",
  "sliding_tile(window=(3, 3, 3), unit=tiles)",
  "radial",
  "block_topk",
  "sparseflow",
  "sparse_linear",
  "adaspa",
  "spatial_temporal",
)
CONTEXTS = (2, 4, 8)
BY_TILES = (8, 16, 64)  # a static table has no limit by heads
# choice: assumed of a network of 400 Gb/s for each GPU; the rate within a host is the simulator's.
BETWEEN_HOSTS = 50e9
ALLOCATIONS = (
  "freqformer(allocation=(4, 8, 12), mid_tiles=26)",
  "freqformer(allocation=(8, 8, 8), mid_tiles=26)",
  "sparseflow(allocation=(14, 10))",
)
MASTER = 4  # bytes of a parameter and of its gradient


def card() -> ModelCard:
  """Returns Wan 2.1's 1.3B with 24 heads of 64, so that 8 GPUs share them."""
  return dataclasses.replace(load_model("wan2.1-1.3b"), heads=24)


def layer_row(method: str, grid: tuple[int, int, int], context: int, gpu: Gpu) -> dict:
  """Returns a layer's forward on GPUs that share a sample's tokens and exchange them for heads."""
  model = card()
  found = parallel(Plan(model, method, make_method(method), grid), gpu, context)
  sent = found.sent_bytes / model.layers
  computing = (found.seconds - found.communication_seconds) / model.layers
  launches = found.launches / model.layers * gpu.rates.launch_s
  exchange = {"a host": gpu.rates.link, "hosts": BETWEEN_HOSTS}
  return {
    "set": "layer",
    "name": f"{method} {math.prod(grid)} {context}",
    "measured": False,
    "method": method,
    "grid": list(grid),
    "tokens": math.prod(grid),
    "gpus": context,
    "sent_bytes": sent,
    "computing_seconds": computing,
    "launch_seconds": launches,
    "exchange_seconds": {name: sent / rate for name, rate in exchange.items()},
    "imbalance": found.imbalance,
  }


def bound(row: dict, where: str) -> str:
  """Returns what takes most of a layer: "computing", "link" or "launches"."""
  link = row["exchange_seconds"][where]
  computing = row["computing_seconds"] - row["launch_seconds"]
  times = {"computing": computing, "link": link, "launches": row["launch_seconds"]}
  return max(times, key=times.get)


def tiles_row(method: str, grid: tuple[int, int, int], gpus: int) -> dict:
  """Returns what a layer's forward sends where each GPU gets the tiles that its own ones list.

  Octaves' levels are dealt each; one whose tiles do not divide is gathered whole.
  """
  model = card()
  layout = Plan(model, method, make_method(method), grid).layout
  received = received_tiles(make_method(method), layout, model.heads, gpus)
  tile = layout.block * model.width * 2
  heads = 4 * layout.tiles * (gpus - 1) / gpus**2
  return {
    "set": "tiles",
    "name": f"{method} {'x'.join(map(str, grid))} {gpus}",
    "measured": False,
    "method": method,
    "grid": list(grid),
    "tokens": math.prod(grid),
    "gpus": gpus,
    "received_tiles": received,
    "tiles_bytes": 2 * received * tile,
    "heads_bytes": heads * tile,
    "built": isinstance(make_method(method), StaticMethod),
  }


def received_tiles(method, layout, heads: int, gpus: int) -> int:
  """Returns the key tiles that each GPU receives, exactly, from the method's static tables."""
  if isinstance(method, Octaves):
    masks = method.tables(layout)
    levels = [*masks.coarse, masks.window]
  else:
    levels = [method.table_of_heads(method.mask(layout), heads)]
  total = 0
  for mask in levels:
    if mask.kv_tiles % gpus:
      total += mask.kv_tiles
    else:
      total += TileExchange.of(deal_out(mask, heads), gpus).received
  return total


def training_row(gpus: int) -> dict:
  """Returns bytes that a GPU sends in a training step per layer, for each axis of that size.

  64K tokens, one sample for each copy of the model. Gradients are added up in a ring; layers are
  computed again in the backward, and with it what they gather and exchange.
  """
  model = card()
  tokens = math.prod(GRIDS[0])
  rest = (gpus - 1) / gpus
  own_block = 12 * model.width**2  # ours: four matrices of attention, two of the MLP of 4 D
  modulation = 6 * model.width**2
  weights = MASTER * (own_block + modulation)
  return {
    "set": "training",
    "name": f"training {gpus}",
    "measured": False,
    "gpus": gpus,
    "tokens": tokens,
    # Gradients: a reduce-scatter and an all-gather.
    "data_bytes": 2 * weights * rest,
    # Weights gathered twice, gradients scattered.
    "fsdp_bytes": 3 * weights * rest,
    # Tokens for heads three times; the gradients of what tokens go through. The modulation sees
    # none, and its gradient is the same everywhere.
    "context_bytes": 3 * 4 * tokens * model.width * 2 * rest / gpus + 2 * MASTER * own_block * rest,
  }


def balance_row(method: str, gpus: int) -> dict:
  """Returns the busiest GPU's work over the mean, heads in order and dealt by their cost."""
  made = make_method(method)
  heads = sum(made.allocation)
  layout = Plan(card(), method, made, GRIDS[0]).layout
  branch = np.repeat(np.arange(len(made.branches)), made.allocation)
  costs = branch_costs(made, layout, heads, 64)[branch]
  deals = {"in_order": np.array_split(np.arange(heads), gpus), "dealt": deal_heads(costs, gpus)}
  loads = {name: np.array([costs[part].sum() for part in parts]) for name, parts in deals.items()}
  ratios = {name: float(load.max() / load.mean()) for name, load in loads.items()}
  return {
    "set": "balance",
    "name": f"{method} on {gpus}",
    "measured": False,
    "method": method,
    "gpus": gpus,
    **ratios,
  }


def all_rows() -> list[dict]:
  """Returns all rows of the page."""
  gpu = load_gpu("h100")
  layers = [layer_row(m, g, c, gpu) for m in METHODS for g in GRIDS[:-1] for c in CONTEXTS]
  static = ("octaves", "sliding_tile(window=(3, 3, 3), unit=tiles)", "radial")
  tiles = [tiles_row(m, g, c) for m in static for g in GRIDS for c in BY_TILES]
  training = [training_row(c) for c in CONTEXTS]
  balance = [balance_row(m, c) for m in ALLOCATIONS for c in (4, 8)]
  return [*layers, *tiles, *training, *balance]


def tables(rows: Sequence[dict]) -> dict[str, str]:
  """Returns the page's tables by marker."""
  sets = {name: [r for r in rows if r["set"] == name] for name in {r["set"] for r in rows}}
  shown = [r for r in sets["layer"] if r["gpus"] == max(CONTEXTS)]
  sent = [
    (_tokens(r), *(f"{_of(sets['layer'], r, c)['sent_bytes'] / 1e6:,.0f}" for c in CONTEXTS))
    for r in shown
    if r["method"] == METHODS[0]
  ]
  lines = []
  for r in shown:
    if r["tokens"] in (math.prod(GRIDS[0]), math.prod(GRIDS[2]), math.prod(GRIDS[4])):
      within, between = (f"{_ms(r['exchange_seconds'][w])}" for w in ("a host", "hosts"))
      limits = " / ".join(bound(r, where) for where in ("a host", "hosts"))
      lines.append(
        (f"`{r['method']}`", _tokens(r), _ms(r["computing_seconds"]), within, between, limits)
      )
  tiles = [
    (
      f"`{r['method']}`",
      "x".join(map(str, r["grid"])),
      f"{r['heads_bytes'] / 1e6:,.0f}",
      *(f"{_of(sets['tiles'], r, c)['tiles_bytes'] / 1e6:,.0f}" for c in BY_TILES),
    )
    for r in sets["tiles"]
    if r["gpus"] == max(CONTEXTS)
  ]
  training = [
    (str(r["gpus"]), *(f"{r[f'{axis}_bytes'] / 1e6:,.0f}" for axis in ("data", "fsdp", "context")))
    for r in sets["training"]
  ]
  balance = [
    (f"`{r['method']}`", str(r["gpus"]), f"{r['in_order']:.2f}", f"{r['dealt']:.2f}")
    for r in sets["balance"]
  ]
  return {
    "sent": markdown(("tokens", *(f"{c} GPUs, MB" for c in CONTEXTS)), sent),
    "bounds": markdown(
      ("method", "tokens", "computing, ms", "exchange in a host", "between hosts", "bound by"),
      lines,
    ),
    "tiles": markdown(
      ("table of", "tokens", "by heads, 8 GPUs", *(f"by tiles, {c}" for c in BY_TILES)), tiles
    ),
    "training": markdown(("GPUs", "`data`, MB", "`fsdp`, MB", "`context`, MB"), training),
    "balance": markdown(("method", "GPUs", "heads in order", "dealt by cost"), balance),
  }


def _of(rows: Sequence[dict], like: dict, gpus: int) -> dict:
  """Returns the row of the same method and grid on so many GPUs."""
  keys = ("method", "grid")
  return next(r for r in rows if r["gpus"] == gpus and all(r[k] == like[k] for k in keys))


def _tokens(row: dict) -> str:
  return f"{row['tokens'] // 1024:,}K"


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:.2f}"


def draw(rows: Sequence[dict]) -> None:
  """Writes the figure: the share of a layer's time in which eight GPUs exchange, over tokens."""
  figure = Figure(figsize=(7, 3.6), layout="constrained")
  panels = figure.subplots(1, 2, sharey=True)
  titles = {"a host": "within a host", "hosts": "between hosts"}
  for axes, where in zip(panels, titles, strict=True):
    for method in METHODS:
      of_method = [r for r in rows if r["set"] == "layer" and r["method"] == method]
      line = [r for r in of_method if r["gpus"] == max(CONTEXTS)]
      share = [
        r["exchange_seconds"][where] / (r["exchange_seconds"][where] + r["computing_seconds"])
        for r in line
      ]
      axes.plot([r["tokens"] for r in line], share, marker=".", label=method.partition("(")[0])
    axes.set(xscale="log", xlabel="tokens", title=titles[where])
  panels[0].set(ylabel="exchange, share of a layer", ylim=(0, 1))
  panels[0].legend(fontsize=7, ncols=2)
  plots.save(figure, FIGURE)


def main() -> None:
  """Counts the rows and remakes the page's tables and figure."""
  row_files.write_rows("scaling", all_rows(), COMMAND)
  rows = json.loads(ROWS.read_text())
  DOC.write_text(fill(DOC.read_text(), tables(rows)))
  draw(rows)


if __name__ == "__main__":
  main()
