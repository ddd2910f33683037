"""Tables and figures of docs/complexity.md, by one command; its prose is written by hand.

  make simulate
  python -m benchmarks.pages.complexity [--workdir=runs/complexity]   # of a run with FreqFormer
  python -m benchmarks.pages.complexity --keep_approximation          # without a trained run

Rows go to results/simulation.json, plots to docs/figures/, tables into docs/complexity.md between
their markers. `measured` of a row is true for approximation errors, false for the simulator's
seconds; a measurement beside such a row, published or our own, is its `measured_seconds`.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable

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
from freqformer.simulation.scaling import largest_video, row, run_seconds

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

# The papers' range, at shape A's grids; the model with 12 heads of 128.
GRIDS = ((16, 64, 64), (32, 64, 64), (64, 64, 64), (64, 64, 128), (64, 128, 128))
MID_DENSITY = 0.05  # of FreqFormer's mid band in the sweep's last line
SPARSER = "freqformer (mid band at 5 %)"
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
  one = row(plans(("dense",), "hunyuanvideo", (30, 48, 80))[0], gpu)  # what they ran
  facts = {k: one[k] for k in ("gpu", "measured", "rates_fitted", "rates_assumed")} | {
    "set": "published run",
    "fitted": False,
    "source": "arXiv 2502.04507: 945 s on one H100 with FlashAttention-3, 800 s of it attention; "
    "50 steps",
    "derived": "",
  }
  found = []
  for part, step, published in (
    ("all", one["seconds"], 945.0),
    ("attention", one["attention_seconds"], 800.0),
  ):
    seconds = 50 * step
    times = {"seconds": seconds, "measured_seconds": published, "error": seconds / published - 1}
    found.append({"name": f"HunyuanVideo, 115,200 tokens, 50 steps: {part}"} | facts | times)
  return found


# ---- rows: simulation ----------------------------------------------------------------------------


def plans(methods: tuple[str, ...], card: str, grid: tuple[int, int, int]) -> list[Plan]:
  """Returns the plan of the unpadded dense baseline, then those of the methods."""
  found = [Plan(load_model(card), name, make_method(name), grid) for name in methods]
  return [dense_baseline(found[0]), *found]


def sweep(gpu: Gpu) -> list[dict]:
  """Returns 64K to 1M tokens: every method's defaults, and FreqFormer at a fixed mid density.

  These grids fill their tiles: `dense` is its own unpadded baseline.
  """
  found = []
  for grid in GRIDS:
    baseline, *defaults = plans(tuple(METHODS), "wan2.1-1.3b", grid)
    tiles = round(MID_DENSITY * baseline.layout.tiles)
    sparser = make_method(f"freqformer(mid_tiles={tiles})")
    sparser = dataclasses.replace(defaults[0], name=SPARSER, method=sparser)
    base = row(baseline, gpu)
    for plan in (*defaults, sparser):
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
      run, _ = run_seconds(plan, gpu)
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
  gpus = (h100, h200, load_gpu("a100"), load_gpu("b200"))
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
  method = make_method("freqformer(mid_tiles=3, window=(1, 2, 2))")
  arrays = TileLayout.fit((8, 12, 12), 64, (4, 4, 4)).arrays()
  found = []
  for smooth in (0.0, 0.9):
    tensors = probe.random_tensors(arrays, method, 6, 16, 0, smooth)
    found += approximation.measure(tensors, arrays.layout, method, f"random, {smooth:g} shared")
  found += approximation.main([f"--workdir={workdir}"])
  return [r | {"set": "approximation", "measured": True} for r in found]


# ---- tables --------------------------------------------------------------------------------------

Cell = Callable[[dict], object]


def of_set(rows: list[dict], name: str) -> list[dict]:
  return [r for r in rows if r["set"] == name]


def markdown(found: list[dict], columns: dict[str, Cell]) -> str:
  """Returns a table with a line per row; `columns`: title -> what a row shows there."""
  lines = [list(columns), ["---"] * len(columns)]
  lines += [[cell(r) for cell in columns.values()] for r in found]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def text(field: str) -> Cell:
  return lambda r: r[field]


def yes(field: str) -> Cell:
  return lambda r: "yes" if r[field] else "no"


MEASURED = {"measured": yes("measured")}


def comparison(found: list[dict]) -> str:
  """Returns simulated beside measured seconds, with sources, derived figures and fitted rates."""
  unit, name = (1, "s") if max(r["seconds"] for r in found) > 10 else (1e-3, "ms")
  sources = list(dict.fromkeys(r["source"] for r in found))

  def measured(r):
    return f"{r['measured_seconds'] / unit:.4g}{' (derived)' if r['derived'] else ''}"

  columns = {
    "call": text("name"),
    f"measured, {name}": measured,
    f"simulated, {name}": number("seconds", ".4g", unit),
    "error": number("error", "+.1%"),
    "fitted to": yes("fitted"),
    "source": lambda r: sources.index(r["source"]) + 1,
  }
  notes = [f"* Source {i}: {source}." for i, source in enumerate(sources, 1)]
  notes += [f"* Derived, not measured: {r['name']}, {r['derived']}." for r in found if r["derived"]]
  fitted = ", ".join(found[0]["rates_fitted"])
  assumed = ", ".join(found[0]["rates_assumed"])
  notes.append(f"* Fitted: {fitted}. Assumed: {assumed}.")
  notes += [f"* WARNING: {warning}." for warning in found[0].get("rates_warnings", ())]
  return f"{markdown(found, columns)}\n\n" + "\n".join(notes)


SWEEP = {
  "tokens": lambda r: f"{r['tokens']:,}",
  "method": text("method"),
  "density": number("density", ".4f"),
  "attention TFLOP": number("attention_flops", ",.1f", 1e12),
  "all TFLOP": number("total_flops", ",.1f", 1e12),
  "device memory, GB": number("hbm_bytes", ",.0f", 1e9),
  "KV through L2, GB": number("kv_bytes", ",.0f", 1e9),
  "FLOP/byte": number("flops_per_byte", ",.0f"),
  "seconds": number("seconds", ".3g"),
  "tokens/s": number("tokens_per_s", ",.0f"),
  "unpadded dense / this": number("speedup_over_dense", ".2f"),
  "attention: unpadded dense / this": number("attention_speedup", ".1f"),
}
DURATION = {
  "video, s": number("video_seconds", ".1f"),
  "grid": grid_text,
  "method": text("method"),
  "run of 50 steps, s": number("run_seconds", ",.0f"),
  "GPU s per video s": number("gpu_s_per_video_s", ",.0f"),
  "resident, GB": number("memory_bytes", ".0f", 1e9),
  "fits": yes("fits"),
}
LARGEST = {"method": text("method"), "grid": grid_text, "video, s": number("video_seconds", ".0f")}
GPUS = {
  "method": text("method"),
  "GPUs": text("gpus"),
  "seconds per forward": number("seconds", ".3f"),
  "of it communication": number("communication_seconds", ".3f"),
  "busiest / mean GPU": number("imbalance", ".2f"),
  "speed-up over one": number("speedup_over_one_gpu", ".2f"),
  "unpadded dense / this": number("speedup_over_dense", ".2f"),
}
DEVICES = {
  "GPU": text("gpu"),
  "method": text("method"),
  "seconds per forward": number("seconds", ".3f"),
  "TFLOP/s": number("tflops_per_s", ".0f"),
  "unpadded dense / this": number("speedup_over_dense", ".2f"),
  "rates": lambda r: (
    r["rates"].split(";")[0] + ("; the others assumed" if r["rates_fitted"] else "")
  ),
}


def closest_pair(r: dict) -> str:
  if r["closest"] is None:
    return "-"
  return f"{r['closest']['error']:.3g} of {r['closest']['bound']:.3g}"


APPROXIMATION = {
  "q, k, v": text("case"),
  "operator": text("kind"),
  "largest error": number("error", ".3g"),
  "bound of that row": lambda r: "none" if r["bound"] is None else f"{r['bound']:.3g}",
  "largest error / bound": ratio_text,
  "error and bound of that row": closest_pair,
  "heads within": lambda r: "-" if r["kept"] is None else f"{r['kept']} of {r['heads']}",
  "squared error low / mid / high": lambda r: " / ".join(f"{s:.0%}" for s in r["band_shares"]),
}


def defaults_table(found: list[dict]) -> str:
  """Returns densities and TFLOP of attention: a line per method, a column per grid."""
  lines = {}
  for r in found:
    line = lines.setdefault(r["method"], {"method": r["method"], "measured": False})
    line[grid_text(r)] = f"{r['density']:.4f}, {r['attention_flops'] / 1e12:.1f}"
  grids = dict.fromkeys(grid_text(r) for r in found)
  return markdown(
    list(lines.values()), {name: text(name) for name in ("method", *grids)} | MEASURED
  )


def tables(rows: list[dict]) -> dict[str, str]:
  """Returns every table of the page by its marker."""

  def plain(name, columns):
    return markdown(of_set(rows, name), columns | MEASURED)

  return {
    "dense-rate": comparison(of_set(rows, "dense rate alone fitted")),
    "published": comparison(of_set(rows, "three published rows fitted")),
    "cpu": comparison(of_set(rows, "cpu")),
    "run": comparison(of_set(rows, "published run")),
    "defaults": defaults_table(of_set(rows, "defaults")),
    "sweep": plain("sweep", SWEEP),
    "duration": plain("duration", DURATION),
    "largest": plain("largest", LARGEST),
    "gpus": plain("gpus", GPUS),
    "devices": plain("devices", DEVICES),
    "approximation": markdown(summary(of_set(rows, "approximation")), APPROXIMATION | MEASURED),
  }


def fill(page: str, found: dict[str, str]) -> str:
  """Replaces what stands between a page's markers; raises ValueError for a page without them."""
  for name, body in found.items():
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    page, count = re.subn(pattern, lambda m, b=body: f"{m[1]}{b}\n{m[2]}", page, flags=re.S)
    if count != 1:
      raise ValueError(
        f"{DOC.name} must have the markers <!-- {name} --> and <!-- end {name} --> once, "
        f"found {count} pairs."
      )
  return page


# ---- figures and the run -------------------------------------------------------------------------


def draw(rows: list[dict]) -> None:
  """Writes the page's figures."""
  found = of_set(rows, "sweep")
  most = max(r["tokens"] for r in found)
  last = [r for r in found if r["tokens"] == most and r["method"] != "dense"]
  published = of_set(rows, "three published rows fitted")
  bounded = [r for r in of_set(rows, "approximation") if r["bound"] is not None and not r["exact"]]
  figures = {
    "scaling": plots.scaling_figure(found),
    "parts": plots.bars(last, f"One forward at {most:,} tokens, without dense: simulated"),
    "validation": plots.validation_figure(published),
    "errors": plots.errors_figure(bounded),
  }
  for name, figure in figures.items():
    plots.save(figure, FIGURES / f"{name}.png")


def counted_rows() -> list[dict]:
  """Returns all rows but those of approximation errors, which need a trained run."""
  gpu, found = validation()
  found += cpu_rows() + published_run(gpu) + default_rows()
  found += sweep(gpu) + durations(gpu) + several_gpus(gpu) + devices(gpu)
  return [r | {"command": COMMAND} for r in found]


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  rows = counted_rows()
  if _KEEP.value:
    rows += of_set(json.loads(ROWS.read_text()), "approximation")
  else:
    command = f"{COMMAND} --workdir={_WORKDIR.value}"
    rows += [r | {"command": command} for r in approximation_rows(_WORKDIR.value)]
  ROWS.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
  draw(rows)
  DOC.write_text(fill(DOC.read_text(), tables(rows)))
  print(markdown(of_set(rows, "sweep"), SWEEP))
  logging.info("wrote %s, %s and %s", ROWS, DOC, FIGURES)


if __name__ == "__main__":
  app.run(main)
