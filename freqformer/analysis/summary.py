"""Rows of `freqformer.analysis.bounds` summed up over heads, as data and as a printed table."""

import numpy as np


def summary(rows: list[dict]) -> list[dict]:
  """Sums up the heads of each case and operator.

  Returns:
    One row per case and kind:
    heads: their number.
    error, bound: the largest error of any head's rows, and that row's bound (None: not claimed).
    closest: the row with the largest error / bound; of filters, which must reach 1, the head
      farthest from it; None if no bound is claimed.
    kept: number of heads that keep their bound; None if none is claimed.
    band_shares: shares of the squared error in low, mid, high.
    exact: whether error and bound must be equal.
  """
  found = []
  for case, kind in dict.fromkeys((r["case"], r["kind"]) for r in rows):
    own = [r for r in rows if (r["case"], r["kind"]) == (case, kind)]
    worst = max(own, key=lambda r: r["error"])
    exact = worst["exact"]
    claimed = worst["bound"] is not None

    def distance(c, exact=exact):
      return abs(c["ratio"] - 1) if exact else c["ratio"]

    bands = np.sum([r["bands"] for r in own], 0)
    found.append(
      {
        "case": case,
        "kind": kind,
        "heads": len(own),
        "error": worst["error"],
        "bound": worst["bound"],
        "closest": max((r["closest"] for r in own), key=distance) if claimed else None,
        "kept": sum(r["holds"] for r in own) if claimed else None,
        "band_shares": (bands / max(bands.sum(), 1e-300)).tolist(),
        "exact": exact,
      }
    )
  return found


def ratio_text(r: dict) -> str:
  """Formats the largest error / bound of a row of `summary`: `0.289`, `1 - 2e-07` or `none`."""
  if r["closest"] is None:
    return "none"
  ratio = r["closest"]["ratio"]
  # 1 + x: how far the filter is from the energy that it must discard
  return f"1 {'-' if ratio < 1 else '+'} {abs(ratio - 1):.0e}" if r["exact"] else f"{ratio:.3f}"


def table(rows: list[dict]) -> str:
  """Formats `summary` as a text table."""
  lines = [
    f"{'measured':<18} {'operator':<16} {'error':>8} {'its bound':>9} {'error/bound':>11} "
    f"{'of that row':>15} {'heads':>7}  squared error low/mid/high"
  ]
  for r in summary(rows):
    bound = "none"
    pair = "-"
    kept = f"-/{r['heads']}"
    if r["bound"] is not None:
      bound = f"{r['bound']:.3g}"
      kept = f"{r['kept']}/{r['heads']}"
      pair = f"{r['closest']['error']:.3g}/{r['closest']['bound']:.3g}"
    shares = " / ".join(f"{s:.0%}" for s in r["band_shares"])
    lines.append(
      f"{r['case']:<18} {r['kind']:<16} {r['error']:>8.3g} {bound:>9} {ratio_text(r):>11} "
      f"{pair:>15} {kept:>7}  {shares}"
    )
  lines.append(
    "error: largest of any row; its bound: of the same row; error/bound: largest of any row; "
    "heads: that keep it"
  )
  return "\n".join(lines)
