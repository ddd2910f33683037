"""Measures peak memory and CPU seconds of decoding large and long films into views.

  python -m benchmarks.cpu.footage    # a minute and 300 MB of disk: results/footage.json

`4k`: 200 frames of 3840x2160, 16 views spread over them. `far`: two views, 20 minutes apart in a
file. Each runs in a process of its own; memory is the process's peak over that before decoding.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import av
import numpy as np
from absl import flags

from benchmarks.rows import goal_row, table, write_rows
from freqformer.command import cli
from freqformer.data.codec import CodecConfig
from freqformer.data.decode import VideoFile, decode_clip
from freqformer.data.protocol import Clip, DataConfig

_NAME = "footage"
_MINUTES = 21
_FPS = 25


def write_film(path: pathlib.Path, frames: int, rows: int, cols: int):
  """Writes noise that drifts, H.264 at its fastest with a key frame every ten seconds."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 255, (rows // 8, cols // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
  options = {"preset": "ultrafast", "g": str(10 * _FPS)}
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=_FPS, options=options)
    stream.height = rows
    stream.width = cols
    stream.pix_fmt = "yuv420p"
    for i in range(frames):
      picture = np.roll(noise, 2 * i, axis=1)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


def resident(field: str) -> int:
  """Returns bytes of a field of Linux's /proc/self/status: VmRSS is now, VmHWM the peak."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(f"{field}:"))
  return 1024 * int(line.split()[1])


def decode_views(path: str) -> dict:
  """Decodes 16 views and returns what that took."""
  codec = CodecConfig(factor=(2, 8, 8), channels=16)
  config = DataConfig(
    source="folder", root=".", resolution=(90, 154), frames=17, stride=2, views=16, codec=codec
  )
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
  before = resident("VmRSS")
  clock = time.process_time()
  decode_clip(config, "train", Clip("film", path, 0))
  return {"bytes": resident("VmHWM") - before, "cpu_seconds": time.process_time() - clock}


def read_far(path: str) -> dict:
  """Reads 17 frames near the start and 17 behind 20 minutes."""
  clock = time.process_time()
  with VideoFile(path) as video:
    last = video.length - 40
    wanted = [*range(20, 54, 2), *range(last, last + 34, 2)]
    assert len(video.read(wanted)) == len(wanted)
  return {"cpu_seconds": time.process_time() - clock, "minutes": (last - 20) / _FPS / 60}


CASES = {"4k": decode_views, "far": read_far}


def main(_):
  """Writes the films, measures each case in a process and writes the rows."""
  if _CASE.value:
    print(json.dumps(CASES[_CASE.value](_FILE.value)))
    return
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    for name, shape in (("4k", (200, 2160, 3840)), ("far", (60 * _FPS * _MINUTES, 360, 640))):
      path = pathlib.Path(folder) / f"{name}.mp4"
      write_film(path, *shape)
      line = [sys.executable, "-m", "benchmarks.cpu.footage", f"--case={name}", f"--file={path}"]
      done = subprocess.run(line, check=True, capture_output=True, text=True)
      found[name] = json.loads(done.stdout.splitlines()[-1])
  rows = [
    goal_row("4k", found["4k"]["bytes"] / 1e6, "<= 500", unit="MB", **found["4k"]),
    goal_row("far", found["far"]["cpu_seconds"], "<= 1", unit="s", **found["far"]),
  ]
  print(table(rows))
  write_rows(_NAME, rows, "python -m benchmarks.cpu.footage")


if __name__ == "__main__":
  _CASE = flags.DEFINE_enum("case", None, list(CASES), "Measure one case in this process.")
  _FILE = flags.DEFINE_string("file", None, "The film of the case.")
  cli.run(main)
