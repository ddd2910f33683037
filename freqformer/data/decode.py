"""From video files to the pixels of a clip's views. Counts frames itself: containers often lie."""

import dataclasses
import pathlib

import av
import numpy as np
from PIL import Image

from freqformer.data.protocol import BrokenClip, Clip, DataConfig, draw_view

# Frames: a later start seeks to a key frame, where the file's timestamps allow it; an earlier one
# is reached as fast by decoding through.
SEEK_AFTER = 300
_ATTEMPTS = 3  # to find a number of frames that decodes


def decode_clip(config: DataConfig, split: str, clip: Clip) -> tuple[np.ndarray, dict]:
  """Draws the views of a clip, then decodes, crops and mirrors them.

  Returns:
    Pixels uint8 `[views, frames, rows, cols, 3]`, and the manifest's `frames` (those that decode),
    `views` and `size` ((rows, cols) before the crop).

  Raises:
    BrokenClip: it cannot be decoded, or `config.short` leaves it out.
  """
  with VideoFile(clip.path, clip.key) as video:
    # Views are drawn again when fewer frames decode than the container promised.
    for _ in range(_ATTEMPTS):
      views = [
        draw_view(config, split, clip.key, i, video.length, video.size)
        for i in range(config.views_of(split))
      ]
      chosen = [view.indices(config.frames, video.length) for view in views]
      wanted = sorted({index for indices in chosen for index in indices})
      found = video.read(wanted)
      if found is not None:
        break
    else:
      raise BrokenClip(clip.key, "it decodes to another number of frames each time")
  frames = dict(zip(wanted, found, strict=True))
  pixels = []
  for view, indices in zip(views, chosen, strict=True):
    cut = np.stack([crop_resize(frames[i], view.box, config.resolution) for i in indices])
    # Pixels are mirrored: mirrored latents are not those of a mirrored video.
    pixels.append(cut[:, :, ::-1] if view.flip else cut)
  drawn = [dataclasses.asdict(view) for view in views]
  return np.stack(pixels), {"frames": video.length, "views": drawn, "size": video.size}


class VideoFile:
  """One open file. Use it in a `with`: `av` frees unclosed containers late, and memory grows.

  Attributes:
    length: frames, counted from packets; corrected by `read` when fewer can be decoded.
    size: (rows, cols) as displayed.
  """

  def __init__(self, path: str | pathlib.Path, name: str | None = None):
    """Opens the file and counts its frames; raises BrokenClip if it is no video."""
    self.name = name or str(path)
    self._path = str(path)
    self._rotation = None  # quarter turns, once a frame has told them
    self._container = self._open()
    try:
      stream = self._container.streams.video[0]
      packets = [packet.pts for packet in self._container.demux(stream) if packet.size]
      self.length = len(packets)
      if not packets:
        raise BrokenClip(self.name, "it holds no video frame")
      seekable = None not in packets and len(set(packets)) == self.length
      self._times = sorted(packets) if seekable else None
      (first,) = self.read([0])
      self.size = first.shape[:2]
    except BaseException as error:
      self._container.close()
      if isinstance(error, av.FFmpegError | IndexError):
        raise BrokenClip(self.name, f"it is not a readable video ({_reason(error)})") from error
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._container.close()

  def read(self, indices: list[int]) -> list[np.ndarray] | None:
    """Returns the frames at ascending indices, uint8 `[rows, cols, 3]`; repeats are allowed.

    None if the file ends before the last index: `length` is then the number of frames that decode.

    Raises:
      BrokenClip: nothing can be decoded.
    """
    frames = None
    if self._times and indices[0] > SEEK_AFTER:
      frames = self._read_from(indices, seek=True)
    return frames or self._read_from(indices, seek=False)

  def _read_from(self, indices, seek: bool):
    wanted = set(indices)
    found = {}
    count = 0
    failure = None
    try:
      for index, frame in self._decode(self._times[indices[0]] if seek else None):
        count = index + 1
        if index in wanted:
          found[index] = self._upright(frame)
        if index >= indices[-1]:
          break
    except av.FFmpegError as error:
      failure = error
    if wanted <= found.keys():
      return [found[i] for i in indices]
    if not seek and not count:
      reason = f" ({_reason(failure)})" if failure else ""
      raise BrokenClip(self.name, f"no frame can be decoded{reason}") from failure
    if not seek:
      self.length = count
    return None

  def _decode(self, seek_to: int | None):
    """Yields (index, frame) from the start, or from the key frame before a timestamp."""
    # A fresh container: a decoder that has met the end of a file stays there.
    self._container.close()
    self._container = self._open()
    stream = self._container.streams.video[0]
    stream.thread_type = "NONE"  # one thread per clip; clips are decoded side by side
    if seek_to is None:
      yield from enumerate(self._container.decode(stream))
      return
    self._container.seek(seek_to, stream=stream, backward=True)
    ranks = {pts: i for i, pts in enumerate(self._times)}
    for frame in self._container.decode(stream):
      if frame.pts not in ranks:
        return  # the decoder's times are not the container's: read from the start instead
      yield ranks[frame.pts], frame

  def _open(self):
    try:
      return av.open(self._path)
    except (av.FFmpegError, OSError) as error:
      raise BrokenClip(self.name, f"it cannot be opened as a video ({_reason(error)})") from error

  def _upright(self, frame) -> np.ndarray:
    """Returns RGB as displayed: phones store the turn as metadata."""
    if self._rotation is None:
      self._rotation = round(frame.rotation / 90) % 4
    return np.rot90(frame.to_ndarray(format="rgb24"), self._rotation)


def crop_resize(
  frame: np.ndarray, box: tuple[float, float, float, float], resolution: tuple[int, int]
) -> np.ndarray:
  """Cuts a box from a frame and resizes it: antialiased bilinear, uint8.

  Args:
    box: (top, left, bottom, right) as fractions of the frame.
    resolution: (rows, cols) of the result.
  """
  rows, cols = frame.shape[:2]
  top, left, bottom, right = box
  pixels = (left * cols, top * rows, min(right * cols, cols), min(bottom * rows, rows))
  image = Image.fromarray(np.ascontiguousarray(frame))
  return np.asarray(image.resize(resolution[::-1], Image.Resampling.BILINEAR, box=pixels))


def _reason(error) -> str:
  """Returns the library's own words, without number, path and line breaks."""
  return getattr(error, "strerror", None) or str(error).splitlines()[0] or type(error).__name__
