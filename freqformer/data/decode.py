"""Chosen frames of a video file, cropped and resized. Counts frames itself: containers often lie about them."""

import pathlib

import av
import numpy as np
from PIL import Image

# A start later than this seeks to a key frame, where the file's timestamps allow it; before it, decoding through is as fast.
SEEK_AFTER = 300


class BrokenClip(Exception):
  """A clip that cannot be used: `.name` says which, `.reason` why."""

  def __init__(self, name: str, reason: str):
    super().__init__(f"{name}: {reason}")
    self.name, self.reason = name, reason

  def __reduce__(self):
    return BrokenClip, (self.name, self.reason)


class VideoFile:
  """One open file; use it in a `with`, for the memory of unclosed containers grows (`av` frees it late).

  Attributes:
    length: frames, counted from packets; corrected by `read` when fewer can be decoded.
    size: (rows, cols) as displayed.
  """

  def __init__(self, path: str | pathlib.Path, name: str | None = None):
    """Opens and counts. Raises BrokenClip for a file that is no video."""
    self.name = name or str(path)
    self._path = str(path)
    self._container = self._open()
    try:
      stream = self._container.streams.video[0]
      packets = [p.pts for p in self._container.demux(stream) if p.size]
      self.length = len(packets)
      self._rotation = 0
      rows, cols = stream.codec_context.height, stream.codec_context.width
      if not self.length or not rows or not cols:
        raise BrokenClip(self.name, "it holds no video frame")
      self.size = (rows, cols)
      seekable = None not in packets and len(set(packets)) == self.length
      self._times = sorted(packets) if seekable else None
      self._probe()
    except BaseException as error:
      self._container.close()
      if isinstance(error, BrokenClip):
        raise
      if isinstance(error, av.FFmpegError | IndexError):
        raise BrokenClip(self.name, f"it is not a readable video ({_reason(error)})") from error
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._container.close()

  def read(self, indices: list[int]) -> list[np.ndarray] | None:
    """The frames at these ascending indices (repeats allowed), uint8 `[rows, cols, 3]`, before crop and resize.

    Returns None when the file ends before the last index: `length` then is the number of frames that do decode.

    Raises:
      BrokenClip: nothing can be decoded.
    """
    frames = (
      self._read_from(indices, seek=True) if self._times and indices[0] > SEEK_AFTER else None
    )
    return frames or self._read_from(indices, seek=False)

  def _read_from(self, indices, seek):
    wanted, found, count = set(indices), {}, 0
    try:
      for index, frame in self._decode(self._times[indices[0]] if seek else None):
        count = index + 1
        if index in wanted:
          found[index] = self._upright(frame)
        if index >= indices[-1]:
          break
    except av.FFmpegError as error:
      if not count:
        raise BrokenClip(self.name, f"no frame can be decoded ({_reason(error)})") from error
    if wanted <= found.keys():
      return [found[i] for i in indices]
    if not seek:
      if not count:
        raise BrokenClip(self.name, "no frame can be decoded")
      self.length = count
    return None

  def _decode(self, seek_to):
    """Yields (index, frame) from the start, or from the key frame before a timestamp."""
    self._container.close()  # A fresh container: a decoder that has met the end of a file stays there.
    self._container = self._open()
    stream = self._container.streams.video[0]
    stream.thread_type = "NONE"  # One thread per clip; clips are decoded side by side.
    if seek_to is None:
      yield from enumerate(self._container.decode(stream))
      return
    self._container.seek(seek_to, stream=stream, backward=True)
    ranks = {pts: i for i, pts in enumerate(self._times)}
    for frame in self._container.decode(stream):
      if frame.pts not in ranks:
        return  # The decoder's times are not the container's: read from the start instead.
      yield ranks[frame.pts], frame

  def _open(self):
    try:
      return av.open(self._path)
    except (av.FFmpegError, OSError) as error:
      raise BrokenClip(self.name, f"it cannot be opened as a video ({_reason(error)})") from error

  def _probe(self):
    """The true size and rotation, from the first frame that decodes."""
    try:
      frame = next((f for _, f in self._decode(None)), None)
    except av.FFmpegError as error:
      raise BrokenClip(self.name, f"no frame can be decoded ({_reason(error)})") from error
    if frame is None:
      raise BrokenClip(self.name, "no frame can be decoded")
    self._rotation = round(frame.rotation / 90) % 4
    self.size = (frame.width, frame.height) if self._rotation % 2 else (frame.height, frame.width)

  def _upright(self, frame) -> np.ndarray:
    """RGB as displayed: phones store the turn as metadata."""
    return np.rot90(frame.to_ndarray(format="rgb24"), self._rotation)


def crop_resize(
  frame: np.ndarray, box: tuple[float, float, float, float], resolution: tuple[int, int]
) -> np.ndarray:
  """The box (top, left, bottom, right as fractions) of a frame at `resolution` (rows, cols): antialiased bilinear, uint8."""
  rows, cols = frame.shape[:2]
  top, left, bottom, right = box
  pixels = (left * cols, top * rows, min(right * cols, cols), min(bottom * rows, rows))
  image = Image.fromarray(np.ascontiguousarray(frame))
  return np.asarray(image.resize(resolution[::-1], Image.Resampling.BILINEAR, box=pixels))


def _reason(error) -> str:
  """The library's own words, without number, path and line breaks."""
  return getattr(error, "strerror", None) or str(error).splitlines()[0] or type(error).__name__
