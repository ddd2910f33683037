"""Renders clips of camera moves over photographs, a folder of mp4 files per class of motion.

  python -m freqformer.pans --photos=FOLDER --out=data/pans
  python -m freqformer.pans --photos=FOLDER --out=data/pans8 --directions=8 --speeds=1,2 --sprite

OUT gets train/MOTION/*.mp4 and val/MOTION/*.mp4, no photograph in both, and pans.json, which has
each clip's exact motion. docs/evidence.md says where photographs come from. The same settings and
photographs give the same pictures.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from tqdm import tqdm

from freqformer.command import cli
from freqformer.config import ConfigError, refusing
from freqformer.data import pans
from freqformer.pages.mp4 import write_mp4

RECORD = "pans.json"
UNITS = {
  "velocity": "of the picture, not of the camera: (down, right), pixels per frame",
  "zoom": "factor per frame",
  "angle": "degrees per frame, anticlockwise",
  "scale": "pixels of the photograph per pixel of the clip's middle frame",
  "place": "pixels of the photograph (down, right) in the middle of the middle frame",
}


def main(argv: Sequence[str] | None = None) -> None:
  """Renders a set; one that is there already is kept if it would be the same."""
  args = _arguments(argv)
  out = pathlib.Path(args.out)
  with refusing("python -m freqformer.pans"):
    speeds = tuple(float(speed) for speed in args.speeds.split(","))
    values = {
      field.name: getattr(args, field.name) for field in dataclasses.fields(pans.PansConfig)
    }
    config = pans.PansConfig(**(values | {"speeds": speeds}))
  photographs = pans.find_photographs(args.photos, config)
  for key, reason in photographs.skipped.items():
    print(f"left out: {key}: {reason}", file=sys.stderr)
  record = _record(config, photographs)
  if _is_there(out, record):
    print(f"{out} is there already")
    return
  partial = out.with_name(f".{out.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  record["clips"] = _render(partial, config, photographs)
  (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
  if out.is_dir():
    out.rmdir()  # it is empty
  partial.rename(out)
  print(f"{len(record['clips'])} clips of {len(photographs.sizes)} photographs: {out}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  default = pans.PansConfig()
  speeds = ",".join(map(str, default.speeds))
  path = os.path.expanduser
  parser = argparse.ArgumentParser(
    prog="python -m freqformer.pans",
    description=__doc__.split("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--photos", type=path, required=True, help="folder tree of photographs")
  parser.add_argument("--out", type=path, default="data/pans", help="folder, new or empty")
  parser.add_argument("--clips", type=int, default=default.clips, help="per photograph and motion")
  parser.add_argument("--frames", type=int, default=default.frames, help="of a clip")
  parser.add_argument("--rows", type=int, default=default.rows, help="of a frame")
  parser.add_argument("--cols", type=int, default=default.cols, help="of a frame")
  parser.add_argument("--speeds", default=speeds, help="pixels per frame, taken in turn")
  parser.add_argument("--directions", type=int, default=default.directions, help="4 or 8")
  parser.add_argument("--sprite", action="store_true", help="a disc moves across, too")
  parser.add_argument("--val", type=float, default=default.val, help="share of validation scenes")
  parser.add_argument("--seed", type=int, default=default.seed, help="of all draws")
  return parser.parse_args(argv)


def _record(config: pans.PansConfig, photographs: pans.Photographs) -> dict:
  """Returns what decides the clips, as JSON values."""
  pictures = {
    key: {
      "size": list(size),
      "bytes": (photographs.folder / key).stat().st_size,
      "split": photographs.splits[key],
    }
    for key, size in photographs.sizes.items()
  }
  settings = dataclasses.asdict(config) | {"speeds": list(config.speeds)}
  return {"version": pans.VERSION, "settings": settings, "photographs": pictures, "units": UNITS}


def _is_there(out: pathlib.Path, record: dict) -> bool:
  """Tells whether `out` holds the set already.

  Raises:
    ConfigError: it holds something else.
  """
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return False
  if not (out / RECORD).is_file():
    raise ConfigError(f"--out={str(out)!r} holds other files: name a folder that is new or empty.")
  found = json.loads((out / RECORD).read_text())
  changed = [key for key in record if found.get(key) != record[key]]
  if changed:
    raise ConfigError(
      f"--out={str(out)!r} holds clips of other {' and '.join(changed)}: delete it, or name "
      "another folder."
    )
  return True


def _render(
  folder: pathlib.Path, config: pans.PansConfig, photographs: pans.Photographs
) -> dict[str, dict]:
  """Writes all clips below `folder`; returns by path what each one shows."""
  shots = list(itertools.product(config.motions, range(config.clips)))
  total = len(shots) * len(photographs.sizes)
  clips = {}
  # Pillow and the encoder leave Python's lock: clips are rendered side by side in threads.
  pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
  with tqdm(total=total, desc="rendering clips", leave=False) as bar, pool:
    for key, size in photographs.sizes.items():
      photo = photographs.open(key)

      def render(item, key=key, size=size, photo=photo):
        name, number = item
        shot = pans.draw_shot(config, key, name, number, size)
        path = pans.clip_path(photographs.splits[key], name, key, number)
        write_mp4(folder / path, pans.render_clip(photo, shot, config))
        bar.update()
        facts = dataclasses.asdict(shot)
        return path, {"photograph": key, **facts.pop("motion"), **facts}

      clips |= pool.map(render, shots)
  return clips


if __name__ == "__main__":
  cli.run_plain(main)
