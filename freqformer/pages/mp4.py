"""Videos for people to look at: .mp4 files, grids of videos, rows of frames. Video is uint8 `[t, y, x, 3]` throughout."""

import pathlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from freqformer.config import ConfigError

_LABEL_ROWS = 14  # Height of a line of labels in pixels; fits PIL's built-in font at size 10.
_GAP = 2  # White pixels between pictures.


def check_folder(path) -> pathlib.Path:
  """`path`, if it is a folder or can become one; it is not made yet.

  Raises:
    ConfigError: if it, or what should hold it, is a file.
  """
  path = pathlib.Path(path)
  there = next((p for p in (path, *path.parents) if p.exists()), path)
  if there.exists() and not there.is_dir():
    raise ConfigError(
      f"{path} cannot be a folder: {there} is a file; name another, or move it away."
    )
  return path


def write_mp4(path, video: np.ndarray, fps: float = 25) -> None:
  """Writes `video` as H.264 yuv420p, which every browser plays, or as MPEG-4 part 2 where PyAV was built without libx264.

  Odd heights and widths are made even by repeating the last row or column, because 4:2:0 chroma needs pairs. The folder is
  made if it is missing.

  Raises:
    ValueError: if `video` is not uint8 `[t, y, x, 3]` with at least one frame, or fps is no frame rate.
  """
  if not 0 < fps < float("inf"):
    raise ValueError(f"a video's frame rate must be a finite number above 0, got {fps=}.")
  video = _even(_checked(video))
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
  # `fast start` puts the index first: a browser can play the file before it has all of it.
  with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
    stream = container.add_stream(codec, rate=_rate(fps))
    stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
    stream.options = (
      {"crf": "16", "preset": "medium"} if codec == "libx264" else {"qmin": "2", "qmax": "5"}
    )
    if codec == "mpeg4":
      stream.bit_rate = 4_000_000
    for image in video:
      container.mux(
        stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
      )
    container.mux(stream.encode())


def grid(videos, columns: int, labels=None) -> np.ndarray:
  """Videos side by side in rows of `columns`: one video uint8 `[t, rows, cols, 3]` on white.

  Args:
    videos: array `[n, t, y, x, 3]` or a list of n videos of one height and width; shorter ones hold their last frame.
    columns: videos per row, at least 1; the last row may be short.
    labels: n strings written above the videos, cut at their width; None: no space for labels.

  Raises:
    ValueError: if there is no video, sizes differ, or labels and videos are not equally many.
  """
  videos = [_checked(v) for v in videos]
  if not videos or columns < 1:
    raise ValueError(
      f"grid needs at least one video and column, got {len(videos)} videos and {columns=}."
    )
  if len({v.shape[1:] for v in videos}) > 1:
    raise ValueError(
      f"grid needs videos of one size, got {sorted({v.shape[1:3] for v in videos})}."
    )
  if labels is not None and len(labels) != len(videos):
    raise ValueError(f"grid got {len(labels)} labels for {len(videos)} videos.")
  frames, (y, x) = max(len(v) for v in videos), videos[0].shape[1:3]
  head = _LABEL_ROWS if labels is not None else 0
  columns = min(columns, len(videos))
  rows = -(-len(videos) // columns)
  out = np.full(
    (frames, rows * (y + head + _GAP) - _GAP, columns * (x + _GAP) - _GAP, 3), 255, np.uint8
  )
  for i, video in enumerate(videos):
    top, left = i // columns * (y + head + _GAP), i % columns * (x + _GAP)
    if head:
      out[:, top : top + head, left : left + x] = _text(str(labels[i]), x)
    out[: len(video), top + head : top + head + y, left : left + x] = video
    out[len(video) :, top + head : top + head + y, left : left + x] = video[-1]
  return out


def write_png_strip(path, video: np.ndarray, frames: int = 8) -> None:
  """Writes `frames` evenly spaced frames of a video side by side, first and last included; fewer if it has fewer."""
  _save(path, _strip(_checked(video), frames))


def grid_png(path, videos, labels=None, frames: int = 8) -> None:
  """Writes a picture with one row per video and one column per frame, labels above the rows.

  Args:
    path: the .png file.
    videos: array `[n, t, y, x, 3]` or a list of n videos of one height and width.
    labels: n strings or None.
    frames: columns, evenly spaced in each video; fewer if the shortest video has fewer.
  """
  videos = [_checked(v) for v in videos]
  frames = min([frames, *map(len, videos)])
  strips = [_strip(v, frames)[None] for v in videos]
  _save(path, grid(strips, 1, labels)[0])


def _checked(video) -> np.ndarray:
  video = np.asarray(video)
  if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
    raise ValueError(
      f"a video is uint8 [t, y, x, 3] with at least one frame; got {video.dtype} {list(video.shape)}."
    )
  return video


def _even(video):
  return np.pad(
    video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge"
  )


def _rate(fps):
  """PyAV takes whole or exact rates: 25 / 3 frames per second must not become 8."""
  return Fraction(fps).limit_denominator(1001)


def _strip(video, frames: int):
  picks = np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)
  gap = np.full((video.shape[1], _GAP, 3), 255, np.uint8)
  return np.concatenate([part for i in picks for part in (video[i], gap)][:-1], axis=1)


def _text(text: str, width: int) -> np.ndarray:
  """Black on white, uint8 `[_LABEL_ROWS, width, 3]`."""
  image = Image.new("RGB", (width, _LABEL_ROWS), "white")
  ImageDraw.Draw(image).text((1, 1), text, fill="black", font=ImageFont.load_default(size=10))
  return np.asarray(image)


def _save(path, image: np.ndarray) -> None:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)
