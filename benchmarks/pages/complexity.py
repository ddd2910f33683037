"""Tables and figures of docs/complexity.md, by one command; its prose is written by hand.

  make simulate
  python -m benchmarks.pages.complexity [--workdir=runs/complexity]   # of a run with FreqFormer
  python -m benchmarks.pages.complexity --keep_approximation          # without a trained run

Rows go to results/simulation.json, plots to docs/figures/, tables into docs/complexity.md between
their markers. `measured` of a row is true for approximation errors, false for the simulator's
seconds; a measurement beside such a row, published or our own, is its `measured_seconds`. The page
shows part of a row's fields; the file has all.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

from absl import app, flags, logging

from benchmarks import rows as row_files
from freqformer.analysis import bounds as approximation
from freqformer.analysis import probe
from freqformer.analysis.summary import ratio_text, summary
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS
from freqformer.simulation import calibrate, plots
from freqformer.simulation.descriptions import Gpu, load_gpu, load_model
from freqformer.simulation.forward import Plan, dense_baseline, make_method
from freqformer.simulation.output import grid_text, number
from freqformer.simulation.scaling import denoising_run, largest_video, row

_WORKDIR = flags.DEFINE_string(
  "workdir",
  "runs/complexity",
  "A run trained with FreqFormer, for the approximation errors.",
  allow_override=True,
)
_KEEP = flags.DEFINE_bool(
  "keep_approximation",
  False,
  "Keep the stored approximation errors instead of measuring them.",
  allow_override=True,
)

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "docs" / "complexity.md"
FIGURES = ROOT / "docs" / "figures"
PUBLISHED = ROOT / "freqformer" / "simulation" / "published" / "h100.json"
ROWS = row_files.RESULTS / "simulation.json"
COMMAND = "python -m benchmarks.pages.complexity"
Cell = Callable[[dict], str]

# The papers' range, at shape A's grids; the model with 12 heads of 128.
GRIDS = ((16, 64, 64), (32, 64, 64), (64, 64, 64), (64, 64, 128), (64, 128, 128))
MID_DENSITY = 0.05  # of FreqFormer's mid band in the sweep
SPARSER = "freqformer (mid band at 5 %)"
DEEPER = "octaves (6 levels, windows of 2x2x2 tiles)"
# Wan 2.1 at 480p and 720p, HunyuanVideo at 117 frames of 768 x 1280 and at 509 frames of 720p.
VIDEO_GRIDS = ((21, 30, 52), (21, 45, 80), (30, 48, 80), (128, 45, 80))
OWN_TILES = {"sliding_tile": (6, 8, 8), "radial": (1, 8, 16)}  # the papers'

# ---- rows: validation ----------------------------------------------------------------------------


def validation() -> tuple[Gpu, list[dict]]:
  """Returns the H100 fitted to three published rows, and the errors of two fits.

  The second fit predicts sliding tile attention's row after fitting the dense rate alone.
  """
  start = load_gpu("h100")
  measured, _ = calibrate.load_rows(PUBLISHED, "h100")
  fit = calibrate.calibrate(start, measured)
  chosen = "FA3 dense on 30x48x80"
  alone = [dataclasses.replace(m, fit=m.name == chosen) for m in measured if "30x48x80" in m.name]
  one = calibrate.calibrate(start, alone, free=("attention_flops",))
  found = [r | {"set": "three published rows fitted"} for r in fit.rows]
  return fit.gpu, found + [r | {"set": "dense rate alone fitted"} for r in one.rows]


def cpu_rows() -> list[dict]:
  """Returns our own CPU rows: two rates fitted to the dense and one sparse call."""
  path = row_files.RESULTS / "attention_cpu.json"
  fitted = (": dense_mode", ": sparse")
  measured, _ = calibrate.load_rows(path, "cpu")
  measured = [dataclasses.replace(m, fit=m.name.endswith(fitted)) for m in measured]
  fit = calibrate.calibrate(load_gpu("cpu"), measured, free=("softmax_exposed", "item_s"))
  ours = {r["name"]: r for r in row_files.read_rows(path)}
  found = []
  for r in fit.rows:
    name, part = r["name"].split(": ")
    spread = [ours[name][part][k] for k in ("p10_s", "p90_s")]
    found.append(r | {"set": "cpu", "measured_p10_p90_s": spread})
  return found


def published_run(gpu: Gpu) -> list[dict]:
  """Returns HunyuanVideo end to end on an H100: published, and simulated for the same shape."""
  one = row(plans((), "hunyuanvideo", (30, 48, 80))[0], gpu)  # what they ran
  facts = {k: one[k] for k in ("gpu", "measured", "rates_fitted", "rates_assumed")} | {
    "set": "published run",
    "fitted": False,
    "source": "arXiv 2502.04507: 945 s on one H100 with FlashAttention-3, 800 s of it attention; "
    "50 steps",
    "derived": "",
  }
  found = []
  for part, field, published in (
    ("all", "seconds", 945.0),
    ("attention", "attention_seconds", 800.0),
  ):
    seconds = 50 * one[field]
    times = {"seconds": seconds, "measured_seconds": published, "error": seconds / published - 1}
    found.append({"name": f"HunyuanVideo, 115,200 tokens, 50 steps: {part}"} | facts | times)
  return found


# ---- rows: simulation ----------------------------------------------------------------------------


def plans(methods: tuple[str, ...], card: str, grid: tuple[int, int, int]) -> list[Plan]:
  """Returns the plan of the unpadded dense baseline, then those of the methods."""
  found = [Plan(load_model(card), name, make_method(name), grid) for name in ("dense", *methods)]
  return [dense_baseline(found[0]), *found[1:]]


def sweep(gpu: Gpu) -> list[dict]:
  """Returns 64K to 1M tokens: every method's defaults, FreqFormer at a fixed mid density, octaves
  with more levels and dealt windows.

  These grids fill their tiles: `dense` is its own unpadded baseline.
  """
  found = []
  for grid in GRIDS:
    baseline, *defaults = plans(tuple(METHODS), "wan2.1-1.3b", grid)
    tiles = round(MID_DENSITY * baseline.layout.tiles)
    texts = {
      SPARSER: f"freqformer(mid_tiles={tiles})",
      DEEPER: "octaves(levels=6, window=(2, 2, 2), deal=octant)",
    }
    more = [
      dataclasses.replace(defaults[0], name=name, method=make_method(text))
      for name, text in texts.items()
    ]
    base = row(baseline, gpu)
    for plan in (*defaults, *more):
      r = row(plan, gpu)
      attention = r["attention_seconds"] + r["around_seconds"]
      speedups = {
        "speedup_over_dense": base["seconds"] / r["seconds"],
        "attention_speedup": base["attention_seconds"] / attention,
      }
      found.append(r | {"set": "sweep"} | speedups)
  return found


def durations(gpu: Gpu) -> list[dict]:
  """Returns seconds of GPU for a run of 720p video, and the longest video that fits."""
  card = load_model("hunyuanvideo")
  found = []
  for t in (33, 66, 128, 256):
    for plan in plans(("dense", "freqformer", "sliding_tile"), card.name, (t, 45, 80)):
      one = row(plan, gpu)
      run = denoising_run(plan, gpu)["run_seconds"]
      extra = {
        "set": "duration",
        "run_seconds": run,
        "fits": one["memory_bytes"] <= gpu.memory_bytes,
        "gpu_s_per_video_s": run / one["video_seconds"],
      }
      found.append(one | extra)
  for name in ("dense", "freqformer"):
    grid = largest_video(Plan(card, name, make_method(name), (1, 45, 80)), gpu)
    facts = {"set": "largest", "model": card.name, "method": name, "gpu": gpu.name}
    seconds = card.video_seconds(grid)
    found.append(facts | {"grid": list(grid), "measured": False, "video_seconds": seconds})
  return found


def against_dense(name: str, gpu: Gpu, gpus: int = 1) -> list[dict]:
  """Returns one forward of Wan2.1-14B at 720p: the baseline, dense and FreqFormer."""
  found = [
    row(plan, gpu, gpus) for plan in plans(("dense", "freqformer"), "wan2.1-14b", (21, 45, 80))
  ]
  dense = found[0]["seconds"]
  return [r | {"set": name, "speedup_over_dense": dense / r["seconds"]} for r in found]


def several_gpus(gpu: Gpu) -> list[dict]:
  """Returns Wan2.1-14B at 720p on 1 to 8 GPUs, heads dealt greedily."""
  found = [r for gpus in (1, 2, 4, 8) for r in against_dense("gpus", gpu, gpus)]
  methods = list(dict.fromkeys(r["method"] for r in found))
  return sorted(found, key=lambda r: methods.index(r["method"]))


def devices(h100: Gpu) -> list[dict]:
  """Returns one forward on each GPU; the H200 has the H100's SMs, hence its fitted rates."""
  h200 = calibrate.carry_over(h100, load_gpu("h200"))
  others = ("a100", "l40s", "rtx4090", "rtx5090", "b200")
  gpus = (h100, h200, *map(load_gpu, others))
  return [r for gpu in gpus for r in against_dense("devices", gpu)]


def default_rows() -> list[dict]:
  """Returns what every method's defaults cost on published video grids; counts, no timing.

  One layer of 24 heads of 128 channels, forward, one sample, a usual step. Tiles have at most 128
  rows except where the paper has its own. Routed methods are at their prior.
  """
  heads = 24
  found = []
  cases = [(name, name, OWN_TILES.get(name)) for name in METHODS]
  cases.append(("radial, layout's tiles", "radial", None))
  for label, name, tile in cases:
    for grid in VIDEO_GRIDS:
      layout = TileLayout.fit(grid, math.prod(tile) if tile else 128, tile)
      pairs = make_method(name).pairs(layout, heads).pairs
      facts = {"set": "defaults", "method": label, "grid": list(grid), "tile": list(layout.tile)}
      counts = {"density": pairs / (heads * layout.n**2), "attention_flops": 4 * 128 * pairs}
      found.append(facts | counts | {"measured": False})
  return found


# ---- rows: approximation -------------------------------------------------------------------------


def approximation_rows(workdir: str) -> list[dict]:
  """Returns errors of every operator beside their bounds: of random tensors and a trained model."""
  method = make_method("freqformer(mid_tiles=3, window=(1, 2, 2), deal=as_is)")
  arrays = TileLayout.fit((8, 12, 12), 64, (4, 4, 4)).arrays()
  found = []
  for smooth in (0.0, 0.9):
    tensors = probe.random_tensors(arrays, method, 6, 16, 0, smooth)
    found += approximation.measure(tensors, arrays.layout, method, f"random, {smooth:g} shared")
  found += approximation.main([f"--workdir={workdir}"])
  return [r | {"set": "approximation", "measured": True} for r in found]


# ---- tables --------------------------------------------------------------------------------------

# Links under the tables, by how the source of a published row begins.
LINKS = {
  "FlashAttention-3": "[FlashAttention-3](https://arxiv.org/abs/2407.08608)",
  "PyTorch benchmark": "[TritonBench](https://github.com/pytorch/benchmark/pull/2391)",
  "Sliding tile attention": "[STA](https://arxiv.org/abs/2502.04507)",
  "JAX's Mosaic GPU": "JAX's Mosaic GPU attention example (cuDNN; heads not stated, 16 taken)",
}
SWEEP_TOKENS = (65_536, 262_144, 1_048_576)  # columns of the sweep's tables; its figure has all
FORWARDS = ("dense, unpadded", "dense", "freqformer")


def of_set(rows: list[dict], name: str) -> list[dict]:
  return [r for r in rows if r["set"] == name]


def markdown(head: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
  """Returns a table."""
  first, *body = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
  return "\n".join([first, "|" + "---|" * len(head), *body])


def pivot(found: list[dict], title: str, line: Cell, column: Cell, cell: Cell) -> str:
  """Returns a table with a row of `found` in each cell, "-" where there is none.

  Raises:
    ValueError: where two rows meet.
  """
  cells = {}
  for r in found:
    at = line(r), column(r)
    if at in cells:
      raise ValueError(f"two rows for line {at[0]!r} and column {at[1]!r}.")
    cells[at] = cell(r)
  columns = list(dict.fromkeys(name for _, name in cells))
  lines = dict.fromkeys(name for name, _ in cells)
  body = [[name, *(cells.get((name, other), "-") for other in columns)] for name in lines]
  return markdown([title, *columns], body)


def by_method(found: list[dict], line: Cell) -> dict[str, dict[str, dict]]:
  """Returns the rows by line and method."""
  groups = {}
  for r in found:
    groups.setdefault(line(r), {})[r["method"]] = r
  return groups


def comparison(found: list[dict]) -> str:
  """Returns simulated beside measured seconds."""

  def shown(seconds):
    return f"{seconds:.4g} s" if seconds > 10 else f"{1e3 * seconds:.4g} ms"

  lines = [
    (
      r["name"],
      shown(r["measured_seconds"]) + (" (derived)" if r["derived"] else ""),
      shown(r["seconds"]),
      error_text(r),
    )
    for r in found
  ]
  return markdown(("call", "measured", "simulated", "error"), lines)


def error_text(r: dict) -> str:
  return f"{r['error']:+.1%}" + (" (fitted)" if r["fitted"] else "")


def notes(found: list[dict]) -> str:
  """Returns sources, derived figures, fitted rates and the error of what is not fitted."""
  sources = dict.fromkeys(r["source"] for r in found)
  links = [
    next((link for start, link in LINKS.items() if source.startswith(start)), source)
    for source in sources
  ]
  errors = [abs(r["error"]) for r in found if not r["fitted"]]
  lines = [f"Measured by: {'; '.join(dict.fromkeys(links))}."]
  lines += [f"Derived, not measured: {r['name']}, {r['derived']}." for r in found if r["derived"]]
  lines.append(f"Fitted rates: {', '.join(found[0]['rates_fitted'])}; the others are assumed.")
  lines.append(
    f"Rows that are not fitted: {len(errors)}, mean error {sum(errors) / len(errors):.1%}, "
    f"worst {max(errors):.1%}."
  )
  lines += [f"WARNING: {warning}." for warning in found[0].get("rates_warnings", ())]
  return "\n".join(f"* {line}" for line in lines)


def published_tables(calls: list[dict], run: list[dict]) -> str:
  """Returns a line for each kernel that was timed at several lengths, and a table of the rest."""
  lengths = [r for r in calls if " n=" in r["name"]]
  others = [r for r in calls if " n=" not in r["name"]] + run
  table = pivot(
    lengths,
    "measured ms, error",
    line=lambda r: r["name"].split(" n=")[0],
    column=lambda r: r["name"].split()[-1],
    cell=lambda r: f"{1e3 * r['measured_seconds']:.4g}, {error_text(r)}",
  )
  return f"{table}\n\n{comparison(others)}\n\n{notes(calls)}"


def defaults_table(found: list[dict]) -> str:
  """Returns densities; of dense attention, whose density is 1, the TFLOP."""

  def label(r):
    return "dense, TFLOP" if r["method"] == "dense" else r["method"]

  def cell(r):
    if r["method"] == "dense":
      return f"{r['attention_flops'] / 1e12:.1f}"
    return f"{r['density']:.4f}"

  return pivot(found, "density", label, grid_text, cell)


def sweep_tables(found: list[dict]) -> str:
  """Returns two tables over tokens, whole forwards and attention alone, and their intensity."""

  def tokens(r):
    return f"{r['tokens']:,}"

  def whole(r):
    return f"{r['seconds']:.3g} ({r['speedup_over_dense']:.1f})"

  def attention(r):
    return f"{r['density']:.4f} ({r['attention_speedup']:.1f})"

  shown = [r for r in found if r["tokens"] in SWEEP_TOKENS]
  sparse = [r for r in shown if r["method"] != "dense"]
  wholes = pivot(shown, "seconds (dense / this)", itemgetter("method"), tokens, whole)
  alone = pivot(sparse, "density (dense / this)", itemgetter("method"), tokens, attention)
  return f"{wholes}\n\n{alone}\n\n{intensity(shown)}"


def intensity(found: list[dict]) -> str:
  """Returns a sentence on FLOPs per byte of device memory, at the smallest and largest size."""
  sizes = by_method(found, itemgetter("tokens"))
  shown = [
    f"{sizes[tokens]['dense']['flops_per_byte']:,.0f} and "
    f"{sizes[tokens]['freqformer']['flops_per_byte']:,.0f} at {tokens:,} tokens"
    for tokens in (min(sizes), max(sizes))
  ]
  return (
    "Arithmetic intensity falls with sparsity: FLOPs per byte of device memory of a dense and of\n"
    f"FreqFormer's forward are {', '.join(shown)}."
  )


def duration_table(found: list[dict], largest: list[dict]) -> str:
  """Returns a line per video, and a sentence on the longest that fits."""
  methods = (*FORWARDS, "sliding_tile")
  lines = [
    (
      f"{group['dense']['video_seconds']:.1f}",
      grid,
      *(
        f"{r['run_seconds']:,.0f} ({r['gpu_s_per_video_s']:,.0f})" for r in map(group.get, methods)
      ),
      resident_text(group),
    )
    for grid, group in by_method(found, grid_text).items()
  ]
  longest = ", ".join(
    f"{r['video_seconds']:.0f} s ({grid_text(r)}) with {r['method']}" for r in largest
  )
  table = markdown(("video, s", "grid", *methods, "resident, GB"), lines)
  return f"{table}\n\nThe longest 720p video that fits: {longest}."


def resident_text(group: dict[str, dict]) -> str:
  most = max(group.values(), key=itemgetter("memory_bytes"))
  return f"{most['memory_bytes'] / 1e9:.0f}" + ("" if most["fits"] else " (does not fit)")


def forwards_table(found: list[dict], title: str, field: str, more: dict[str, Cell]) -> str:
  """Returns seconds by the value of a field; `more`: further columns, of FreqFormer's rows."""
  lines = []
  for value, group in by_method(found, itemgetter(field)).items():
    own = group["freqformer"]
    seconds = [f"{group[method]['seconds']:.3f}" for method in FORWARDS]
    speedup = f"{own['speedup_over_dense']:.2f}"
    lines.append((str(value), *seconds, speedup, *(cell(own) for cell in more.values())))
  return markdown((title, *FORWARDS, "unpadded dense / freqformer", *more), lines)


def approximation_tables(found: list[dict]) -> str:
  """Returns errors and bounds, shares of the bands, and the count of the bounds that hold."""

  def bound(r):
    """The largest error of any row, and the largest error / bound of any row."""
    return f"{r['error']:.3g} ({ratio_text(r)})"

  def shares(r):
    return "/".join(f"{100 * s:.0f}" for s in r["band_shares"])

  heads = summary(found)
  inexact = [r for r in heads if not r["exact"]]
  bounded = [r for r in inexact if r["kept"] is not None]
  filters = [r for r in heads if r["exact"]]
  farthest = max((abs(r["closest"]["ratio"] - 1) for r in filters), default=0)
  case = itemgetter("case")
  kind = itemgetter("kind")
  return "\n\n".join(
    (
      pivot(inexact, "error (of its bound)", case, kind, bound),
      pivot(inexact, "squared error, %", case, kind, shares),
      f"{sum(r['kept'] for r in bounded)} of {sum(r['heads'] for r in bounded)} pairs of head and "
      f"operator keep their bound in every row; {sum(r['kept'] for r in filters)} of "
      f"{sum(r['heads'] for r in filters)} filters\ndiscard exactly what they must "
      f"(the ratio is at most {farthest:.0e} away from 1).",
    )
  )


def tables(rows: list[dict]) -> dict[str, str]:
  """Returns every table of the page by its marker."""
  sets = collections.defaultdict(list)  # a set without rows, as --keep_approximation may leave one
  for found in rows:
    sets[found["set"]].append(found)
  several = {
    "communication": number("communication_seconds", ".3f"),
    "busiest / mean GPU": number("imbalance", ".2f"),
  }
  rates = {"rates": lambda r: r["rates"].split(";")[0]}
  return {
    "defaults": defaults_table(sets["defaults"]),
    "dense-rate": comparison(sets["dense rate alone fitted"]),
    "published": published_tables(sets["three published rows fitted"], sets["published run"]),
    "cpu": f"{comparison(sets['cpu'])}\n\n{notes(sets['cpu'])}",
    "sweep": sweep_tables(sets["sweep"]),
    "duration": duration_table(sets["duration"], sets["largest"]),
    "gpus": forwards_table(sets["gpus"], "GPUs", "gpus", several),
    "devices": forwards_table(sets["devices"], "GPU", "gpu", rates),
    "approximation": approximation_tables(sets["approximation"]),
  }


def fill(page: str, found: dict[str, str]) -> str:
  """Replaces what stands between a page's markers; raises ValueError for a page without them."""
  for name, body in found.items():
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    page, count = re.subn(pattern, lambda m, b=body: f"{m[1]}{b}\n{m[2]}", page, flags=re.S)
    if count != 1:
      raise ValueError(
        f"The page must have the markers <!-- {name} --> and <!-- end {name} --> once, "
        f"found {count} pairs."
      )
  return page


# ---- figures and the run -------------------------------------------------------------------------


def draw(rows: list[dict]) -> None:
  """Writes the page's figures."""
  found = of_set(rows, "sweep")
  most = max(r["tokens"] for r in found)
  last = [r for r in found if r["tokens"] == most and r["method"] != "dense"]
  bounded = [r for r in of_set(rows, "approximation") if r["bound"] is not None and not r["exact"]]
  figures = {
    "scaling": plots.scaling_figure(found),
    "parts": plots.bars(last, f"One forward at {most:,} tokens, without dense: simulated"),
    "validation": plots.validation_figure(of_set(rows, "three published rows fitted")),
    "errors": plots.errors_figure(bounded),
  }
  for name, figure in figures.items():
    plots.save(figure, FIGURES / f"{name}.png")


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  gpu, rows = validation()
  rows += cpu_rows() + published_run(gpu) + default_rows()
  rows += sweep(gpu) + durations(gpu) + several_gpus(gpu) + devices(gpu)
  rows = [r | {"command": COMMAND} for r in rows]
  if _KEEP.value:
    rows += of_set(json.loads(ROWS.read_text()), "approximation")
  else:
    command = f"{COMMAND} --workdir={_WORKDIR.value}"
    rows += [r | {"command": command} for r in approximation_rows(_WORKDIR.value)]
  ROWS.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
  draw(rows)
  shown = tables(rows)
  DOC.write_text(fill(DOC.read_text(), shown))
  print(shown["sweep"])
  logging.info("wrote %s, %s and %s", ROWS, DOC, FIGURES)


if __name__ == "__main__":
  app.run(main)
