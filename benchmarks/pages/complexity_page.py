"""docs/complexity.md: its tables from rows, put between the page's markers."""

import pathlib
import re

from benchmarks.pages import complexity_notes
from freqformer.analysis import summary as approximation_summary

DOC = pathlib.Path(__file__).parents[2] / "docs" / "complexity.md"


def markdown(head: list[str], lines: list[list]) -> str:
  return "\n".join(
    "| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines]
  )


def of_set(rows, name):
  return [r for r in rows if r["set"] == name]


def _table(found, columns: dict) -> str:
  """One line per row; columns: title -> `(field, format)`, `(field, format, unit)` or what a row shows there."""

  def cell(r, column):
    if callable(column):
      return column(r)
    field, form, *unit = column
    return f"{r[field] / unit[0] if unit else r[field]:{form}}"

  return markdown(list(columns), [[cell(r, column) for column in columns.values()] for r in found])


_SIMULATED = {"measured": lambda r: "no"}


def comparison(found) -> str:
  """Simulated beside measured; below, the sources, what was fitted, what was assumed, and what speaks against the fit."""
  unit, name = (1, "s") if max(r["seconds"] for r in found) > 10 else (1e-3, "ms")
  sources = list(dict.fromkeys(r["source"] for r in found))
  columns = {
    "call": ("name", ""),
    f"measured, {name}": lambda r: (
      f"{r['measured_seconds'] / unit:.4g}{' (derived)' * bool(r['derived'])}"
    ),
    f"simulated, {name}": ("seconds", ".4g", unit),
    "error": ("error", "+.1%"),
    "fitted to": lambda r: "yes" if r["fitted"] else "no",
    "source": lambda r: sources.index(r["source"]) + 1,
  }
  notes = [f"* Source {i}: {source}." for i, source in enumerate(sources, 1)]
  notes += [f"* Derived, not measured: {r['name']}, {r['derived']}." for r in found if r["derived"]]
  fitted, assumed = (", ".join(found[0][key]) for key in ("rates_fitted", "rates_assumed"))
  notes += [f"* Fitted: {fitted}. Assumed: {assumed}."]
  notes += [f"* WARNING: {warning}." for warning in found[0].get("rates_warnings", ())]
  return f"{_table(found, columns)}\n\n" + "\n".join(notes)


def _sweep_table(found) -> str:
  columns = {
    "tokens": ("tokens", ","),
    "method": ("method", ""),
    "density": ("density", ".4f"),
    "attention TFLOP": ("attention_flops", ",.1f", 1e12),
    "all TFLOP": ("total_flops", ",.1f", 1e12),
    "device memory, GB": ("hbm_bytes", ",.0f", 1e9),
    "KV through L2, GB": ("kv_bytes", ",.0f", 1e9),
    "FLOP/byte": ("flops_per_byte", ",.0f"),
    "seconds": ("seconds", ".3g"),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "unpadded dense / this": ("speedup_over_dense", ".2f"),
    "attention: unpadded dense / this": ("attention_speedup", ".1f"),
  }
  return _table(found, columns | _SIMULATED)


def _rates(found, method: str = "freqformer") -> str:
  """What stands behind the seconds of the sweep: which rates were fitted, and how much of a forward they explain."""
  few, many = (f(r["tokens"] for r in found) for f in (min, max))
  at = {(r["tokens"], r["method"]): r for r in found}

  def share(name):
    return " and ".join(
      f"{at[n, name]['attention_seconds'] / at[n, name]['seconds']:.0%}" for n in (few, many)
    )

  bound = [f"{r['method']} at {r['tokens']:,}" for r in found if r["attention_bound"] != "compute"]
  return complexity_notes.paragraph(
    f"Rates: {at[few, method]['rates']} (`freqformer/simulation/gpus/{found[0]['gpu']}.json` says from where).",
    f"The fitted rates are those of the attention call: {share('dense')} of a dense forward at {few:,} and {many:,} tokens,",
    f"but {share(method)} of {method}'s. All else rests on assumed rates, as does attention that L2 or device memory bounds:",
    f"{', '.join(bound) or 'none here'}.",
  )


def _duration_table(rows) -> str:
  columns = {
    "video, s": ("video_seconds", ".1f"),
    "grid": _grid,
    "method": ("method", ""),
    "run of 50 steps, s": ("run_seconds", ",.0f"),
    "GPU s per video s": ("gpu_s_per_video_s", ",.0f"),
    "resident, GB": ("memory_bytes", ".0f", 1e9),
    "fits": lambda r: "yes" if r["fits"] else "no",
  }
  largest = [
    f"{r['method']} {r['video_seconds']:.0f} s ({_grid(r)} tokens)" for r in of_set(rows, "largest")
  ]
  table = _table(of_set(rows, "duration"), columns | _SIMULATED)
  return f"{table}\n\nLongest 720p video that fits (simulated): {', '.join(largest)}."


def _grid(r) -> str:
  return "x".join(map(str, r["grid"]))


def _gpus_table(found) -> str:
  columns = {
    "method": ("method", ""),
    "GPUs": ("gpus", ""),
    "seconds per forward": ("seconds", ".3f"),
    "of it communication": ("communication_s", ".3f"),
    "busiest / mean GPU": ("imbalance", ".2f"),
    "speed-up over one": ("speedup", ".2f"),
    "unpadded dense / this": ("speedup_over_dense", ".2f"),
  }
  return _table(found, columns | _SIMULATED)


def devices_table(found) -> str:
  """One forward on each device, with what stands behind its rates."""
  columns = {
    "GPU": ("gpu", ""),
    "method": ("method", ""),
    "seconds per forward": ("seconds", ".3f"),
    "TFLOP/s": ("tflops_per_s", ".0f"),
    "unpadded dense / this": ("speedup_over_dense", ".2f"),
    "rates": lambda r: r["rates"].split(";")[0] + "; the others assumed" * bool(r["rates_fitted"]),
  }
  return _table(found, columns | _SIMULATED)


def approximation_table(found) -> str:
  """Every error beside the bound of the same row: where the error is largest, and where error / bound is."""

  def pair(r):
    return (
      "-" if r["closest"] is None else f"{r['closest']['error']:.3g} of {r['closest']['bound']:.3g}"
    )

  columns = {
    "q, k, v": ("case", ""),
    "operator": ("kind", ""),
    "largest error": ("error", ".3g"),
    "bound of that row": lambda r: "none" if r["bound"] is None else f"{r['bound']:.3g}",
    "largest error / bound": approximation_summary.ratio_text,
    "error and bound of that row": pair,
    "heads within": lambda r: "-" if r["kept"] is None else f"{r['kept']} of {r['heads']}",
    "squared error low / mid / high": lambda r: " / ".join(f"{s:.0%}" for s in r["band_shares"]),
    "measured": lambda r: "yes" if r["measured"] else "no",
  }
  return f"{complexity_notes.trained_model(found)}\n\n{_table(approximation_summary.summary(found), columns)}"


def tables(rows: list[dict]) -> dict[str, str]:
  """Every table of the page by its marker."""
  fitted = of_set(rows, "three published rows fitted")
  return {
    "dense-rate": comparison(of_set(rows, "dense rate alone fitted")),
    "published": f"{comparison(fitted)}\n\n{complexity_notes.fit(fitted)}\n\n{complexity_notes.spread(fitted)}",
    "cpu": comparison(of_set(rows, "cpu")),
    "run": comparison(of_set(rows, "published run")),
    "sweep": _sweep_table(of_set(rows, "sweep")),
    "rates": _rates(of_set(rows, "sweep")),
    "shares": complexity_notes.shares(of_set(rows, "sweep")),
    "duration": _duration_table(rows),
    "gpus": _gpus_table(of_set(rows, "gpus")),
    "devices": devices_table(of_set(rows, "devices")),
    "approximation": approximation_table(of_set(rows, "approximation")),
    "bounds": complexity_notes.bounds(of_set(rows, "approximation")),
  }


def fill(text: str, found: dict[str, str]) -> str:
  """The page with its tables: what stands between `<!-- name -->` and `<!-- end name -->` is replaced.

  Raises:
    ValueError: if the page lacks a marker.
  """
  for name, body in found.items():
    text, count = re.subn(
      rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)",
      lambda m, b=body: m[1] + b + "\n" + m[2],
      text,
      flags=re.S,
    )
    if count != 1:
      raise ValueError(
        f"{DOC.name} must have the markers <!-- {name} --> and <!-- end {name} --> once, found {count} pairs."
      )
  return text
