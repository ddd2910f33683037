"""Rendering camera moves as a user does it, and training on them."""

import json

import numpy as np
import pytest

from freqformer.command import pans
from freqformer.command.cli import guarded
from freqformer.command.files import read_config
from freqformer.data.cache import prepare
from freqformer.data.decode import VideoFile
from freqformer.evaluate.motion import velocities
from freqformer.train.experiment import experiment
from freqformer.train.metrics import read
from freqformer.train.run import train
from tests.command.process import ROOT
from tests.data.test_pans import scene

SIZES = ("--rows=64", "--cols=64", "--frames=4", "--clips=2", "--speeds=1,2", "--val=0.3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Three photographs and the clips that were rendered from them."""
  folder = tmp_path_factory.mktemp("pans")
  (folder / "photos").mkdir()
  for seed in range(3):
    scene(seed).save(folder / "photos" / f"{seed}.png")
  render(folder)
  return folder


def render(place, *flags):
  guarded(pans.main)([f"--photos={place / 'photos'}", f"--out={place / 'clips'}", *SIZES, *flags])


def refusal(capsys, place, *flags):
  with pytest.raises(SystemExit) as stopped:
    render(place, *flags)
  assert stopped.value.code == 2
  return capsys.readouterr().err


def test_the_record_is_what_the_clips_show(place):
  record = json.loads((place / "clips" / "pans.json").read_text())
  clips = record["clips"]
  found = {str(p.relative_to(place / "clips")) for p in (place / "clips").rglob("*.mp4")}
  assert set(clips) == found and len(found) == 3 * 8 * 2
  splits = {}
  for path, facts in clips.items():
    splits.setdefault(facts["photograph"], set()).add(path.split("/")[0])
  assert sorted(map(sorted, splits.values())) == [["train"], ["train"], ["val"]]
  for path, facts in clips.items():
    if path.split("/")[1] in ("right", "up"):
      with VideoFile(place / "clips" / path) as video:
        frames = np.stack(video.read(range(4)))
      # Of 1 or 2 pixels: compression of so small a picture holds blocks back.
      np.testing.assert_allclose(velocities(frames[None])[0], facts["velocity"], atol=0.25)


def test_a_set_is_kept_and_another_one_is_not_touched(place, capsys):
  record = (place / "clips" / "pans.json").read_text()
  render(place)
  assert "is there already" in capsys.readouterr().out
  assert "holds clips of other settings: delete it" in refusal(capsys, place, "--clips=3")
  assert "holds other files" in refusal(capsys, place, f"--out={place}")
  assert "speeds=(-1.0,) must be above 0" in refusal(capsys, place, "--speeds=-1")
  assert "two scenes at least" in refusal(capsys, place, "--frames=400")
  assert (place / "clips" / "pans.json").read_text() == record


def test_training_takes_the_splits(place):
  config = read_config(ROOT / "configs" / "pans.py")
  data = dict(root=str(place / "clips"), cache=str(place / "cache"), views=1)
  config.data.update(data | dict(resolution=(32, 32), frames=4, workers=1))
  config.model.update(dict(width=32, depth=1, heads=4))
  config.model.attention.update(dict(tile=(2, 2, 4), implementation="reference"))
  config.train.update(dict(steps=2, batch_size=2, warmup=0, log_every=1, val_every=2))
  config.train.update(dict(val_batches=1, val_soft=False))
  train(config, place / "run")
  rows = read(place / "run" / "metrics.jsonl")
  assert {row["kind"] for row in rows} >= {"train", "val"}
  assert all(np.isfinite(row["loss"]) for row in rows if row["kind"] == "train")
  caches = [prepare(experiment(config).data, split) for split in ("train", "val")]
  assert [len(cache) for cache in caches] == [32, 16]
  names = ["down", "left", "right", "turn_left", "turn_right", "up", "zoom_in", "zoom_out"]
  assert all(cache.class_names == names for cache in caches)
