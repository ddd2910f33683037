"""Pieces of a report page: tables, figures as inline images, the style sheet."""

import base64
import html
import io

from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 1000px; margin: 2em auto }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #e5e7eb }
table { border-collapse: collapse; margin: 0.8em 0 } td, th { padding: 0.2em 1.2em 0.2em 0; text-align: left }
.facts td:first-child { white-space: nowrap }
tr + tr td { border-top: 1px solid #f0f0f0 } .n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block } video { width: 192px; border-radius: 4px; display: block }
.file, figcaption { color: #6b7280; font-size: 0.85em } .absent { color: #6b7280; font-style: italic }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1em }
.pair { display: flex; gap: 6px } figure { margin: 0 } pre { background: #f9fafb; padding: 1em; overflow: auto }
"""


def facts(rows) -> str:
  """A table of names and values, left-aligned: the values have no common unit to line up."""
  return table([], [(name, text(value)) for name, value in rows]).replace(
    "<table>", "<table class=facts>", 1
  )


def text(value) -> str:
  if value is None:
    return "–"
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1e4 and value < 1e9 else f"{value:.4g}"
  return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(head, rows) -> str:
  """An HTML table; numbers are right-aligned, None is a dash, a column with nothing else under its head is left out."""
  shown = [i for i in range(len(head)) if any(r[i] is not None for r in rows)]
  if head:
    head, rows = [head[i] for i in shown], [[r[i] for i in shown] for r in rows]

  def cell(value, tag="td", number=False):
    number = number or isinstance(value, int | float)
    return f"<{tag}{' class=n' if number else ''}>{html.escape(text(value))}</{tag}>"

  numeric = [any(isinstance(r[i], int | float) for r in rows) for i in range(len(head))]
  top = "".join(cell(h, "th", n) for h, n in zip(head, numeric, strict=True))
  return (
    "<table>"
    + (f"<tr>{top}</tr>" if head else "")
    + "".join(f"<tr>{''.join(map(cell, r))}</tr>" for r in rows)
    + "</table>"
  )


def image(figure: Figure, alt: str) -> str:
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=160, bbox_inches="tight")
  width = round(100 * figure.get_figwidth())
  return f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def panels(count: int, width: float = 9.5, height: float = 3.0):
  """A figure with panels side by side, without the frame's right and upper line."""
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(1, count, squeeze=False)[0]
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes
