"""Writes what a run shows while it trains: real clips, counted costs, samples, the report.

Nothing here touches the run's state or its random numbers, and what fails is logged: a run goes on
without pictures.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg

from freqformer.config import ConfigError
from freqformer.data.sources import Split
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.disk import write_whole
from freqformer.evaluate.conditions import CLIPS, of_clips, some_clips
from freqformer.evaluate.draw import SAMPLES_PER_CLASS
from freqformer.pages.cost import counted
from freqformer.pages.files import json_if_any
from freqformer.pages.routing import heatmap
from freqformer.pages.run import write_report
from freqformer.pages.videos import MAX_CLASSES, REAL, TRAINING, step_files
from freqformer.train.run import Training, Watch

# choice: enough to tell one validation's samples from the next one's.
_STEPS = 12
# choice: clips that are looked at for one of each class. Caches go class by class.
_MAX_READ = 10_000
_SEED = 0  # eval.py's default: the noise is that of its samples


class Progress(Watch):
  """Keeps the report of a run up to date."""

  def begin(self, run: Training, step: int):
    """Writes real clips and cost.json; removes samples of later steps than `step`."""
    self._run = run
    self._fps = run.data.fps
    self._mosaic = _video_writer()
    self._draw = None
    model = nnx.merge(run.graphdef, run.params)
    with _goes_on("costs"):
      costs = json.dumps(counted(run.experiment), indent=1)
      write_whole(run.workdir / "cost.json", costs)
    if self._mosaic is None:
      logging.info("no videos in the report: install av, e.g. by pip install 'freqformer[video]'")
      return
    with _goes_on("real clips"):
      self._write_real(anew=not step)
    with _goes_on("samples"):
      for number, path in step_files(run.workdir).items():
        if number > step:
          path.unlink()
      if run.experiment.train.samples:
        self._draw = _drawer(run, model)

  def validated(self, step: int, params):
    """Draws samples with these parameters, and writes the report."""
    if self._draw is not None:
      draw, self._draw = self._draw, None  # one that fails is not tried again
      with _goes_on("samples"):
        clock = time.monotonic()
        videos = draw(params)
        # Again next time, also if these cannot be written: all processes of a run draw, or none.
        self._draw = draw
        path = self._run.workdir / TRAINING / f"{step:08d}.mp4"
        self._mosaic(path, videos, self._fps)
        self._run.trackers.video(step, "samples", np.concatenate([*videos], 2), self._fps)
        logging.info("%d samples drawn in %.1f s: %s", len(videos), time.monotonic() - clock, path)
    if self._run.trackers:
      with _goes_on("routing's picture"):
        self._show_routing(step)
    self.end()

  def end(self):
    """Writes the report."""
    with _goes_on("report"):
      write_report(self._run.workdir)

  def _show_routing(self, step: int):
    """Shows the heads' branches in trackers, if any head is routed."""
    found = json_if_any(self._run.workdir, "routing.json")
    if found:
      canvas = FigureCanvasAgg(heatmap(found))
      canvas.draw()
      self._run.trackers.image(step, "routing", np.asarray(canvas.buffer_rgba())[..., :3])

  def _write_real(self, anew: bool):
    """Writes a clip of each of the first classes; those that are there stay, unless `anew`.

    Where embeddings condition, it writes the validation clips whose embeddings are sampled.
    """
    run = self._run
    folder = run.workdir / REAL

    def is_wanted(name: str) -> bool:
      return anew or not (folder / f"{name}.mp4").exists()

    if run.experiment.data.condition == "embedding":
      numbers = some_clips(run.val, CLIPS)
      named = zip(of_clips(run.val, numbers).names, numbers, strict=True)
      clips = {name: run.val[number]["latent"] for name, number in named if is_wanted(name)}
    else:
      names = run.data.class_names[:MAX_CLASSES]
      wanted = [label for label, name in enumerate(names) if is_wanted(name)]
      clips = {names[label]: clip for label, clip in first_clips(run.data, wanted).items()}
    for name, latent in clips.items():
      video = run.experiment.data.decode(latent[None], run.data.statistics)
      self._mosaic(folder / f"{name}.mp4", video, self._fps)


def first_clips(data: Split, labels: Sequence[int]) -> dict[int, np.ndarray]:
  """Returns the first clip's latent `[t, y, x, c]` of each label; of absent classes none."""
  found = {}
  for index in range(min(len(data), _MAX_READ)):
    if len(found) == len(labels):
      break
    clip = data[index]
    label = int(clip["label"])
    if label in labels:
      found.setdefault(label, clip["latent"])
  return found


def _drawer(run: Training, model) -> Callable:
  """Returns `params -> videos`, uint8 `[classes, t, y, x, 3]`, and writes about.json."""
  experiment = run.experiment
  if experiment.data.condition == "embedding":
    clips = some_clips(run.val, min(experiment.train.samples, CLIPS))
    conditions = of_clips(run.val, clips)
    names = list(conditions.texts)
    numbers = np.arange(len(names), dtype=np.int32)
    labels = conditions.embeddings
  else:
    names = run.data.class_names
    count = min(experiment.train.samples, len(names))
    labels = np.unique(np.linspace(0, len(names) - 1, count).round().astype(np.int32))
    numbers = labels
  config = _few_steps(experiment.sample, model, len(labels))
  compiled = sampling.make_step(run.graphdef, config)
  about = {
    "classes": [names[number] for number in numbers],
    "steps": config.steps,
    "guidance": config.guidance,
    "seed": _SEED,
    "weights": "ema",
  }
  (run.workdir / TRAINING).mkdir(exist_ok=True)
  write_whole(run.workdir / TRAINING / "about.json", json.dumps(about, indent=1))

  def step(*args):
    if run.should_stop():
      raise ConfigError("the run was asked to stop")
    return compiled(*args)

  def draw(params) -> np.ndarray:
    indices = numbers * SAMPLES_PER_CLASS
    shape = tuple(run.data.latent_shape)
    latents, _ = sampling.sample(
      step, params, model, labels, indices, _SEED, run.tables, shape, config, progress=False
    )
    return experiment.data.decode(latents, run.data.statistics)

  return draw


def _few_steps(config: SampleConfig, model, count: int) -> SampleConfig:
  """Returns the run's sampling in `_STEPS` steps, or in its own if the method has more phases."""
  own = dataclasses.replace(config, batch_size=min(config.batch_size, count))
  few = dataclasses.replace(own, steps=min(own.steps, _STEPS))
  try:
    model.schedule(len(few.guided()))
  except ConfigError:
    return own
  return few


def _video_writer() -> Callable | None:
  """Returns `(path, videos, fps)`, which writes videos side by side; None without PyAV.

  Only videos need it, the package of an extra; random fields train without.
  """
  try:
    from freqformer.pages import mp4
  except ModuleNotFoundError:
    return None

  def write(path: pathlib.Path, videos: np.ndarray, fps: float):
    mp4.write_mp4(path, mp4.grid(videos, columns=len(videos)), fps)

  return write


@contextlib.contextmanager
def _goes_on(what: str):
  """Logs what keeps pictures from being made: files, a method's schedule, the device's memory."""
  try:
    yield
  except (OSError, ConfigError, jax.errors.JaxRuntimeError) as error:
    logging.warning("training goes on without its %s: %s", what, error)
