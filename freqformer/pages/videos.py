"""Shows the videos of a run: samples beside real clips, and samples while it trained.

Folders of a run: `samples/<class>/<number>.mp4`, or `samples/<class>.mp4` with all samples of a
class side by side; without these `evaluation/samples/<class>/<number>.mp4`, drawn to be measured;
`real/<class>.mp4`; `samples-in-training/<step>.mp4` with a class per column.
"""

import html
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from freqformer.pages.files import Absent, json_if_any
from freqformer.pages.html import facts, plain_facts, player, video

TRAINING = "samples-in-training"
REAL = "real"
MAX_CLASSES = 18
# choice: a browser plays so many videos of a page at most; Chromium 40 on phones, 75 elsewhere.
_MAX_VIDEOS = 32
_MAX_SAMPLES = 4
_MAX_STEPS = 6
_COLUMN = 64  # pixels that a class of a mosaic has at least


def sample_files(workdir: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each class's samples, by its name; folders go before mosaics."""
  root = workdir / "samples"
  if not root.exists():
    root = workdir / "evaluation" / "samples"
  found = {path.stem: [path] for path in root.glob("*.mp4")}
  for folder in root.glob("*/"):
    own = sorted(folder.glob("*.mp4"), key=lambda path: (len(path.stem), path.stem))
    if own:
      found[folder.name] = own
  return dict(sorted(found.items()))


def real_file(workdir: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns the real clip of a class, None if there is none."""
  path = workdir / REAL / f"{name}.mp4"
  return path if path.exists() else None


def by_class(videos: Mapping[str, Sequence[str]], titles: Mapping[str, str]) -> str:
  """Returns a grid with a card per class, of videos as HTML, under a title or its name."""
  cards = [
    f'<div><b>{html.escape(titles.get(name, name))}</b><div class="pair">{"".join(own)}</div></div>'
    for name, own in videos.items()
  ]
  return f'<div class="clips">{"".join(cards)}</div>'


def samples(workdir: pathlib.Path) -> str:
  """Shows a card per class: its samples, then the real clip; of a run without samples real ones."""
  found = sample_files(workdir)
  names = list(found) or sorted(path.stem for path in (workdir / REAL).glob("*.mp4"))
  if not names:
    raise Absent("this run has no samples yet (written by eval.py).")
  shown = names[:MAX_CLASSES]
  each = min(_MAX_SAMPLES, max(1, _MAX_VIDEOS // len(shown) - 1))
  cards = {}
  for name in shown:
    files = found.get(name, [])[:each]
    videos = [video(path, "generated") for path in files]
    clip = real_file(workdir, name)
    if clip is not None:
      videos.append(video(clip, "real"))
    cards[name] = videos
  about = json_if_any(workdir, "samples/sampling.json")
  text = by_class(cards, about.get("prompts", {}))
  if not found:
    text = "<p>Real clips only: eval.py writes samples.</p>" + text
  if len(names) > len(shown):
    text += f"<p>{len(names) - len(shown)} further classes are in samples/.</p>"
  if about:
    details = facts(plain_facts(about))
    text += f"<details><summary>How they were sampled</summary>{details}</details>"
  return text


def step_files(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  """Returns the videos of `samples-in-training` by step."""
  paths = (workdir / TRAINING).glob("*.mp4")
  return dict(sorted((int(path.stem), path) for path in paths if path.stem.isdigit()))


def in_training(workdir: pathlib.Path) -> str:
  """Shows a row per validation, a class per column; of many the first, the last, some between."""
  files = step_files(workdir)
  if not files:
    raise Absent("none was drawn: train.samples is 0, or there was no validation yet.")
  about = json_if_any(workdir, f"{TRAINING}/about.json")
  names = about.get("classes", [])
  steps = list(files)
  picks = np.unique(np.linspace(0, len(steps) - 1, min(_MAX_STEPS, len(steps))).round().astype(int))
  rows = [f"<div>step {steps[i]:,}{player(files[steps[i]])}</div>" for i in picks]
  if names:
    columns = f"grid-template-columns: repeat({len(names)}, 1fr)"
    heads = "".join(f"<span>{html.escape(name)}</span>" for name in names)
    rows.insert(0, f'<div class="mosaic" style="{columns}">{heads}</div>')
  width = _COLUMN * max(1, len(names))
  most = max(192, 128 * len(names))
  style = f"min-width: {width}px; max-width: {most}px"
  text = f'<div class="scroll"><div class="steps" style="{style}">{"".join(rows)}</div></div>'
  if len(picks) < len(steps):
    text += f"<p>{len(steps) - len(picks)} further steps are in {TRAINING}/.</p>"
  return text + (facts(plain_facts(about)) if about else "")
