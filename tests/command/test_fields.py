"""Training on random fields as a user does it: the loss that it names, resuming, sampling."""

import errno
import json
import os
import pathlib
import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from freqformer.command.dry_run import describe
from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.data.loader import train_iterator
from freqformer.data.sources import open_split
from freqformer.diffusion.flow import interpolate, sample_noise, sample_time
from freqformer.evaluate.compare import candidates
from freqformer.evaluate.restore import load_run
from freqformer.train import run
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.experiment import experiment
from freqformer.train.metrics import read
from freqformer.train.run import train
from tests.command.process import ROOT, call

pytestmark = pytest.mark.xdist_group("fields")
FIELDS = ROOT / "configs" / "fields.py"


def small(steps=3, **data):
  """Returns the config of a run that compiles and trains in seconds."""
  config = read_config(FIELDS)
  config.data.update(dict(grid=(2, 8, 8), val_clips=6, labels="velocity") | data)
  config.model.update(dict(width=24, depth=1))
  config.model.attention.update(
    dict(method="dense", tile=(2, 4, 4), block=32, implementation="reference")
  )
  config.train.update(dict(steps=steps, warmup=0, schedule="constant", label_dropout=0.5))
  config.train.update(dict(log_every=1, val_every=3, val_batches=0))
  return config


def rows(workdir, kind):
  return [row for row in read(workdir / "metrics.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of three steps that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("fields") / "whole"
  train(small(), workdir)
  return workdir


@pytest.mark.parametrize("target", ["posterior", "velocity"])
def test_the_first_loss_is_the_size_of_the_target(whole, tmp_path, target):
  """A model begins at velocity 0, so its loss is the target's mean square."""
  if target == "velocity":
    train(small(steps=1, target="velocity"), tmp_path)
  exp = experiment(small())
  data = open_split(exp.data, "train")
  batch = next(iter(train_iterator(data, exp.train.batch_size, exp.seed)))
  x0 = batch["latent"]
  key = jax.random.fold_in(jax.random.key(exp.seed), 0)
  key_time, key_noise, key_drop, _ = jax.random.split(key, 4)
  time = sample_time(key_time, len(x0), "uniform")
  xt, wanted = interpolate(x0, sample_noise(key_noise, jnp.arange(len(x0)), x0.shape[1:]), time)
  if target == "posterior":
    dropped = jax.random.bernoulli(key_drop, 0.5, (len(x0),))
    label = jnp.where(dropped, len(data.class_names), batch["label"])
    assert 0 < dropped.sum() < len(x0)
    wanted = data.reference.velocity(xt, time, label)
  first = rows(whole if target == "posterior" else tmp_path, "train")[0]
  assert first["loss"] == pytest.approx(float(jnp.mean(wanted**2)), rel=1e-4)


def test_validation_reports_regret_and_bayes_risk(whole):
  (row,) = rows(whole, "val")
  parts = np.add(row["regret_buckets"], row["bayes_buckets"])
  # In expectation: the noise of the draw is not correlated with the model's error.
  np.testing.assert_allclose(row["buckets"], parts, rtol=0.2)
  assert row["regret"] == pytest.approx(np.mean(row["regret_buckets"]))
  assert all(0 < x < 1 for x in row["bayes_buckets"])


def test_a_run_in_two_halves_is_the_whole(whole, tmp_path):
  train(small(steps=2), tmp_path)
  train(small(), tmp_path)
  wanted, found = (Checkpoints(folder, create=False) for folder in (whole, tmp_path))
  assert found.record()["step"] == 3
  shapes = {name: np.zeros(meta.shape, meta.dtype) for name, meta in _metadata(wanted).items()}
  pairs = zip(*(jax.tree.leaves(own.restore(shapes)) for own in (wanted, found)), strict=True)
  assert all(np.array_equal(a, b) for a, b in pairs)
  losses = [[row["loss"] for row in rows(folder, "train")] for folder in (whole, tmp_path)]
  assert losses[0] == losses[1]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_validation_that_a_signal_cut_short_is_made_by_the_next_process(
  tmp_path, monkeypatch, steps
):
  config = small(steps=steps)
  config.train.update(dict(val_every=2, samples=0))

  def cut_short(*_):
    signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(run, "evaluate", cut_short)
    train(config, tmp_path)
  assert Checkpoints(tmp_path, create=False).latest() == 2 and not rows(tmp_path, "val")
  train(config, tmp_path)
  assert [row["step"] for row in rows(tmp_path, "val")] == list(range(2, steps + 1))
  assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, steps + 1))
  assert json.loads((tmp_path / "run.json").read_text())["finished"]


def _metadata(checkpoints):
  found = checkpoints._manager.item_metadata(3)["arrays"]
  return dict(getattr(found, "tree", found))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_sampling_and_the_report(whole):
  folder = pathlib.Path(whole)
  call(folder, "eval.py", f"--workdir={folder}", "--steps=2", "--classes=y-1x+0,y+1x+1")
  names = sorted(path.parent.name for path in (folder / "samples").glob("*/00000.mp4"))
  assert names == ["y+1x+1", "y-1x+0"]
  assert json.loads((folder / "samples" / "sampling.json").read_text())["samples"] == 2
  call(folder, "freqformer/report.py", f"--workdir={folder}", "--time_dense")
  timed = json.loads((folder / "seconds.json").read_text())
  for stage in ("training", "sampling"):  # its own attention is dense
    assert 0.1 < timed[stage]["own"] / timed[stage]["dense"] < 10
  page = (folder / "report.html").read_text()
  assert "Bayes risk" in page and page.count("data:video/mp4;base64,") == 2


def test_a_checkpoint_takes_a_schedule(whole):
  methods = ("dense", "radial")
  found = candidates(whole, methods, 4, schedule="dense_last=0.5")
  assert [found[name].model.schedule(4)[1:3] for name in methods] == [[("",), ("dense",)]] * 2
  with pytest.raises(ConfigError, match="SpatialTemporal cannot be"):
    candidates(whole, ["spatial_temporal"], 4, schedule="dense_first=0.5")
  assert load_run(whole).model.schedule(4) == [("",)] * 4


def test_dry_run():
  config = small()
  config.sample.steps = 5
  text = describe(experiment(config))
  assert re.search(r"GFLOP a sample in 5 evaluations, 100.0% of the dense model's$", text)
  assert "9 velocities, slope 3.8; target posterior" in text and "2x8x8x4" in text
  assert "with 9 classes" in text and "assumed" not in text


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_fails_ends_the_run_before_the_next_one(tmp_path, monkeypatch, in_background):
  """In the background the loop notices within some steps; otherwise it takes none."""
  config = small(steps=400)
  settings = dict(val_every=0, log_every=1, checkpoint_every=200, samples=0)
  config.train.update(settings | dict(save_in_background=in_background))

  def full(self):
    time.sleep(0.2)  # some steps of this model
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(ocp.CheckpointManager, "_wait_for_checkpointers", full)
  with pytest.raises(ConfigError, match="the checkpoint of step 200 needs"):
    train(config, tmp_path)
  last = rows(tmp_path, "train")[-1]["step"]
  assert 200 < last < 400 if in_background else last == 200
