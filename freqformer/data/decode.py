"""From video files to the pixels of a clip's views. Counts frames itself: containers often lie."""

import bisect
import collections
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence

import av
import numpy as np
from absl import logging
from av.sidedata.sidedata import Type as SideData
from PIL import Image

from freqformer.data.files import address
from freqformer.data.protocol import BrokenClip, Clip, DataConfig, Footage, draw_view

# Frames that a jump to a key frame must save: opening the file anew costs about as many.
SEEK_AFTER = 60
_ATTEMPTS = 3  # to find a number of frames that decodes
_UNKNOWN_RATE = 25.0  # frames per second of a file that tells none
_HDR = (16, 18)  # transfer functions PQ and HLG (ITU-T H.273, table 3)
# What is wrong with a clip that is used all the same, in the words of a report.
HDR = "high dynamic range without tone mapping: colours are pale"
INTERLACED = "interlaced: combs where something moves"
SMALL = "smaller than the views, so enlarged"
SLOW = "fewer frames per second than data.fps, so some repeat"


def decode_clip(config: DataConfig, split: str, clip: Clip) -> tuple[np.ndarray, dict]:
  """Draws the views of a clip, then decodes, crops and mirrors them.

  Every frame is cut and resized when it comes, so that memory does not grow with its size.

  Returns:
    Pixels uint8 `[views, frames, rows, cols, 3]`, and the manifest's `frames` (those that decode),
    `fps`, `views`, `size` ((rows, cols) before the crop) and `notes`.

  Raises:
    BrokenClip: it cannot be decoded, or `config.short` or `config.damaged` leaves it out.
  """
  with VideoFile(address(clip.path), clip.key) as video:
    # Views are drawn again when fewer frames decode than the container promised.
    for _ in range(_ATTEMPTS):
      footage = video.footage
      views = [
        draw_view(config, split, clip.key, i, footage) for i in range(config.views_of(split))
      ]
      pixels = _views(video, views, config.resolution)
      if video.damaged and config.damaged == "skip":
        raise BrokenClip(clip.key, video.damage)
      if pixels is not None:
        break
    else:
      raise BrokenClip(clip.key, "it decodes to another number of frames each time")
  drawn = {
    "frames": video.length,
    "fps": round(footage.fps, 3),
    "views": [dataclasses.asdict(view) for view in views],
    "size": video.size,
    "notes": [video.damage] if video.damaged else [],
  }
  drawn["notes"] += video.notes
  if any(_rows(view, video.size) < config.resolution[0] for view in views):
    drawn["notes"].append(SMALL)
  if config.fps > 1.01 * footage.fps:
    drawn["notes"].append(SLOW)
  return pixels, drawn


def _views(video: "VideoFile", views: list, resolution: tuple[int, int]) -> np.ndarray | None:
  """Returns the pixels of views, or None if the file has fewer frames than they were drawn from."""
  uses = collections.defaultdict(list)
  for number, view in enumerate(views):
    for place, index in enumerate(view.frames):
      uses[index].append((number, place))
  pixels = np.empty((len(views), len(views[0].frames), *resolution, 3), np.uint8)
  seen = 0
  for index, frame in video.frames(sorted(uses)):
    seen += 1
    for number, place in uses[index]:
      cut = crop_resize(frame, views[number].box, resolution)
      # Pixels are mirrored: mirrored latents are not those of a mirrored video.
      pixels[number, place] = cut[:, ::-1] if views[number].flip else cut
  return pixels if seen == len(uses) else None


def _rows(view, size: tuple[int, int]) -> float:
  """Returns the source rows that a view shows."""
  return round((view.box[2] - view.box[0]) * size[0], 3)


class VideoFile:
  """One open file. Use it in a `with`: `av` frees unclosed containers late, and memory grows.

  Frames count in the order of display. A frame that the decoder calls corrupt, or of another size
  than the first one, does not count, nor does a packet that cannot be decoded.

  Attributes:
    length: frames, counted from packets; corrected when fewer can be decoded.
    size: (rows, cols) as displayed: turned and mirrored, with square pixels.
    damaged: frames and packets so far that do not count.
    notes: what is odd about its pictures.
  """

  def __init__(self, path: str | pathlib.Path, name: str | None = None):
    """Opens the file and counts its frames; raises BrokenClip if it is no video."""
    self.name = name or str(path)
    self.damaged = 0
    self.notes = []
    self._path = str(path)
    self._shape = None  # of stored frames, by the first one
    self._container = self._open()
    try:
      if not self._container.streams.video:
        raise BrokenClip(self.name, "it holds no video, only other streams")
      stream = self._container.streams.video[0]
      packets = [(packet.pts, packet.is_keyframe) for packet in self._packets() if packet.size]
      if not packets:
        raise BrokenClip(self.name, "it holds no video frame")
      self.length = self._promised = len(packets)
      self._rate = float(stream.average_rate or stream.guessed_rate or _UNKNOWN_RATE)
      stamps = {pts for pts, _ in packets}
      seekable = None not in stamps and len(stamps) == self.length
      self._stamps = sorted(stamps) if seekable else None
      self._tick = float(stream.time_base or 0)
      ranks = {pts: rank for rank, pts in enumerate(self._stamps or [])}
      self._keys = sorted(ranks[pts] for pts, is_key in packets if is_key and pts in ranks)
      (first,) = self.read([0]) or (None,)
      self.size = self._displayed(first)
    except BaseException as error:
      self._container.close()
      if isinstance(error, av.FFmpegError):
        raise BrokenClip(self.name, f"it is not a readable video ({_reason(error)})") from error
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._container.close()

  @property
  def damage(self) -> str:
    """The sentence about frames that do not count."""
    return f"damaged: at least {self.damaged} of {self._promised} frames cannot be used"

  @property
  def footage(self) -> Footage:
    """Size and times of the frames, from which views are drawn."""
    times = [i / self._rate for i in range(self.length)]
    if self._stamps and self._tick and not self.damaged and len(self._stamps) == self.length:
      times = [(stamp - self._stamps[0]) * self._tick for stamp in self._stamps]
    return Footage(self.size, tuple(times))

  def read(self, indices: Sequence[int]) -> list[np.ndarray] | None:
    """Returns the frames at ascending indices, uint8 `[rows, cols, 3]`; repeats are allowed.

    None if the file has fewer: `length` is then the number of frames that decode.

    Raises:
      BrokenClip: nothing can be decoded.
    """
    for _ in range(_ATTEMPTS):
      found = dict(self.frames(sorted(set(indices))))
      if len(found) == len(set(indices)):
        return [found[i] for i in indices]
      if indices[-1] >= self.length:
        return None
    return None

  def frames(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index, frame) for ascending indices, each once; jumps to key frames in long gaps.

    Ends early where the file does not keep its promise, with `length` corrected: indices then mean
    other frames than before, and views must be drawn again.

    Raises:
      BrokenClip: nothing can be decoded.
    """
    wanted = collections.deque(indices)
    position = None  # of the frame that the decoder gave last
    while wanted:
      key = self._key_before(wanted[0])
      jump = key if key - (-1 if position is None else position) > SEEK_AFTER else None
      if position is None or jump is not None:
        decoder = self._decode(jump)
      for position, frame in decoder:
        if position < wanted[0]:
          continue
        if position > wanted[0]:  # the key frame was not where the container said
          self._stamps = None
          return
        yield wanted.popleft(), self._upright(frame)
        break
      else:
        return

  def _key_before(self, index: int) -> int:
    """Returns the place of the last key frame up to a frame, 0 where none is known."""
    if not self._stamps:
      return 0
    place = bisect.bisect_right(self._keys, index)
    return self._keys[place - 1] if place else 0

  def _decode(self, key: int | None):
    """Yields (index, frame) from the start, or from a key frame; the end corrects `length`."""
    # A fresh container: a decoder that has met the end of a file stays there.
    self._container.close()
    self._container = self._open()
    stream = self._container.streams.video[0]
    stream.thread_type = "NONE"  # one thread per clip; clips are decoded side by side
    ranks = {}
    if key is not None:
      self._container.seek(self._stamps[key], stream=stream, backward=True)
      ranks = {pts: i for i, pts in enumerate(self._stamps)}
    count = 0
    damaged = 0
    failure = None
    for packet in self._packets():
      try:
        found = packet.decode()
      except av.FFmpegError as error:
        failure = error
        damaged += 1
        continue
      for frame in found:
        if not self._counts(frame):
          damaged += 1
        elif key is None:
          yield count, frame
          count += 1
        elif frame.pts in ranks:
          yield ranks[frame.pts], frame
        else:
          damaged += 1  # the decoder's times are not the container's
      if damaged:
        self._stamps = None  # places by time and by count differ: never jump again
        if key is not None:
          return
        self.damaged = max(self.damaged, damaged)
    if key is not None:
      self._stamps = None
      return
    if not count:
      reason = f" ({_reason(failure)})" if failure else ""
      raise BrokenClip(self.name, f"no frame can be decoded{reason}") from failure
    if count != self.length:
      self.length = count
      self._stamps = None

  def _packets(self) -> Iterator:
    """Yields the packets of the first video; one that cannot be read is the last."""
    try:
      yield from self._container.demux(self._container.streams.video[0])
    except av.FFmpegError as error:
      logging.debug("%s ends with: %s", self.name, error)

  def _counts(self, frame) -> bool:
    """Tells whether a decoded frame is whole; the first one that is sets the size."""
    shape = (frame.height, frame.width)
    if frame.is_corrupt or shape != (self._shape or shape):
      return False
    if self._shape is None:
      self._shape = shape
      self.notes += [HDR] if frame.color_trc in _HDR else []
      self.notes += [INTERLACED] if frame.interlaced_frame else []
    return True

  def _open(self):
    try:
      return av.open(self._path)
    except (av.FFmpegError, OSError) as error:
      raise BrokenClip(self.name, f"it cannot be opened as a video ({_reason(error)})") from error

  def _displayed(self, frame: np.ndarray | None) -> tuple[int, int]:
    """Returns (rows, cols) of an upright frame with square pixels."""
    if frame is None:
      raise BrokenClip(self.name, "no frame can be decoded")
    rows, cols = frame.shape[:2]
    stream = self._container.streams.video[0]
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    turned = (rows, cols) != self._shape and (cols, rows) == self._shape
    if turned:
      aspect = 1 / aspect
    return rows, max(round(cols * aspect), 1)

  def _upright(self, frame) -> np.ndarray:
    """Returns RGB as displayed but for the shape of pixels: phones store turns as metadata."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
      return pixels
    # x' = a x + c y, y' = b x + d y; libavutil/display.h has the order of the nine numbers.
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
      pixels = pixels.transpose(1, 0, 2)
      a, d = c, b
    return pixels[:: int(math.copysign(1, d)), :: int(math.copysign(1, a))]


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
