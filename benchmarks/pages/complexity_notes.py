"""Sentences of docs/complexity.md that hold figures: made from the rows, so that they move with the tables."""

import textwrap

WIDTH = 128


def paragraph(*parts: str) -> str:
  """One paragraph of the page, wrapped."""
  return textwrap.fill(" ".join(parts), WIDTH)


def bounds(found: list[dict]) -> str:
  """What the approximation rows say about the bounds."""
  filters = [r for r in found if r["exact"]]
  claimed = [r for r in found if r["bound"] is not None and not r["exact"]]
  trained = [r for r in claimed if "steps" in r]
  cells = [r for r in trained if "trivial" in r]
  ratios = [r["closest"]["ratio"] for r in trained if "trivial" not in r]

  def kept(own):
    return f"{sum(r['holds'] for r in own)} of {len(own)}"

  share = sum(r["trivial"] for r in cells) / len(cells)
  parts = [
    f"Measured: {kept(claimed)} pairs of head and operator keep their bound in every row, {kept(filters)} filters discard",
    "what they must. On the trained model the row that comes closest to the bound by dropped mass reaches between",
    f"{min(ratios):.2f} and {max(ratios):.2f} of it, head by head. The bound of cell means is only the trivial one in",
    f"{share:.0%} of the rows (delta reaches {min(r['delta'] for r in cells):.1f} and more in some row of every head), and an",
    f"error comes to {max(r['closest']['ratio'] for r in cells):.2f} of it.",
  ]
  if share > 0.99:
    parts.append(
      "It certifies nothing about compressing q, k, v of a real model; what does is the measured error."
    )
  return paragraph(*parts)


def trained_model(found: list[dict]) -> str:
  """Which model the rows with a t are of."""
  trained = [r for r in found if "steps" in r]
  layers, heads = (1 + max(r[name] for r in trained) for name in ("layer", "head"))
  steps = "/".join(str(n) for n in sorted({r["steps"] for r in trained}))
  return f"All rows are measured; those with a t on a model of {layers} layers and {heads} heads after {steps} training steps."


def spread(found: list[dict], other: str = "TritonBench ") -> str:
  """How far two laboratories are apart that measured the same kernel: rows of the same name after `other`."""
  measured = {r["name"]: r["measured_seconds"] for r in found}
  longer = [
    measured[other + name] / seconds - 1
    for name, seconds in measured.items()
    if other + name in measured
  ]
  return paragraph(
    f"{len(longer)} calls were measured twice: {other.strip()}'s times, of another laboratory's H100 with the same kernel,",
    f"differ from the paper's by {min(longer):+.0%} to {max(longer):+.0%}; that spread is not the simulator's to explain.",
  )


def fit(found: list[dict]) -> str:
  """Rows fitted and the errors of the others."""
  others = [abs(r["error"]) for r in found if not r["fitted"]]
  return (
    f"{len(found) - len(others)} rows fitted, {len(others)} not: mean error of these {sum(others) / len(others):.1%}, "
    f"worst {max(others):.1%}."
  )


def shares(found: list[dict], method: str = "freqformer") -> str:
  """What dense attention takes of a forward and what is left of its gain, at the fewest and the most tokens of the sweep."""
  few, many = (f(r["tokens"] for r in found) for f in (min, max))
  at = {(r["tokens"], r["method"]): r for r in found}
  share = {n: at[n, "dense"]["attention_seconds"] / at[n, "dense"]["seconds"] for n in (few, many)}
  parts = [
    f"* Simulated: attention is {share[few]:.0%} of a dense forward at {few:,} tokens and {share[many]:.0%} at {many:,}."
  ]
  for n in (few, many):
    r = at[n, method]
    parts.append(
      f"At {n:,} tokens {method}'s attention is {r['attention_speedup']:.1f} times as fast as dense, the forward"
      f" {r['speedup_over_dense']:.1f} times."
    )
  parts.append(
    "The difference is matrix products and elementwise passes, which remain (figure below)."
  )
  return textwrap.fill(" ".join(parts), WIDTH, subsequent_indent="  ")
