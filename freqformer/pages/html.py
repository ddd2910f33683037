"""Pieces of an HTML page that needs no network: tables, figures, pictures and videos inline."""

import base64
import html
import io
import pathlib
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 1000px;
  margin: 0 auto; padding: 1.5em 16px 4em; overflow-wrap: break-word }
h1 { font-size: 1.5em; margin: 0 0 0.3em } h3 { font-size: 1em; margin: 1.4em 0 0.2em }
h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #e5e7eb }
table { border-collapse: collapse; margin: 0.8em 0; font-size: 0.93em }
td, th { padding: 0.2em 1.2em 0.2em 0; text-align: left; vertical-align: top }
.scroll th { white-space: nowrap } .scroll td:not(.n) { min-width: 8em }
tr + tr td { border-top: 1px solid #f0f0f0 }
.facts td:first-child { color: #6b7280; min-width: 9em }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.scroll { overflow-x: auto } figure { margin: 0; min-width: 0 }
img, video { display: block; height: auto }
.figure img { max-width: max(100%, 640px) }
video { width: 100%; border-radius: 3px; image-rendering: auto }
.file, figcaption { color: #6b7280; font-size: 0.85em }
.absent { color: #6b7280; font-style: italic }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.2em }
.pair { display: grid; gap: 4px; grid-template-columns: repeat(auto-fit, minmax(88px, 1fr)) }
.pair figure { max-width: 146px }
.row { display: flex; gap: 10px; overflow-x: auto; margin-bottom: 1em }
.row figure { flex: none; width: 192px } .row img { width: 192px; border-radius: 3px }
.mosaic { display: grid; gap: 2px; color: #6b7280; font-size: 0.85em }
.steps { display: grid; gap: 0.6em }
.mosaic span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
pre { background: #f9fafb; padding: 1em; overflow: auto } summary { cursor: pointer }
"""
COLOURS = ("#3b6fb6", "#e0a030", "#b5483f", "#4f8f5b", "#7a5ca8", "#2b8a9a", "#6b7280")
GREY = COLOURS[-1]
_FIGURE_DPI = 140
_FIGURE_WIDTH = 100  # pixels on the page per inch of a figure


def page(title: str, sections: Iterable[str]) -> str:
  """Returns a whole page; `title` is plain text, `sections` are HTML."""
  title = html.escape(title)
  body = "\n".join(sections)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
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
    sizes = all(isinstance(own, int) for own in value)
    return (" × " if sizes else ", ").join(map(text, value)) or "–"
  return str(value)


def facts(rows: Iterable[tuple]) -> str:
  """Returns a table of (name, value), left-aligned: the values have no common unit."""
  body = [f"<tr>{_cell(name)}{_cell(text(value))}</tr>" for name, value in rows]
  return f'<table class="facts">{"".join(body)}</table>'


def plain_facts(values: dict) -> list[tuple]:
  """Returns the (name, value) pairs of a JSON object that are numbers or text."""
  plain = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
  return [(name.replace("_", " "), value) for name, value in plain.items()]


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
  """Returns a table; numbers are right-aligned, a column without any value is left out."""
  columns = []
  for name, *values in zip(head, *rows, strict=True):
    if any(value is not None for value in values):
      numeric = any(isinstance(value, int | float) for value in values)
      cells = [_cell(own, "td", numeric and not isinstance(own, str)) for own in values]
      columns.append([_cell(name, "th", numeric), *cells])
  lines = [f"<tr>{''.join(cells)}</tr>" for cells in zip(*columns, strict=True)]
  return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def json_tables(value, title: str = "") -> str:
  """Returns any JSON as tables: objects of one kind by row, plain values by name, the rest nested.

  Args:
    value: of `json.loads`.
    title: of the tables, plain text.
  """
  head = f"<h3>{html.escape(title)}</h3>" if title else ""
  if isinstance(value, dict) and value and all(isinstance(own, dict) for own in value.values()):
    value = [{"": name, **own} for name, own in value.items()]
  if isinstance(value, list) and value and all(isinstance(own, dict) for own in value):
    names = dict.fromkeys(name for row in value for name in row)
    plain = [name for name in names if all(_is_plain(row.get(name)) for row in value)]
    rows = [[row.get(name) for name in plain] for row in value]
    found = table([name.replace("_", " ") for name in plain], rows) if plain else ""
    for row in value:
      label = " ".join(str(row[name]) for name in plain[:1])
      for name in names:
        if name in row and name not in plain and not _is_plain(row[name]):
          found += json_tables(row[name], f"{label} {name}".strip())
    return head + found
  if not isinstance(value, dict):
    return head + facts([("", value)])
  plain = {name: own for name, own in value.items() if _is_plain(own)}
  found = facts((name.replace("_", " "), own) for name, own in plain.items()) if plain else ""
  for name, own in value.items():
    if name not in plain:
      found += json_tables(own, name.replace("_", " "))
  return head + found


def _is_plain(value) -> bool:
  """Tells whether a value fits into a cell: a number, text, or a list of these."""
  if isinstance(value, list):
    return all(own is None or isinstance(own, int | float | str) for own in value)
  return value is None or isinstance(value, int | float | str)


def _cell(value, tag: str = "td", number: bool = False) -> str:
  kind = ' class="n"' if number else ""
  return f"<{tag}{kind}>{html.escape(text(value))}</{tag}>"


def picture(data: bytes, alt: str, width: int | None = None) -> str:
  """Returns a PNG file as an inline picture; `width` in pixels."""
  size = f' width="{width}"' if width else ""
  encoded = base64.b64encode(data).decode()
  return f'<img alt="{html.escape(alt)}"{size} src="data:image/png;base64,{encoded}">'


def image(figure: Figure, alt: str) -> str:
  """Returns a figure as an inline picture."""
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=_FIGURE_DPI)
  found = picture(data.getvalue(), alt, round(_FIGURE_WIDTH * figure.get_figwidth()))
  return f'<div class="scroll figure">{found}</div>'


def video(path: pathlib.Path, caption: str, below: str = "") -> str:
  """Returns an mp4 file as an inline video with a caption; `below` is HTML between the two."""
  return f"<figure>{player(path)}{below}<figcaption>{html.escape(caption)}</figcaption></figure>"


def player(path: pathlib.Path) -> str:
  """Returns an mp4 file as an inline video that plays by itself."""
  encoded = base64.b64encode(path.read_bytes()).decode()
  return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{encoded}"></video>'


def legend(axis: Axes):
  """Puts an axis's legend to its right."""
  axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def panels(count: int, width: float = 9.5, height: float = 3.0) -> tuple[Figure, list[Axes]]:
  """Returns a figure of `width` x `height` inches with panels side by side."""
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(1, count, squeeze=False)[0]
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes
