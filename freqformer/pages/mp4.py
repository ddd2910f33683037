"""Writes videos for people: mp4 files, grids of videos, pictures of frames.

A video is uint8 `[t, y, x, 3]` throughout.
"""

import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from freqformer.config import ConfigError

_LABEL_ROWS = 14  # pixels of a line of labels: PIL's built-in font at size 10
_GAP = 2  # white pixels between pictures


def check_folder(path) -> pathlib.Path:
  """Returns `path` if it is a folder or can become one; it is not made yet.

  Raises:
    ConfigError: it, or what should hold it, is a file.
  """
  path = pathlib.Path(path)
  there = next((p for p in (path, *path.parents) if p.exists()), path)
  if there.exists() and not there.is_dir():
    raise ConfigError(
      f"{path} cannot be a folder: {there} is a file; name another, or move it away."
    )
  return path


def write_mp4(path, video: np.ndarray, fps: float = 25):
  """Writes a video as H.264 yuv420p, which every browser plays; makes the folder if it is missing.

  PyAV without libx264 writes MPEG-4 part 2. Odd heights and widths are made even by repeating the
  last row or column, because 4:2:0 chroma needs pairs.

  Raises:
    ValueError: the video is not uint8 `[t, y, x, 3]` with at least one frame, or fps is no frame
      rate.
  """
  if not 0 < fps < float("inf"):
    raise ValueError(f"a video's frame rate must be a finite number above 0, got {fps=}.")
  video = _checked(video)
  odd = [(0, video.shape[axis] % 2) for axis in (1, 2)]
  video = np.pad(video, ((0, 0), *odd, (0, 0)), mode="edge")
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
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
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def grid(
  videos: Sequence[np.ndarray], columns: int, labels: Sequence[str] | None = None
) -> np.ndarray:
  """Places videos side by side, in rows of `columns`, on white.

  Args:
    videos: `[n, t, y, x, 3]`, or n videos of one height and width; shorter ones hold their last
      frame.
    columns: videos per row, at least 1; the last row may be short.
    labels: n texts written above the videos, cut at their width; None leaves no space for labels.

  Returns:
    One video, uint8 `[t, rows, cols, 3]`.

  Raises:
    ValueError: there is no video, sizes differ, or labels and videos are not equally many.
  """
  videos = [_checked(video) for video in videos]
  if not videos or columns < 1:
    raise ValueError(
      f"grid needs at least one video and column, got {len(videos)} videos and {columns=}."
    )
  sizes = sorted({video.shape[1:3] for video in videos})
  if len(sizes) > 1:
    raise ValueError(f"grid needs videos of one size, got {sizes}.")
  if labels is not None and len(labels) != len(videos):
    raise ValueError(f"grid got {len(labels)} labels for {len(videos)} videos.")
  frames = max(map(len, videos))
  ((y, x),) = sizes
  head = _LABEL_ROWS if labels is not None else 0
  columns = min(columns, len(videos))
  height = -(-len(videos) // columns) * (y + head + _GAP) - _GAP
  width = columns * (x + _GAP) - _GAP
  out = np.full((frames, height, width, 3), 255, np.uint8)
  for i, video in enumerate(videos):
    top = i // columns * (y + head + _GAP)
    left = i % columns * (x + _GAP)
    if head:
      out[:, top : top + head, left : left + x] = _text(str(labels[i]), x)
    place = out[:, top + head : top + head + y, left : left + x]
    place[: len(video)] = video
    place[len(video) :] = video[-1]
  return out


def grid_png(path, videos: Sequence[np.ndarray], labels: Sequence[str], frames: int = 8):
  """Writes a picture with one row per video and one column per frame.

  Args:
    path: the .png file.
    videos: `[n, t, y, x, 3]`, or n videos of one height and width.
    labels: n texts, written above the rows.
    frames: columns, evenly spaced in each video; fewer if the shortest video has fewer.
  """
  videos = [_checked(video) for video in videos]
  frames = min(frames, *map(len, videos))
  strips = []
  for video in videos:
    picks = np.linspace(0, len(video) - 1, frames).round().astype(int)
    gap = np.full((video.shape[1], _GAP, 3), 255, np.uint8)
    parts = [part for i in picks for part in (video[i], gap)]
    strips.append(np.concatenate(parts[:-1], axis=1)[None])
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(grid(strips, 1, labels)[0]).save(path)


def _checked(video) -> np.ndarray:
  video = np.asarray(video)
  if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
    raise ValueError(
      "a video is uint8 [t, y, x, 3] with at least one frame; got "
      f"{video.dtype} {list(video.shape)}."
    )
  return video


def _text(text: str, width: int) -> np.ndarray:
  """Returns a text black on white, uint8 `[_LABEL_ROWS, width, 3]`."""
  image = Image.new("RGB", (width, _LABEL_ROWS), "white")
  ImageDraw.Draw(image).text((1, 1), text, fill="black", font=ImageFont.load_default(size=10))
  return np.asarray(image)
