"""Writes a comparison of methods: figures as JSON, videos, and a page that needs no network."""

import contextlib
import html
import io
import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from PIL import Image

from freqformer.disk import size_text, write_whole
from freqformer.evaluate.compare import paired
from freqformer.evaluate.quality import difference
from freqformer.evaluate.record_masks import density_picture
from freqformer.pages.html import (
  absent,
  facts,
  image,
  page,
  picture,
  plain_facts,
  section,
  table,
  text,
  video,
)
from freqformer.pages.mp4 import write_mp4
from freqformer.pages.text import aligned

_MAX_SAMPLES = 16  # every video is embedded once per method
_COLOURS = colormaps["magma"]
_UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
_COLUMNS = {
  "density": "density",
  "attention_flops_over_dense": "attention FLOPs / dense",
  "total_flops_over_dense": "all FLOPs / dense",
  "compile_seconds": "compile, s",
  "run_seconds": "run, s",
  "seconds_per_sample": "s per sample",
}
# Columns of rows that have them.
_MORE = {
  "speedup": "times as fast as the first",
  "predicted_speedup": "simulated on {predicted_on}",
  "attention_error": "error of attention",
}


def write_comparison(
  out, result: dict, videos: Mapping[str, np.ndarray], captions: list[str], fps: float
) -> pathlib.Path:
  """Writes `<method>/<sample>.mp4`, comparison.json and comparison.html; returns the page's path.

  Args:
    out: an existing folder; what an earlier comparison left there goes.
    result: plain JSON with `rows` (of `evaluate.compare.compare`) and facts about the run: plain
      values, and if they are known `prompts` by number, `seconds` and `peak_bytes` by stage.
    videos: per method uint8 `[b, t, y, x, 3]`, the reference first.
    captions: one per sample.
    fps: frames per second.
  """
  out = pathlib.Path(out)
  _remove_old(out)
  paths = {}
  for method, own in videos.items():
    names = [f"{i:03d}_{slug(caption)}.mp4" for i, caption in enumerate(captions)]
    paths[method] = [out / slug(method) / name for name in names]
    for path, clip in zip(paths[method], own, strict=True):
      write_mp4(path, clip, fps)
  write_whole(out / "comparison.json", json.dumps(result, indent=1))
  intro = "The first method is the reference; quality is per frame, then averaged."
  sections = [section("Figures", intro, _figures(result))]
  intro = "The same noise; below each video, where it differs from the reference."
  sections.append(section("Videos", intro, _videos(videos, captions, paths)))
  path = out / "comparison.html"
  write_whole(path, page("Methods side by side", sections + _what_ran(result)))
  return path


def write_speed(out, result: dict) -> pathlib.Path:
  """Writes speed.json and speed.html, a comparison without videos; returns the page's path.

  Args:
    out: an existing folder.
    result: as of `write_comparison`; `weights` says what the weights are.
  """
  out = pathlib.Path(out)
  write_whole(out / "speed.json", json.dumps(result, indent=1))
  figures = section("Figures", f"The weights are {result['weights']}.", _figures(result))
  path = out / "speed.html"
  write_whole(path, page("Speed of methods", [figures, *_what_ran(result)]))
  return path


def _what_ran(result: dict) -> list[str]:
  """Returns the sections of what ran, on what."""
  intro = (
    "Scored pairs / n² as run, of one sample: sampling steps to the right, layer and head down."
  )
  density = section("Density", intro, _density(result["rows"]))
  told = plain_facts(result)
  told += [(f"prompt {number}", prompt) for number, prompt in result.get("prompts", {}).items()]
  for stage, seconds in result.get("seconds", {}).items():
    peak = result["peak_bytes"].get(stage)
    memory = f", most memory so far {size_text(peak)}" if peak else ""
    told.append((f"stage: {stage}", f"{seconds:.1f} s{memory}"))
  return [density, section("Run", "What ran, on what.", facts(told))]


def _remove_old(out: pathlib.Path):
  """Removes the videos of an earlier comparison, by what its comparison.json lists."""
  try:
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    folders = [out / slug(row["method"]) for row in rows]
  except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or not one of ours
    return
  for folder in folders:
    for path in folder.glob("[0-9][0-9][0-9]_*.mp4"):
      path.unlink()
    with contextlib.suppress(OSError):  # it is gone, or has a file of the user's
      folder.rmdir()


def slug(name: str) -> str:
  """Returns a name as a file name: `radial(decay=0.5)` -> `radial_decay_0.5`."""
  return re.sub(r"[^\w.-]+", "_", name).strip("_")


def text_table(rows: list[dict]) -> str:
  """Returns the rows of a comparison as plain text."""
  lines = [[text(value) for value in line] for line in _lines(rows)]
  return "\n\n".join(aligned(part) for part in (lines, _paired(rows)) if part)


def _lines(rows: list[dict]) -> list[list]:
  """Returns the head and the rows of the table of figures."""
  metrics = list(rows[-1]["quality"] or {})
  more = {key: title for key, title in _MORE.items() if key in rows[-1]}
  titles = [title.format(**rows[-1]) for title in more.values()]
  lines = [["method", *(_UNITS[metric] for metric in metrics), *_COLUMNS.values(), *titles]]
  for row in rows:
    quality = row["quality"] or {}
    columns = [*(row[key] for key in _COLUMNS), *map(row.get, more)]
    lines.append([row["method"], *map(quality.get, metrics), *columns])
  return lines


def _paired(rows: list[dict]) -> list[list[str]]:
  """Returns the head and the rows of the table of differences on the same clips; [] if none."""
  found = [
    [
      f"{pair['methods'][0]} less {pair['methods'][1]}",
      _UNITS[pair["metric"]],
      f"{pair['mean']:+.3g}",
      f"{pair['standard_error']:.2g}",
      text(pair["t"]),
      text(pair["clips"]),
    ]
    for pair in paired(rows)
  ]
  return (
    [["on the same clips", "", "mean", "standard error", "t", "clips"], *found] if found else []
  )


def _figures(result: dict) -> str:
  head, *numbers = _lines(result["rows"])
  found = table(head, numbers)
  if pairs := _paired(result["rows"]):
    found += table(pairs[0], pairs[1:])
  if "flops_are" in result:
    found += f"<p>FLOPs are {html.escape(result['flops_are'])}</p>"
  judged = result["rows"][-1]["quality"]
  if judged and "lpips" not in judged:
    found += absent("LPIPS was not measured: it needs --lpips_weights.")
  return found


def _videos(videos: Mapping[str, np.ndarray], captions: list[str], paths: dict) -> str:
  (first, reference), *others = videos.items()
  shown = min(len(captions), _MAX_SAMPLES)
  maps = {method: difference(own[:shown], reference[:shown]) for method, own in others}
  most = max((float(m.max()) for m in maps.values()), default=0.0) or 1.0
  parts = [
    f"<p>Black is equal, the brightest colour is {most:.1f} grey levels, in all pictures alike.</p>"
  ]
  for i in range(shown):
    cards = [video(paths[first][i], first)]
    for method, own in maps.items():
      data = io.BytesIO()
      pixels = _COLOURS(own[i] / most, bytes=True)[..., :3]
      Image.fromarray(pixels).save(data, format="png")
      below = picture(data.getvalue(), f"difference of {method}")
      cards.append(video(paths[method][i], method, below))
    parts.append(f'<b>{html.escape(captions[i])}</b><div class="row">{"".join(cards)}</div>')
  if shown < len(captions):
    parts.append(f"<p>{len(captions) - shown} further samples are in the page's folder.</p>")
  return "".join(parts)


def _density(rows: list[dict]) -> str:
  parts = []
  for row in rows:
    density = np.asarray(row["density_by_step_layer_head"])
    figure = density_picture(density, f"{row['method']}: mean {row['density']:.3f}")
    parts.append(image(figure, f"density of {row['method']}"))
  return "".join(parts)
