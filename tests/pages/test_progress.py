"""Pictures of a run in training: which are made, and that training goes on without them."""

import dataclasses
import types

import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.data.sources import open_split
from freqformer.diffusion.sampling import SampleConfig
from freqformer.model.dit import VideoDiT
from freqformer.pages import progress
from freqformer.pages.progress import Progress, first_clips
from freqformer.train.experiment import experiment
from freqformer.train.run import Training
from tests.command.test_fields import small


@pytest.fixture
def run(tmp_path):
  """A run on random fields with nine classes, as training hands it over; no array is made."""
  exp = experiment(small())
  data = open_split(exp.data, "train")
  model = nnx.eval_shape(lambda: VideoDiT(exp.model, exp.latent_shape, 9, nnx.Rngs(0)))
  return Training(exp, tmp_path, data, data, *nnx.split(model), tables=None)


def names(folder):
  return sorted(path.name for path in folder.glob("*.mp4"))


def begun(run, step, monkeypatch, draw):
  monkeypatch.setattr(progress, "_drawer", lambda run, model: draw)
  found = Progress()
  found.begin(run, step)
  return found


def test_samples_of_lost_steps_go_and_real_clips_stay(run, monkeypatch):
  drawn = run.workdir / "samples-in-training"
  looks = begun(run, 0, monkeypatch, lambda params: np.zeros((2, 2, 16, 16, 3), np.uint8))
  for step in (3, 6):
    looks.validated(step, None)
  assert names(drawn) == ["00000003.mp4", "00000006.mp4"]
  assert names(run.workdir / "real") == sorted(f"{name}.mp4" for name in run.data.class_names)
  before = (run.workdir / "real" / "y+0x+0.mp4").stat().st_mtime_ns
  begun(run, 4, monkeypatch, None)
  assert names(drawn) == ["00000003.mp4"]
  assert (run.workdir / "real" / "y+0x+0.mp4").stat().st_mtime_ns == before


def test_a_failure_is_logged_once_and_training_goes_on(run, monkeypatch):
  calls = []

  def draw(params):
    calls.append(params)
    raise OSError("no space left")

  monkeypatch.setattr(progress.logging, "warning", lambda *args: calls.append(args[-1]))
  looks = begun(run, 0, monkeypatch, draw)
  (run.workdir / "report.html").mkdir()  # it cannot be written either
  looks.validated(3, "weights")
  looks.validated(6, "weights")
  assert calls[0] == "weights" and "no space left" in str(calls[1])
  assert len(calls) == 4 and all(isinstance(error, OSError) for error in calls[1:])


def test_a_run_that_is_asked_to_stop_draws_no_further(run):
  stopped = dataclasses.replace(run, should_stop=lambda: True)
  (run.workdir / progress.TRAINING).mkdir()
  draw = progress._drawer(stopped, nnx.merge(run.graphdef, run.params))
  with pytest.raises(ConfigError, match="the run was asked to stop"):
    draw(run.params)


def test_no_videos_without_pyav(run, monkeypatch):
  monkeypatch.setattr(progress, "_video_writer", lambda: None)
  looks = begun(run, 0, monkeypatch, None)
  looks.validated(3, None)
  assert not (run.workdir / "real").exists() and (run.workdir / "report.html").exists()
  assert (run.workdir / "cost.json").exists()


def test_first_clips_are_of_the_labels(run):
  found = first_clips(run.data, [2, 7])
  assert sorted(found) == [2, 7]
  first = next(clip for clip in map(run.data.__getitem__, range(99)) if clip["label"] == 7)
  np.testing.assert_array_equal(found[7], first["latent"])


def test_few_steps_unless_the_method_needs_more():
  def schedule(steps):
    if steps < 20:
      raise ConfigError("too few")

  config = SampleConfig(steps=30, batch_size=8)
  easy = types.SimpleNamespace(schedule=lambda steps: None)
  for model, steps in ((easy, 12), (types.SimpleNamespace(schedule=schedule), 30)):
    found = progress._few_steps(config, model, 3)
    assert (found.steps, found.batch_size) == (steps, 3)
