"""What a comparison of methods leaves behind: videos, comparison.json and one HTML file that needs no network."""

import base64
import contextlib
import html
import io
import json
import pathlib
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image

from freqformer.evaluate.quality import difference
from freqformer.pages.html import STYLE, image, panels, table, text
from freqformer.pages.mp4 import write_mp4

_MAX_SAMPLES = 16  # Every video is embedded once per method.
_COLOURS = "magma"
_EXTRA = ".row { display: flex; gap: 10px; overflow-x: auto; margin-bottom: 1em } .row img { width: 192px; border-radius: 4px }"


def write_comparison(
  out, result: dict, videos: dict[str, np.ndarray], captions: list[str], fps: float
) -> pathlib.Path:
  """Writes `<method>/<sample>.mp4` per video, comparison.json and comparison.html to `out`; returns the page's path.

  Args:
    result: plain JSON with `rows` (of `compare.compare`) and facts about the run.
    videos: per method uint8 `[b, t, y, x, 3]`, the reference first; captions: one per sample.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  _remove_old(out)
  paths = {
    name: [out / slug(name) / f"{i:03d}_{slug(c)}.mp4" for i, c in enumerate(captions)]
    for name in videos
  }
  for name, own in videos.items():
    for path, video in zip(paths[name], own, strict=True):
      write_mp4(path, video, fps)
  (out / "comparison.json").write_text(json.dumps(result, indent=1))
  sections = (
    (
      "Figures",
      "The first method is the reference; quality is per frame, then averaged.",
      _figures(result),
    ),
    (
      "Videos",
      "The same noise; below each video, where it differs from the reference.",
      _videos(videos, captions, paths),
    ),
    (
      "Density",
      "Scored pairs / n² as run, of one sample: sampling steps to the right, layer and head down.",
      _density(result),
    ),
    ("Run", "What ran, on what.", _facts(result)),
  )
  body = "\n".join(
    f"<section><h2>{title}</h2><p>{intro}</p>{inner}</section>" for title, intro, inner in sections
  )
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Methods side by side</title>'
    f"<style>{STYLE}{_EXTRA}</style></head><body><h1>Methods side by side</h1>\n{body}\n</body></html>\n"
  )
  path = out / "comparison.html"
  path.write_text(page, encoding="utf-8")
  return path


def _remove_old(out: pathlib.Path):
  """The videos of an earlier comparison, by what its comparison.json says: other methods, other samples, or both."""
  before = out / "comparison.json"
  try:
    folders = [out / slug(row["method"]) for row in json.loads(before.read_text())["rows"]]
  except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or none of ours
    return
  for folder in folders:
    for video in folder.glob("[0-9][0-9][0-9]_*.mp4"):
      video.unlink()
    with contextlib.suppress(OSError):  # gone, or something of the user's lies there
      folder.rmdir()


def slug(name: str) -> str:
  """A name as a file name: `radial(decay=0.5)` -> `radial_decay_0.5`."""
  return re.sub(r"[^\w.-]+", "_", name).strip("_")


def _figures(result) -> str:
  rows = result["rows"]
  metrics = list(rows[-1]["quality"] or {})
  units = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
  head = [
    "method",
    *(units[m] for m in metrics),
    "density",
    "attention FLOPs / dense",
    "all FLOPs / dense",
  ]
  head += ["compile, s", "run, s", "s per sample"]
  numbers = [
    (r["method"], *((r["quality"] or {}).get(m) for m in metrics), r["density"])
    + (r["attention_flops_over_dense"], r["total_flops_over_dense"])
    + (r["compile_seconds"], r["run_seconds"], r["seconds_per_sample"])
    for r in rows
  ]
  flops = f"<p>FLOPs are {html.escape(result['flops_are'])}</p>" if "flops_are" in result else ""
  absent = (
    ""
    if "lpips" in metrics
    else "<p class=absent>LPIPS was not measured: it needs --lpips_weights.</p>"
  )
  return table(head, numbers) + flops + absent


def _videos(videos, captions, paths) -> str:
  (first, reference), shown = next(iter(videos.items())), min(len(captions), _MAX_SAMPLES)
  maps = {
    name: difference(own[:shown], reference[:shown])
    for name, own in videos.items()
    if name != first
  }
  most = max((float(m.max()) for m in maps.values()), default=0.0) or 1.0
  parts = [
    f"<p>Black is equal, the brightest colour is {most:.1f} grey levels, in all pictures alike.</p>"
  ]
  for i in range(shown):
    cards = []
    for name in videos:
      clip = base64.b64encode(paths[name][i].read_bytes()).decode()
      heat = "" if name == first else _heat(maps[name][i] / most, f"difference of {name}")
      video = f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{clip}"></video>'
      cards.append(f"<figure>{video}{heat}<figcaption>{html.escape(name)}</figcaption></figure>")
    parts.append(f'<b>{html.escape(captions[i])}</b><div class="row">{"".join(cards)}</div>')
  if shown < len(captions):
    parts.append(f"<p>{len(captions) - shown} further samples lie beside this page.</p>")
  return "".join(parts)


def _heat(values: np.ndarray, alt: str) -> str:
  """A map in [0, 1] as an inline picture, pixel by pixel."""
  data = io.BytesIO()
  Image.fromarray(colormaps[_COLOURS](values, bytes=True)[..., :3]).save(data, format="png")
  return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _density(result) -> str:
  parts = []
  for r in result["rows"]:
    density = np.asarray(r["density_by_step_layer_head"])  # [steps, layers, heads]
    steps, layers, heads = density.shape
    figure, (axis,) = panels(1, 6.5, min(6, 1.3 + 0.09 * layers * heads))
    shown = axis.imshow(
      density.reshape(steps, -1).T,
      vmin=0,
      vmax=1,
      aspect="auto",
      cmap="viridis",
      interpolation="nearest",
    )
    axis.hlines(np.arange(1, layers) * heads - 0.5, -0.5, steps - 0.5, color="white", lw=1)
    axis.set_yticks(np.arange(layers) * heads, [f"{i}.0" for i in range(layers)])
    axis.set(xlabel="step", ylabel="layer.head", title=f"{r['method']}: mean {r['density']:.3f}")
    figure.colorbar(shown, label="density")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    parts.append(image(figure, f"density of {r['method']}"))
  return "".join(parts)


def _facts(result) -> str:
  return table(
    [],
    [(k.replace("_", " "), text(v)) for k, v in result.items() if isinstance(v, int | float | str)],
  )
