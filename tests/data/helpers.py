"""Tiny clips and data sets for tests."""

import pathlib

import av
import numpy as np

from freqformer.data.codec import CodecConfig
from freqformer.data.protocol import DataConfig
from freqformer.data.render import write_avi
from freqformer.pages.mp4 import write_mp4


def moving_square(frames: int = 20, rows: int = 24, cols: int = 32, seed: int = 0) -> np.ndarray:
  """uint8 `[frames, rows, cols, 3]`: a ramp that brightens rightwards, a square that moves down."""
  rng = np.random.default_rng(seed)
  video = np.empty((frames, rows, cols, 3), np.uint8)
  video[:] = np.linspace(20, 200, cols)[None, None, :, None] * rng.uniform(0.7, 1, 3)
  for t in range(frames):
    top = t % (rows - 8)
    video[t, top : top + 8, 4:12] = 240
  return video


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """The mean over frames of two videos' PSNR in dB; equal frames have 100."""
  error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, axis=(-3, -2, -1))
  return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 255.0**2 * 1e-10))))


def write_clip(path: pathlib.Path, video: np.ndarray) -> pathlib.Path:
  """Writes an .avi as UCF-101 has them, or the packets of an .mp4 in whatever the suffix says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".avi":
    write_avi(path, video)
    return path
  write_mp4(path.with_suffix(".mp4"), video)
  if path.suffix != ".mp4":
    with av.open(str(path.with_suffix(".mp4"))) as source, av.open(str(path), "w") as target:
      stream = target.add_stream_from_template(source.streams.video[0])
      for packet in source.demux(video=0):
        if packet.size:
          packet.stream = stream
          target.mux(packet)
  return path


def config(root, cache, **changes) -> DataConfig:
  """A small folder config."""
  values = dict(source="folder", root=str(root), cache=str(cache), workers=2)
  values |= dict(resolution=(16, 24), frames=4, stride=2)
  values["codec"] = CodecConfig(factor=(2, 4, 4), channels=24)
  return DataConfig(**(values | changes))


def write_folder(
  root: pathlib.Path, classes=("cat", "dog"), clips: int = 3, frames: int = 20
) -> pathlib.Path:
  """`root/<class>/<i>.avi`."""
  for c, name in enumerate(classes):
    for i in range(clips):
      write_clip(root / name / f"{i}.avi", moving_square(frames, seed=10 * c + i))
  return root


# Ids as in the official list: the order is not the one that sorting gives.
UCF_CLASSES = ("Hammering", "HammerThrow", "HandstandPushups", "JumpingJack", "JumpRope")


def write_ucf101(root: pathlib.Path, frames: int = 20) -> pathlib.Path:
  """Two training clips and a test clip per class; handstand files have their official spelling."""
  lists = root / "ucfTrainTestlist"
  lists.mkdir(parents=True)
  train, test = [], []
  for i, name in enumerate(UCF_CLASSES, 1):
    for group in (1, 2, 8):
      file = f"{name}/v_{name.replace('Handstand', 'HandStand')}_g{group:02d}_c01.avi"
      write_clip(root / "UCF-101" / file, moving_square(frames, seed=i))
      (test if group == 1 else train).append(file if group == 1 else f"{file} {i}")
  (lists / "classInd.txt").write_text(
    "".join(f"{i} {name}\r\n" for i, name in enumerate(UCF_CLASSES, 1))
  )
  (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
  (lists / "testlist01.txt").write_text("\r\n".join(test) + "\r\n")
  return root
