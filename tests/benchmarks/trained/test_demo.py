"""The demo's row is of a finished run, and of what that run wrote."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.trained.demo import command_of, row_of, write_picture
from freqformer.config import ConfigError
from freqformer.pages.mp4 import write_mp4

RUN = {
  "git": "abc",
  "versions": {"jax": "1"},
  "device": "cpu",
  "method": "octaves",
  "params": 3,
  "tokens": 64,
  "seconds": {"train": 12.345},
  "finished": True,
}
JUDGE = {"name": "judge_x", "unit": "share named", "value": 0.75}
PROTOCOL = {"drawn": "samples", "samples": 64, "seed": 0}


def _write(folder, run=RUN):
  (folder / "run.json").write_text(json.dumps(run))
  lines = [{"step": step, "kind": "val", "loss": 1 / step} for step in (2, 4)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_row_holds_the_last_loss_and_the_metrics(tmp_path):
  _write(tmp_path)
  with pytest.raises(ConfigError, match="run make demo first"):
    row_of(tmp_path)
  (tmp_path / "evaluation.json").write_text(json.dumps([JUDGE | {"protocol": PROTOCOL}]))
  data = dict(source="folder", root="clips", frames=16, stride=2, resolution=[96, 96], views=8)
  losses = dict(loss=0.5, buckets=[0.5], linear_buckets=[0.9])
  (tmp_path / "validation").mkdir()
  found = dict(clips=3, split="all", data=data, density=0.1, **losses)
  (tmp_path / "validation" / "clips.json").write_text(json.dumps(found))
  row = row_of(tmp_path)
  del data["views"]
  assert row["validated"] == [{"clips": 3, "split": "all", **data, **losses}]
  assert row["steps"] == 4 and row["validation_loss"] == 0.25
  assert row["seconds"] == {"train": 12.3}
  demo = row | {"name": "demo"}
  assert command_of(demo) == "make demo && python -m benchmarks.trained.demo"
  metrics = [{"name": name, "drawn": "evaluation", "n": 9} for name in ("fvd_x", "psd")]
  first, second, third = command_of(row | {"name": "a", "metrics": metrics}).split(" && ")
  assert first == "python -m freqformer.demo --workdir=runs/a --steps=4"
  assert second == "python -m freqformer.evaluate --workdir=runs/a --n=9 --metrics=fvd,psd"
  assert third == "python -m benchmarks.trained.demo --workdir=runs/a"
  assert row["metrics"] == [JUDGE | {"drawn": "samples", "n": 64}]


def test_a_run_that_goes_on_is_refused(tmp_path):
  _write(tmp_path, RUN | {"finished": False})
  (tmp_path / "evaluation.json").write_text("[]")
  with pytest.raises(ConfigError, match="is not finished"):
    row_of(tmp_path)


def test_the_picture_has_a_column_per_class_and_moves(tmp_path):
  for i, name in enumerate(("A", "B", "C")):
    video = np.full((4, 16, 16, 3), 60 * i, np.uint8)
    video[2:] = 250
    write_mp4(tmp_path / "samples" / name / "00000.mp4", video)
    write_mp4(tmp_path / "real" / f"{name}.mp4", video)
  write_picture(tmp_path, tmp_path / "picture.webp")
  picture = Image.open(tmp_path / "picture.webp")
  assert picture.size == (3 * 16 + 4, 2 * 16 + 2)
  first = np.asarray(picture.convert("RGB"))
  assert abs(int(first[8, 8].mean()) - 0) < 30 < abs(int(first[8, 26].mean()) - 0) < 90
  assert picture.n_frames == 2  # equal ones are joined
  picture.seek(1)
  assert np.asarray(picture.convert("RGB"))[8, 8].mean() > 200
