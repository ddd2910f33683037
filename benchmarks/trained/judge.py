"""Measures the judge of `freqformer/evaluate/recognise.py` on the demo's classes.

  python -m benchmarks.trained.judge [--config=configs/demo.py]

It is fitted to the training clips of the demo and asked about validation clips, about clips of
groups that no split has, under their own colours and under those of other classes, and about
controls of these. Writes the row `judge` of benchmarks/results/judge.json.
"""

import dataclasses
import time

import numpy as np
from absl import flags
from PIL import Image

from benchmarks.rows import context, write_rows
from benchmarks.trained.runs import ROOT
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.data import render
from freqformer.data.cache import LatentCache, prepare
from freqformer.data.codec import make_codec
from freqformer.data.protocol import DataConfig
from freqformer.evaluate import recognise
from freqformer.train.experiment import experiment

_GROUPS = range(20, 30)  # no rendered set has them
_CLIPS = 3  # of a group
_SHIFTS = (0, 1, 3, 5)  # classes further whose palette a class takes


def decoded(cache: LatentCache) -> tuple[np.ndarray, np.ndarray]:
  """Returns the videos of a cache, uint8 `[n, t, y, x, 3]`, and their labels `[n]`."""
  items = [cache[i] for i in range(len(cache))]
  videos = cache.decode(np.stack([item["latent"] for item in items]))
  return videos, np.array([item["label"] for item in items])


def fresh(data: DataConfig, names: list[str], shift: int) -> tuple[np.ndarray, np.ndarray]:
  """Renders clips of unseen groups, through the codec; each class in another one's colours.

  Args:
    data: of the run.
    names: of the classes; index = label.
    shift: 0 for a class's own colours.
  """
  looks = dict(render.LOOKS)
  codec = make_codec(data.codec)
  rows, cols = data.resolution
  videos = []
  try:
    for i, name in enumerate(names):
      palette = looks[names[(i + shift) % len(names)]].palette
      render.LOOKS[name] = dataclasses.replace(looks[name], palette=palette)
    for name in names:
      for group in _GROUPS:
        for clip in range(_CLIPS):
          frames = (data.frames - 1) * data.stride + 1
          source = render.render_clip(name, group, clip, frames)[:: data.stride, :, 20:140]
          small = [Image.fromarray(x).resize((cols, rows), Image.BICUBIC) for x in source]
          videos.append(np.stack([np.asarray(x) for x in small]))
  finally:
    render.LOOKS.update(looks)
  videos = codec.decode(codec.encode(np.stack(videos)), data.video_shape)
  return videos, np.repeat(np.arange(len(names)), len(_GROUPS) * _CLIPS)


def main(_):
  command = "python -m benchmarks.trained.judge"
  here = context(command)
  data = experiment(read_config(_CONFIG.value)).data
  render.render_ucf101(data.root)
  caches = {split: prepare(data, split) for split in ("train", "val")}
  names = caches["train"].class_names
  videos, labels = decoded(caches["train"])
  clock = time.process_time()
  judge = recognise.fit(videos, labels, names)
  seconds = time.process_time() - clock
  own, own_labels = fresh(data, names, 0)
  report = judge.report(own, own_labels, *decoded(caches["val"]))
  more = {}
  for name, make in recognise.CONTROLS.items():
    more[name] = float(np.mean(judge.named(make(own, 2)) == own_labels))
  swapped = {}
  for shift in _SHIFTS[1:]:
    others, labels = fresh(data, names, shift)
    swapped[shift] = float(np.mean(judge.named(others) == labels))
  row = {
    "name": "judge",
    "fitted_to": len(videos),
    "fit_cpu_seconds": round(seconds, 1),
    "validation": report["real"],
    "validation_controls": report["controls"],
    "unseen_groups": report["samples"],
    "unseen_groups_controls": more,
    "unseen_groups_in_other_colours": swapped,
    "video": data.facts(),
    "backbone": report["backbone"],
  }
  write_rows("judge", [here | row], command)
  print(f"validation {report['real']['named']:.3f}, controls {report['controls']}")
  print(f"unseen groups {report['samples']['named']:.3f}, controls {more}")
  print(f"in other colours {swapped}; fitted in {seconds:.0f} CPU s")


if __name__ == "__main__":
  _CONFIG = flags.DEFINE_string("config", str(ROOT / "configs" / "demo.py"), "Config of the data.")
  cli.run(main)
