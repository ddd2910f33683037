"""Rendered data have UCF-101's shape, are the same every time, and their classes differ."""

import dataclasses
import json
import re
import shutil

import av
import numpy as np
import pytest

from freqformer.data import render
from freqformer.data.codec import CodecConfig, make_codec
from freqformer.data.decode import crop_resize
from freqformer.data.render import RenderedSet
from tests.data.helpers import psnr

SMALL = RenderedSet(classes=8, groups=2, clips_per_group=1, rows=48, cols=64)
ONE_CLASS = dataclasses.replace(SMALL, classes=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  path = tmp_path_factory.mktemp("set")
  render.render_ucf101(path, SMALL)
  return path


def lines(root, name):
  return (root / "ucfTrainTestlist" / name).read_text().splitlines()


def decode(path):
  with av.open(str(path)) as container:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_official_format(root):
  ids = dict(reversed(line.split()) for line in lines(root, "classInd.txt"))
  assert list(ids) == sorted(ids) and list(ids.values()) == [str(i) for i in range(1, 9)]
  files = {str(p.relative_to(root / "UCF-101")) for p in (root / "UCF-101").rglob("*.avi")}
  assert len(files) == 8 * 2 + 1
  for split in (1, 2, 3):
    train, test = lines(root, f"trainlist{split:02d}.txt"), lines(root, f"testlist{split:02d}.txt")
    for line in train + test:
      name, label = re.fullmatch(r"(\w+)/v_\1_g\d\d_c\d\d\.avi ?(\d*)", line).groups()
      assert label == (ids[name] if line in train else "")
    assert {line.split()[0] for line in train} | set(test) == files
    groups = [{re.search(r"_(g\d\d)_", line).group(1) for line in part} for part in (train, test)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


def test_every_clip_but_one_decodes(root):
  broken, lengths = [], []
  for path in sorted((root / "UCF-101").rglob("*.avi")):
    try:
      with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.codec_tag) == ("mpeg4", "XVID")
        assert (context.height, context.width) == (48, 64)
      lengths.append(len(decode(path)))
    except av.error.InvalidDataError:
      broken.append(f"{path.parent.name}/{path.name}")
  assert broken == ["BouncingBalls/v_BouncingBalls_g02_c02.avi"]
  assert f"{broken[0]} 1" in lines(root, "trainlist01.txt")
  assert max(lengths) <= 90 and sum(n >= 40 for n in lengths) == 15 and min(lengths) < 36


def test_decoded_is_what_was_drawn(root):
  video = decode(root / "UCF-101/FallingDots/v_FallingDots_g01_c01.avi")
  drawn = render.render_clip("FallingDots", 1, 1, len(video), 48, 64)
  assert np.abs(video.astype(float) - drawn).mean() < 6  # loss of 4:2:0 chroma and the quantiser


def test_complete_set_is_kept_and_another_replaced(tmp_path):
  """Two runs give the same bytes."""
  render.render_ucf101(tmp_path, ONE_CLASS)
  clip = tmp_path / "UCF-101/DriftingStripes/v_DriftingStripes_g01_c01.avi"
  before, data = clip.stat().st_mtime_ns, clip.read_bytes()
  render.render_ucf101(tmp_path, ONE_CLASS)
  assert clip.stat().st_mtime_ns == before
  render.render_ucf101(tmp_path, dataclasses.replace(ONE_CLASS, rows=32))
  assert clip.read_bytes() != data
  assert json.loads((tmp_path / ".complete").read_text())["rows"] == 32
  (tmp_path / ".complete").write_text("{}")  # a run killed half-way
  clip.unlink()
  render.render_ucf101(tmp_path, ONE_CLASS)
  assert clip.read_bytes() == data


def test_foreign_data_is_never_touched(root, tmp_path):
  shutil.copytree(root / "UCF-101/FallingDots", tmp_path / "UCF-101/FallingDots")
  with pytest.raises(FileExistsError, match="not rendered here"):
    render.render_ucf101(tmp_path, SMALL)
  assert len(list((tmp_path / "UCF-101/FallingDots").iterdir())) == 2


def test_classes_are_told_apart_on_unseen_groups():
  """By mean colour alone, far above chance (1/8), so labels carry information."""

  def colours(groups):
    clips = [render.render_clip(name, g, 1, 8, 24, 32) for name in render.LOOKS for g in groups]
    return np.reshape([clip.mean((0, 1, 2)) for clip in clips], (len(render.LOOKS), -1, 3))

  known, unseen = colours((1, 2, 3)).mean(1), colours((4, 5))
  nearest = np.square(unseen[:, :, None] - known).sum(-1).argmin(-1)
  assert (nearest == np.arange(len(known))[:, None]).mean() > 0.5
  a, b = (render.render_clip("RotatingChecker", 1, c, 4, 48, 64) for c in (1, 2))
  assert np.abs(a.astype(float) - b).mean() > 10


def test_stripes_differ_in_motion_only():
  """Same palette and frequency; only the drift travels on, the sway comes back."""
  drift, sway = render.LOOKS["DriftingStripes"], render.LOOKS["SwayingStripes"]
  assert (drift.palette, drift.frequency, drift.angle) == (sway.palette, sway.frequency, sway.angle)
  scene = render.Scene(2.0, 0.0, 1.0, (0.0, 0.0), (0.5, 0.5), 1.0)
  u = np.linspace(0, 1, 9)[None, None]
  v = np.zeros((1, 1, 1))
  t = np.asarray([0.0, 0.2, 1.0])[:, None, None]
  start, there, back = sway.field(scene, u, v, t)
  assert np.abs(there - start).max() > 0.2 and np.abs(back - start).max() < 1e-5


@pytest.mark.parametrize("name", render.LOOKS)
def test_smooth_enough_for_the_demo_codec(name):
  """28 dB at 96x96 and the demo's stride of 2."""
  codec = make_codec(CodecConfig(factor=(2, 8, 8), channels=16))
  frames = render.render_clip(name, 1, 1, 32)[::2, :, 20:140]
  view = np.stack([crop_resize(frame, (0, 0, 1, 1), (96, 96)) for frame in frames])
  assert psnr(view, codec.decode(codec.encode(view[None]), view.shape[:3])[0]) >= 28
