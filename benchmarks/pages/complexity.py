"""Every figure and table of docs/complexity.md, by one command.

  make simulate
  python -m benchmarks.pages.complexity [--workdir=runs/complexity]    # the workdir of a run trained with FreqFormer

Rows go to results/simulation.json, plots to docs/figures/, tables into docs/complexity.md between their markers. A row says
with `measured` what its figures are: true for the approximation errors, false for the simulator's seconds; where such a row has
a measurement beside it, published or our own, that is its `measured_seconds`. The command that made a row stands in it.
"""

import dataclasses
import json
import pathlib

from absl import app, flags, logging

from benchmarks import rows as row_files
from benchmarks.pages.complexity_page import DOC, fill, of_set, tables
from freqformer.analysis import bounds as approximation
from freqformer.analysis import probe as approximation_probe
from freqformer.simulation import calibrate, plots
from freqformer.simulation import command as simulate
from freqformer.simulation.descriptions import Gpu, load_gpu, load_model
from freqformer.simulation.forward import Plan, dense_baseline, make_method, row, run_seconds
from freqformer.simulation.scaling import largest_video, memory_bytes, parallel

_WORKDIR = flags.DEFINE_string(
  "workdir",
  "runs/complexity",
  "A run trained with FreqFormer, for the approximation errors.",
  allow_override=True,
)

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
PUBLISHED = ROOT / "freqformer" / "simulation" / "published" / "h100.json"
COMMAND = "python -m benchmarks.pages.complexity"

# The papers' range, at shape A's grids; the model with 12 heads of 128.
GRIDS = ((16, 64, 64), (32, 64, 64), (64, 64, 64), (64, 64, 128), (64, 128, 128))
METHODS = (
  "dense",
  "freqformer",
  "sparseflow",
  "adaspa",
  "sliding_tile",
  "radial",
  "block_topk",
  "sparse_linear",
  "spatial_temporal",
)


# ---- validation ----------------------------------------------------------------------------------------------------------


def validation() -> tuple[Gpu, list[dict]]:
  """The H100 fitted to three published rows and the errors of all; and STA's row after fitting the dense rate alone."""
  start, (measured, _) = load_gpu("h100"), calibrate.load_rows(PUBLISHED, "h100")
  fit = calibrate.calibrate(start, measured)
  found = [r | {"set": "three published rows fitted"} for r in fit.rows]
  chosen = "FA3 dense on 30x48x80"
  alone = [dataclasses.replace(m, fit=m.name == chosen) for m in measured if "30x48x80" in m.name]
  one = calibrate.calibrate(start, alone, free=("attention_flops",))
  return fit.gpu, found + [r | {"set": "dense rate alone fitted"} for r in one.rows]


def cpu_rows() -> list[dict]:
  """Our own CPU rows: two rates fitted to the dense and one sparse call, the others predicted."""
  path, fitted = row_files.RESULTS / "attention_cpu.json", (": dense_mode", ": sparse")
  measured = [
    dataclasses.replace(m, fit=m.name.endswith(fitted)) for m in calibrate.load_rows(path, "cpu")[0]
  ]
  fit = calibrate.calibrate(load_gpu("cpu"), measured, free=("softmax_exposed", "item_s"))
  ours = {r["name"]: r for r in row_files.read_rows(path)}

  def spread(name):
    of, part = name.split(": ")
    return [ours[of][part][k] for k in ("p10_s", "p90_s")]

  return [r | {"set": "cpu", "measured_p10_p90_s": spread(r["name"])} for r in fit.rows]


def published_run(gpu: Gpu) -> list[dict]:
  """HunyuanVideo end to end on an H100, published, beside our run of the same shape."""
  plan = dense_baseline(
    Plan(load_model("hunyuanvideo"), "dense", make_method("dense"), (30, 48, 80))
  )  # what they ran
  one, source = (
    row(plan, gpu),
    "arXiv 2502.04507: 945 s on one H100 with FlashAttention-3, 800 s of it attention; 50 steps",
  )
  parts = {"all": (one["seconds"], 945.0), "attention": (one["attention_seconds"], 800.0)}
  return [
    {
      "name": f"HunyuanVideo, 115,200 tokens, 50 steps: {part}",
      "set": "published run",
      "gpu": gpu.name,
      "seconds": 50 * seconds,
      "measured_seconds": published,
      "measured": False,
      "error": 50 * seconds / published - 1,
      "fitted": False,
      "source": source,
      "derived": "",
      **{k: one[k] for k in ("rates_fitted", "rates_assumed")},
    }
    for part, (seconds, published) in parts.items()
  ]


def baseline_and(names, card: str, grid) -> list[Plan]:
  """The unpadded dense baseline, then methods with their defaults: plans of one model on one grid."""
  plans = [Plan(load_model(card), name, make_method(name), grid) for name in names]
  return [dense_baseline(plans[0]), *plans]


# ---- simulation ----------------------------------------------------------------------------------------------------------


def sweep(gpu: Gpu) -> list[dict]:
  """64K to 1M tokens, every method with its defaults, and FreqFormer at a fixed density of its mid band.

  These grids fill their tiles: `dense` is its own unpadded baseline.
  """
  card, found = load_model("wan2.1-1.3b"), []
  for grid in GRIDS:
    tiles = Plan(card, "dense", make_method("dense"), grid).layout.tiles
    names = [*METHODS, f"freqformer(mid_tiles={round(0.05 * tiles)})"]
    at = [row(Plan(card, name, make_method(name), grid), gpu) for name in names]
    at[-1]["method"] = "freqformer (mid band at 5 %)"
    dense = row(dense_baseline(Plan(card, "dense", make_method("dense"), grid)), gpu)
    found += [
      r
      | {
        "set": "sweep",
        "speedup_over_dense": dense["seconds"] / r["seconds"],
        "attention_speedup": dense["attention_seconds"]
        / (r["attention_seconds"] + r["around_seconds"]),
      }
      for r in at
    ]
  return found


def durations(gpu: Gpu) -> list[dict]:
  """Seconds of 720p video to seconds of GPU for a whole run, and the longest video that fits."""
  card, found = load_model("hunyuanvideo"), []
  for t in (33, 66, 128, 256):
    for plan in baseline_and(("dense", "freqformer", "sliding_tile"), "hunyuanvideo", (t, 45, 80)):
      fits = memory_bytes(plan) <= gpu.memory_bytes
      run, _ = run_seconds(plan, gpu)
      extra = {
        "set": "duration",
        "run_seconds": run,
        "memory_bytes": memory_bytes(plan),
        "fits": fits,
      }
      found.append(
        row(plan, gpu) | extra | {"gpu_s_per_video_s": run / card.video_seconds(plan.grid)}
      )
  for name in ("dense", "freqformer"):
    grid = largest_video(Plan(card, name, make_method(name), (1, 45, 80)), gpu)
    facts = {
      "model": card.name,
      "method": name,
      "gpu": gpu.name,
      "grid": list(grid),
      "measured": False,
    }
    found.append({"set": "largest"} | facts | {"video_seconds": card.video_seconds(grid)})
  return found


def several_gpus(gpu: Gpu) -> list[dict]:
  """Wan2.1-14B at 720p on 1 to 8 GPUs, heads dealt greedily."""
  found = []
  plans = baseline_and(("dense", "freqformer"), "wan2.1-14b", (21, 45, 80))
  for plan in plans:
    for gpus in (1, 2, 4, 8):
      facts = {
        "set": "gpus",
        "model": plan.card.name,
        "method": plan.name,
        "gpu": gpu.name,
        "measured": False,
      }
      one, base = parallel(plan, gpu, gpus), parallel(plans[0], gpu, gpus)
      found.append(
        facts | dataclasses.asdict(one) | {"speedup_over_dense": base.seconds / one.seconds}
      )
  return found


def devices(h100: Gpu) -> list[dict]:
  """One forward of Wan2.1-14B at 720p on each GPU. The H200 has the H100's SMs and gets the rates that were fitted there."""
  found = []
  for gpu in (
    h100,
    calibrate.carry_over(h100, load_gpu("h200")),
    load_gpu("a100"),
    load_gpu("b200"),
  ):
    rows = [
      row(plan, gpu) for plan in baseline_and(("dense", "freqformer"), "wan2.1-14b", (21, 45, 80))
    ]
    found += [
      {"set": "devices"} | r | {"speedup_over_dense": rows[0]["seconds"] / r["seconds"]}
      for r in rows
    ]
  return found


# ---- approximation -------------------------------------------------------------------------------------------------------


def approximation_rows(workdir) -> list[dict]:
  """Errors of every operator beside their bounds: random tensors, then every layer and head of a trained model."""
  method = make_method("freqformer(mid_tiles=3, window=(1, 2, 2))")
  arrays = approximation.TileLayout.fit((8, 12, 12), 64, (4, 4, 4)).arrays()
  found = []
  for smooth in (0.0, 0.9):
    tensors = approximation_probe.random_tensors(arrays, method, 6, 16, 0, smooth)
    found += approximation.measure(tensors, arrays.layout, method, f"random, {smooth:g} shared")
  found += approximation.main([f"--workdir={workdir}"])
  return [r | {"set": "approximation", "measured": True} for r in found]


# ---- the run -------------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
  """The page's figures."""
  found = of_set(rows, "sweep")
  plots.scaling_plot(
    found,
    FIGURES / "scaling.svg",
    f"{found[0]['model']} on {found[0]['gpu']}, one forward: simulated",
  )
  last = [
    r for r in found if r["tokens"] == max(x["tokens"] for x in found) and r["method"] != "dense"
  ]
  plots.bars(
    last,
    FIGURES / "parts.svg",
    f"One forward at {last[0]['tokens']:,} tokens, without dense: simulated",
  )
  plots.validation_plot(of_set(rows, "three published rows fitted"), FIGURES / "validation.svg")
  bounded = [r for r in of_set(rows, "approximation") if r["bound"] is not None and not r["exact"]]
  plots.errors_plot(bounded, FIGURES / "errors.svg")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  gpu, rows = validation()
  rows += (
    cpu_rows() + published_run(gpu) + sweep(gpu) + durations(gpu) + several_gpus(gpu) + devices(gpu)
  )
  rows += approximation_rows(_WORKDIR.value)
  for r in rows:
    r["command"] = COMMAND + (f" --workdir={_WORKDIR.value}" if r["set"] == "approximation" else "")
  path = row_files.RESULTS / "simulation.json"
  path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
  draw(rows)
  DOC.write_text(fill(DOC.read_text(), tables(rows)))
  print(simulate.table([r | {"memory_bytes": 0.0} for r in of_set(rows, "sweep")]))
  logging.info("wrote %s, %s and %s", path, DOC, FIGURES)


if __name__ == "__main__":
  app.run(main)
