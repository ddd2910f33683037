"""Writes videos for people: mp4 files, grids of videos, pictures of frames."""

import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LABEL_ROWS = 14  # pixels of a line of labels: PIL's built-in font at size 10
_GAP = 2  # white pixels between pictures


def write_mp4(path, video: np.ndarray, fps: float = 25):
  """Writes uint8 `[t, y, x, 3]` as H.264 yuv420p, which every browser plays; makes the folder.

  PyAV without libx264 writes MPEG-4 part 2. Odd heights and widths are made even by repeating the
  last row or column, because 4:2:0 chroma needs pairs.

  Raises:
    OSError: the file cannot be written, or nothing encodes it.
  """
  odd = [(0, video.shape[axis] % 2) for axis in (1, 2)]
  video = np.pad(video, ((0, 0), *odd, (0, 0)), mode="edge")
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
  try:
    _encode(path, video, fps, codec)
  except av.FFmpegError as error:  # some of them are no OSError
    raise OSError(f"{path} cannot be written: {error}") from error


def _encode(path: pathlib.Path, video: np.ndarray, fps: float, codec: str):
  # `faststart` puts the index first: a browser can play the file before it has all of it.
  with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
    # An exact rate: 25 / 3 frames per second must not become 8.
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
    stream.height = video.shape[1]
    stream.width = video.shape[2]
    stream.pix_fmt = "yuv420p"
    if codec == "libx264":
      stream.options = {"crf": "16", "preset": "medium"}
    else:
      stream.options = {"qmin": "2", "qmax": "5"}
      stream.bit_rate = 4_000_000
    for image in video:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())


def grid(videos: np.ndarray, columns: int) -> np.ndarray:
  """Places videos side by side on white: uint8 `[n, t, y, x, 3] -> [t, rows, cols, 3]`."""
  n, t, y, x, _ = videos.shape
  rows = -(-n // columns)
  out = np.full((rows * columns, t, y + _GAP, x + _GAP, 3), 255, np.uint8)
  out[:n, :, :y, :x] = videos
  out = out.reshape(rows, columns, *out.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
  return out.reshape(t, rows * (y + _GAP), columns * (x + _GAP), 3)[:, :-_GAP, :-_GAP]


def grid_png(path, videos: np.ndarray, labels: Sequence[str], frames: int = 8):
  """Writes a row per video `[n, t, y, x, 3]`, under its label, of at most so many frames of it."""
  t = videos.shape[1]
  picks = np.linspace(0, t - 1, min(frames, t)).round().astype(int)
  rows = []
  for video, label in zip(videos, labels, strict=True):
    strip = grid(video[picks][:, None], len(picks))[0]
    image = Image.new("RGB", (strip.shape[1], _LABEL_ROWS), "white")
    ImageDraw.Draw(image).text((1, 1), label, fill="black", font=ImageFont.load_default(size=10))
    rows.append(np.concatenate([image, strip]))
  Image.fromarray(grid(np.stack(rows)[:, None], 1)[0]).save(path)
