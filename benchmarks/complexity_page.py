"""docs/complexity.md: its tables from rows, put between the page's markers."""

import pathlib
import re

from freqformer import approximation

DOC = pathlib.Path(__file__).parent.parent / "docs" / "complexity.md"


def markdown(head: list[str], lines: list[list]) -> str:
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def of_set(rows, name):
  return [r for r in rows if r["set"] == name]


def _comparison(found) -> str:
  scale, unit = (1, "s") if max(r["seconds"] for r in found) > 10 else (1e3, "ms")
  head = ["call", f"measured, {unit}", f"simulated, {unit}", "error", "fitted to"]
  show = lambda seconds: f"{scale * seconds:.4g}"
  lines = [
    [r["name"], show(r["measured_seconds"]), show(r["seconds"]), f"{r['error']:+.1%}", "yes" if r["fitted"] else "no"]
    for r in found
  ]
  return markdown(head, lines)


def _sweep_table(found) -> str:
  head = ["tokens", "method", "density", "attention TFLOP", "all TFLOP", "device memory, GB", "KV through L2, GB", "FLOP/byte"]
  head += ["seconds", "tokens/s", "dense / this", "attention: dense / this", "measured"]
  lines = [
    [
      f"{r['tokens']:,}",
      r["method"],
      f"{r['density']:.4f}",
      f"{r['attention_flops'] / 1e12:,.1f}",
      f"{r['total_flops'] / 1e12:,.1f}",
      f"{r['hbm_bytes'] / 1e9:,.0f}",
      f"{r['kv_bytes'] / 1e9:,.0f}",
      f"{r['flops_per_byte']:,.0f}",
      f"{r['seconds']:.3g}",
      f"{r['tokens_per_s']:,.0f}",
      f"{r['speedup_over_dense']:.2f}",
      f"{r['attention_speedup']:.1f}",
      "no",
    ]
    for r in found
  ]
  return markdown(head, lines)


def _duration_table(rows) -> str:
  head = ["video, s", "grid", "method", "run of 50 steps, s", "GPU s per video s", "resident, GB", "fits", "measured"]
  lines = [
    [
      f"{r['video_seconds']:.1f}",
      "x".join(map(str, r["grid"])),
      r["method"],
      f"{r['run_seconds']:,.0f}",
      f"{r['gpu_s_per_video_s']:,.0f}",
      f"{r['memory_bytes'] / 1e9:.0f}",
      "yes" if r["fits"] else "no",
      "no",
    ]
    for r in of_set(rows, "duration")
  ]
  largest = [
    f"{r['method']} {r['video_seconds']:.0f} s ({'x'.join(map(str, r['grid']))} tokens)" for r in of_set(rows, "largest")
  ]
  return markdown(head, lines) + f"\n\nLongest 720p video that fits (simulated): {', '.join(largest)}."


def _gpus_table(found) -> str:
  head = ["method", "GPUs", "seconds per forward", "of it communication", "busiest / mean GPU", "speed-up", "measured"]
  lines = [
    [
      r["method"],
      r["gpus"],
      f"{r['seconds']:.3f}",
      f"{r['communication_s']:.3f}",
      f"{r['imbalance']:.2f}",
      f"{r['speedup']:.2f}",
      "no",
    ]
    for r in found
  ]
  return markdown(head, lines)


def _devices_table(found) -> str:
  head = ["GPU", "method", "seconds per forward", "TFLOP/s", "rates", "measured"]
  rates = lambda r: "fitted" if r["rates_calibrated"] else "assumed"
  return markdown(
    head, [[r["gpu"], r["method"], f"{r['seconds']:.3f}", f"{r['tflops_per_s']:.0f}", rates(r), "no"] for r in found]
  )


def _approximation_table(found) -> str:
  head = [
    "q, k, v",
    "operator",
    "heads",
    "worst error",
    "its bound",
    "error / bound, closest",
    "heads within",
    "squared error low / mid / high",
  ]
  lines = []
  for r in approximation.summary(found):
    none = r["bound"] is None
    closest = "-" if none else "1 (exact)" if r["exact"] else f"{r['closest']:.3f}"
    within = "-" if r["kept"] is None and not r["exact"] else r["heads"] if r["exact"] else r["kept"]
    shares = " / ".join(f"{s:.0%}" for s in r["band_shares"])
    lines.append(
      [r["case"], r["kind"], r["heads"], f"{r['error']:.3g}", "none" if none else f"{r['bound']:.3g}", closest, within, shares]
    )
  return markdown(head, lines)


def tables(rows: list[dict]) -> dict[str, str]:
  """Every table of the page by its marker."""
  fitted = of_set(rows, "three published rows fitted")
  others = [abs(r["error"]) for r in fitted if not r["fitted"]]
  summary = f"{len(others)} rows not fitted: mean error {sum(others) / len(others):.1%}, worst {max(others):.1%}."
  return {
    "dense-rate": _comparison(of_set(rows, "dense rate alone fitted")),
    "published": _comparison(fitted) + "\n\n" + summary,
    "cpu": _comparison(of_set(rows, "cpu")),
    "run": _comparison(of_set(rows, "published run")),
    "sweep": _sweep_table(of_set(rows, "sweep")),
    "duration": _duration_table(rows),
    "gpus": _gpus_table(of_set(rows, "gpus")),
    "devices": _devices_table(of_set(rows, "devices")),
    "approximation": _approximation_table(of_set(rows, "approximation")),
  }


def fill(text: str, found: dict[str, str]) -> str:
  """The page with its tables: what stands between `<!-- name -->` and `<!-- end name -->` is replaced.

  Raises:
    ValueError: if the page lacks a marker.
  """
  for name, body in found.items():
    text, count = re.subn(
      rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", lambda m, b=body: m[1] + b + "\n" + m[2], text, flags=re.S
    )
    if count != 1:
      raise ValueError(f"{DOC.name} must have the markers <!-- {name} --> and <!-- end {name} --> once, found {count} pairs.")
  return text
