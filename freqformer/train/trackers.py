"""Trackers, which show a run's figures where people look: `train.trackers`.

`metrics.jsonl` is written in any case. The others are optional packages: one that is missing, or
fails, is told once, and training goes on without it.
"""

import dataclasses
import io
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

JSONL = "jsonl"


class TensorBoard:
  """Event files in `<workdir>/tensorboard`, by the package tensorboardX.

  Videos are animated GIFs, as in TensorBoard's own videos; its `add_video` would need a further
  package to write them.
  """

  def __init__(self):
    import tensorboardX
    from tensorboardX.proto import summary_pb2

    self.errors: tuple[type[Exception], ...] = (OSError,)
    self._make = tensorboardX.SummaryWriter
    self._summary = summary_pb2.Summary

  def begin(self, workdir: pathlib.Path, step: int, config: Mapping):
    # Events of later steps than a checkpoint's are hidden when a run goes on from it.
    purged = {"purge_step": step + 1} if step else {}
    self._writer = self._make(str(workdir / "tensorboard"), flush_secs=30, **purged)

  def scalars(self, step: int, values: Mapping[str, float]):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def image(self, step: int, name: str, pixels: np.ndarray):
    self._encoded(step, name, encoded(pixels), pixels.shape)

  def video(self, step: int, name: str, frames: np.ndarray, fps: float):
    self._encoded(step, name, animated(frames, fps), frames.shape[1:])

  def _encoded(self, step: int, name: str, data: bytes, shape: Sequence[int]):
    summary = self._summary
    picture = summary.Image(
      height=shape[0], width=shape[1], colorspace=3, encoded_image_string=data
    )
    value = summary.Value(tag=name, image=picture)
    self._writer.file_writer.add_summary(summary(value=[value]), step)

  def close(self):
    self._writer.close()


class WandB:
  """A run of Weights & Biases, whose environment variables set project, mode and key.

  It goes on under its number, which `<workdir>/wandb_id` keeps.
  """

  def __init__(self):
    import wandb

    self.errors: tuple[type[Exception], ...] = (OSError, wandb.Error)
    self._wandb = wandb

  def begin(self, workdir: pathlib.Path, step: int, config: Mapping):
    path = workdir / "wandb_id"
    if not step or not path.exists():
      path.write_text(secrets.token_hex(4))
    self._run = self._wandb.init(
      dir=str(workdir), name=workdir.name, id=path.read_text(), resume="allow", config=dict(config)
    )

  def scalars(self, step: int, values: Mapping[str, float]):
    self._run.log(dict(values), step=step)

  def image(self, step: int, name: str, pixels: np.ndarray):
    self._run.log({name: self._wandb.Image(pixels)}, step=step)

  def video(self, step: int, name: str, frames: np.ndarray, fps: float):
    video = self._wandb.Video(io.BytesIO(animated(frames, fps)), format="gif")
    self._run.log({name: video}, step=step)

  def close(self):
    self._run.finish()


# A tracker imports its package when it is made and has the methods above. `step` counts training
# steps, in `begin` up to where the run goes on; names have slashes between groups; pixels are uint8
# [y, x, 3] and frames [t, y, x, 3]; `errors` are those that may keep it from its work.
TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB}


@dataclasses.dataclass
class Trackers:
  """The trackers of a run, by name; one that fails is left out from then on."""

  trackers: dict[str, TensorBoard | WandB] = dataclasses.field(default_factory=dict)

  @classmethod
  def open(cls, names: Sequence[str], workdir: pathlib.Path, step: int, config: Mapping):
    """Begins the trackers of `names`, where the run goes on from `step`; jsonl is not one of them.

    It logs the package that one lacks, and how to install it.
    """
    found = {}
    for name in names:
      if name == JSONL:
        continue
      try:
        found[name] = TRACKERS[name]()
      except ModuleNotFoundError as error:
        logging.warning(
          "training goes on without train.trackers=%s: the package %s is not installed; install it "
          "by pip install 'freqformer[%s]'",
          name,
          error.name,
          name,
        )
    trackers = cls(found)
    trackers._each(lambda tracker: tracker.begin(workdir, step, config))
    return trackers

  def scalars(self, step: int, kind: str, values: Mapping):
    """Shows numbers, and the entries of lists of numbers, as `<kind>/<name>`; other values not."""
    flat = {}
    for name, value in values.items():
      array = np.asarray(value)
      if array.dtype.kind not in "biuf" or array.ndim > 1:
        continue
      for i, number in enumerate(array.ravel()):
        flat[f"{kind}/{name}/{i}" if array.ndim else f"{kind}/{name}"] = float(number)
    if flat:
      self._each(lambda tracker: tracker.scalars(step, flat))

  def image(self, step: int, name: str, pixels: np.ndarray):
    """Shows a picture, uint8 `[y, x, 3]`."""
    self._each(lambda tracker: tracker.image(step, name, pixels))

  def video(self, step: int, name: str, frames: np.ndarray, fps: float):
    """Shows a video, uint8 `[t, y, x, 3]`."""
    self._each(lambda tracker: tracker.video(step, name, frames, fps))

  def close(self):
    """Writes what has not been written yet; nothing can be shown afterwards."""
    self._each(lambda tracker: tracker.close())
    self.trackers.clear()

  def __bool__(self) -> bool:
    return bool(self.trackers)

  def _each(self, show: Callable):
    for name, tracker in list(self.trackers.items()):
      try:
        show(tracker)
      except tracker.errors as error:
        logging.warning("training goes on without train.trackers=%s: %s", name, error)
        del self.trackers[name]


def encoded(pixels: np.ndarray) -> bytes:
  """Returns a picture, uint8 `[y, x, 3]`, as PNG."""
  file = io.BytesIO()
  _pictures().fromarray(pixels).save(file, "png")
  return file.getvalue()


def animated(frames: np.ndarray, fps: float) -> bytes:
  """Returns a video, uint8 `[t, y, x, 3]`, as an animated GIF that repeats."""
  file = io.BytesIO()
  first, *others = map(_pictures().fromarray, frames)
  first.save(file, "gif", save_all=True, append_images=others, duration=1000 / fps, loop=0)
  return file.getvalue()


def _pictures():
  """Returns PIL's module of pictures; a machine that only times steps need not have it."""
  from PIL import Image

  return Image
