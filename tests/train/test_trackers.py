"""Trackers: what a run shows in them, and that training goes on without them."""

import io
import logging
import sys
import types

import numpy as np
import pytest
from PIL import Image

from freqformer.config import ConfigError
from freqformer.pages.progress import Progress
from freqformer.train.experiment import experiment
from freqformer.train.metrics import read
from freqformer.train.run import train
from freqformer.train.trackers import Trackers
from tests.command.test_fields import small

pytestmark = pytest.mark.xdist_group("trackers")
ALL = ("jsonl", "tensorboard", "wandb")


class Record(types.SimpleNamespace):
  """Stands in for a protocol buffer: it keeps what it is made of."""


@pytest.fixture
def packages(monkeypatch):
  """Stand-ins for both packages; returns what they are called with."""
  calls = {"scalars": {}, "pictures": {}, "logged": [], "begun": [], "closed": 0}

  class Writer:
    def __init__(self, folder, **given):
      calls["begun"].append((folder, given))
      self.file_writer = self

    def add_scalar(self, name, value, step):
      calls["scalars"].setdefault(name, []).append((step, value))

    def add_summary(self, summary, step):
      for value in summary.value:
        calls["pictures"].setdefault(value.tag, []).append((step, value.image))

    def close(self):
      calls["closed"] += 1

  class Summary(Record):
    Image = Record
    Value = Record

  class Run:
    def log(self, values, step):
      calls["logged"].append((step, values))

    def finish(self):
      calls["closed"] += 1

  def init(**given):
    calls["begun"].append(given)
    return Run()

  class Error(Exception):
    pass

  proto = types.SimpleNamespace(summary_pb2=types.SimpleNamespace(Summary=Summary))
  board = types.SimpleNamespace(SummaryWriter=Writer, proto=proto)

  def picture(pixels):
    return "image", pixels.shape

  def video(file, format):
    return "video", format, file.getvalue()[:3]

  wandb = types.SimpleNamespace(init=init, Error=Error, Image=picture, Video=video, run=Run)
  monkeypatch.setitem(sys.modules, "tensorboardX", board)
  monkeypatch.setitem(sys.modules, "tensorboardX.proto", proto)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  calls["wandb"] = wandb
  return calls


def test_a_run_shows_figures_samples_and_routing(packages, tmp_path):
  config = small()
  config.model.attention.method = "freqformer"
  config.train.update(trackers=ALL, samples=2, val_soft=False)
  config.sample.steps = 2
  train(config, tmp_path, watch=Progress())
  rows = {"train": [], "val": [], "warning": []}
  for row in read(tmp_path / "metrics.jsonl"):
    rows[row["kind"]].append(row)
  losses = [(row["step"], row["loss"]) for row in rows["train"]]
  assert len(losses) == 3 and packages["scalars"]["train/loss"] == losses
  assert [v for _, v in packages["scalars"]["val/buckets/3"]] == [rows["val"][0]["buckets"][3]]
  logged = {name: value for _, values in packages["logged"] for name, value in values.items()}
  assert logged["train/loss"] == losses[-1][1] and logged["val/loss"] == rows["val"][0]["loss"]
  assert sorted({step for step, _ in packages["logged"]}) == [1, 2, 3]

  ((step, video),) = packages["pictures"]["samples"]
  frames = Image.open(io.BytesIO(video.encoded_image_string))
  assert step == 3 and frames.format == "GIF" and frames.size == (video.width, video.height)
  clip = experiment(config).data.grid[0]
  assert frames.n_frames > 1 and frames.n_frames % clip == 0 and video.width >= 2 * video.height
  ((_, routing),) = packages["pictures"]["routing"]
  picture = Image.open(io.BytesIO(routing.encoded_image_string))
  assert picture.format == "PNG" and picture.size == (routing.width, routing.height)
  assert logged["samples"] == ("video", "gif", b"GIF") and logged["routing"][0] == "image"
  assert packages["closed"] == 2

  folder, given = packages["begun"][0]
  assert folder == str(tmp_path / "tensorboard") and "purge_step" not in given
  begun = packages["begun"][1]
  assert begun["config"]["train"]["steps"] == 3 and begun["resume"] == "allow"


def test_a_resumed_run_goes_on_under_its_number(packages, tmp_path):
  for step in (0, 7, 0):
    Trackers.open(ALL, tmp_path, step, {}).close()
  _, first, again, second, _, third = packages["begun"]
  assert first["id"] == second["id"] != third["id"] and again[1]["purge_step"] == 8


def test_what_is_missing_is_told_with_the_line_that_installs_it(monkeypatch, caplog, tmp_path):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  monkeypatch.setitem(sys.modules, "wandb", None)
  trackers = Trackers.open(ALL, tmp_path, 0, {})
  assert not trackers and len(caplog.records) == 2
  for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
    assert f"the package {package} is not installed" in caplog.text
    assert f"pip install 'freqformer[{name}]'" in caplog.text
  trackers.scalars(1, "train", {"loss": 1.0})
  trackers.close()


def test_one_that_fails_is_left_out(packages, caplog, tmp_path):
  trackers = Trackers.open(ALL, tmp_path, 0, {})

  def log(self, values, step):
    raise packages["wandb"].Error("no network")

  packages["wandb"].run.log = log
  for step in (1, 2):
    trackers.scalars(step, "train", {"loss": 0.5, "text": "skipped", "none": None})
  assert packages["scalars"] == {"train/loss": [(1, 0.5), (2, 0.5)]}
  assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
    "training goes on without train.trackers=wandb: no network"
  ]


@pytest.mark.parametrize("trackers", [(), ("tensorboard",), ("jsonl", "mlflow")])
def test_unknown_ones_are_refused(trackers):
  config = small()
  config.train.trackers = trackers
  with pytest.raises(ConfigError, match="trackers=.* must be 'jsonl', which resuming and the"):
    experiment(config)


def _show(names, workdir):
  trackers = Trackers.open(names, workdir, 0, {"seed": 0})
  assert trackers
  trackers.scalars(1, "train", {"loss": 0.5})
  trackers.image(1, "routing", np.zeros((4, 6, 3), np.uint8))
  noise = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
  trackers.video(1, "samples", noise, 8.0)
  assert trackers  # none has failed
  trackers.close()


def test_tensorboard_itself(tmp_path):
  _show(("tensorboard",), tmp_path)
  (path,) = (tmp_path / "tensorboard").glob("events*")
  data = path.read_bytes()
  assert b"train/loss" in data and b"GIF89a" in data and b"\x89PNG" in data


def test_wandb_itself_offline(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  _show(("wandb",), tmp_path)
  assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
  assert list(tmp_path.glob("wandb/offline-run-*/files/media/videos/*.gif"))
