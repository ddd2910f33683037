"""Pieces of an HTML page that needs no network: tables, figures, pictures and videos inline."""

import base64
import html
import io
import pathlib
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1000px; margin: 2em auto }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #e5e7eb }
table { border-collapse: collapse; margin: 0.8em 0 }
td, th { padding: 0.2em 1.2em 0.2em 0; text-align: left }
tr + tr td { border-top: 1px solid #f0f0f0 }
.facts td:first-child { white-space: nowrap }
.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block } video { width: 192px; border-radius: 4px; display: block }
.file, figcaption { color: #6b7280; font-size: 0.85em }
.absent { color: #6b7280; font-style: italic }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1em }
.pair { display: flex; gap: 6px } figure { margin: 0 }
.row { display: flex; gap: 10px; overflow-x: auto; margin-bottom: 1em }
.row img { width: 192px; border-radius: 4px }
pre { background: #f9fafb; padding: 1em; overflow: auto }
"""
_FIGURE_DPI = 160
_FIGURE_WIDTH = 100  # pixels on the page per inch of a figure


def page(title: str, sections: Iterable[str]) -> str:
  """Returns a whole page; `title` is plain text, `sections` are HTML."""
  title = html.escape(title)
  body = "\n".join(sections)
  return (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    f"<style>{_STYLE}</style></head><body><h1>{title}</h1>\n{body}\n</body></html>\n"
  )


def section(title: str, intro: str, body: str, source: str = "") -> str:
  """Returns a heading, a sentence and the body; `source` names the files that it shows."""
  end = f'<p class="file">From {source}.</p>' if source else ""
  return f"<section><h2>{title}</h2><p>{intro}</p>{body}{end}</section>"


def absent(reason: str) -> str:
  """Returns a remark that something is not shown; `reason` is plain text."""
  return f'<p class="absent">{html.escape(reason)}</p>'


def text(value) -> str:
  """Returns a value as people read it; None is a dash."""
  if value is None:
    return "–"
  if isinstance(value, float):
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  if isinstance(value, list):
    return " × ".join(map(str, value))
  return str(value)


def facts(rows: Iterable[tuple]) -> str:
  """Returns a table of (name, value), left-aligned: the values have no common unit."""
  body = [f"<tr>{_cell(name)}{_cell(text(value))}</tr>" for name, value in rows]
  return f"<table class=facts>{''.join(body)}</table>"


def plain_facts(values: dict) -> list[tuple]:
  """Returns the (name, value) pairs of a JSON object that are numbers or text."""
  plain = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
  return [(name.replace("_", " "), value) for name, value in plain.items()]


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
  """Returns a table; numbers are right-aligned, a column without any value is left out."""
  columns = []
  for name, *values in zip(head, *rows, strict=True):
    if any(value is not None for value in values):
      numbers = [isinstance(value, int | float) for value in values]
      cells = [_cell(value, "td", number) for value, number in zip(values, numbers, strict=True)]
      columns.append([_cell(name, "th", any(numbers)), *cells])
  lines = [f"<tr>{''.join(cells)}</tr>" for cells in zip(*columns, strict=True)]
  return f"<table>{''.join(lines)}</table>"


def _cell(value, tag: str = "td", number: bool = False) -> str:
  return f"<{tag}{' class=n' if number else ''}>{html.escape(text(value))}</{tag}>"


def picture(data: bytes, alt: str, width: int | None = None) -> str:
  """Returns a PNG file as an inline picture; `width` in pixels."""
  size = f' width="{width}"' if width else ""
  encoded = base64.b64encode(data).decode()
  return f'<img alt="{html.escape(alt)}"{size} src="data:image/png;base64,{encoded}">'


def image(figure: Figure, alt: str) -> str:
  """Returns a figure as an inline picture."""
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=_FIGURE_DPI, bbox_inches="tight")
  return picture(data.getvalue(), alt, round(_FIGURE_WIDTH * figure.get_figwidth()))


def video(path: pathlib.Path, caption: str, below: str = "") -> str:
  """Returns an mp4 file as an inline video with a caption; `below` is HTML between the two."""
  encoded = base64.b64encode(path.read_bytes()).decode()
  return (
    "<figure><video autoplay loop muted playsinline "
    f'src="data:video/mp4;base64,{encoded}"></video>{below}'
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
  )


def panels(count: int, width: float = 9.5, height: float = 3.0) -> tuple[Figure, list[Axes]]:
  """Returns a figure of `width` x `height` inches with panels side by side."""
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(1, count, squeeze=False)[0]
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes
