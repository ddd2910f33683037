"""Files for people: what is written decodes to what was given."""

import av
import numpy as np
import pytest
from PIL import Image

from freqformer.config import ConfigError
from freqformer.pages import mp4 as video


def moving(frames=6, rows=32, cols=48, seed=0):
  """A smooth moving gradient, uint8 `[t, y, x, 3]`."""
  t, y, x = np.ogrid[:frames, :rows, :cols]
  wave = np.sin((x + 2 * t) / 9 + y / 13 + seed)
  return np.stack([np.uint8(127 + 100 * wave)] * 3, -1)


def decode(path):
  """The frames, and the codec's name, pixel format and frame rate."""
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    facts = (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate))
    return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), facts


@pytest.mark.parametrize("rows,cols", [(32, 48), (31, 47)])
def test_mp4(tmp_path, rows, cols):
  given = moving(rows=rows, cols=cols)
  video.write_mp4(tmp_path / "new" / "a.mp4", given, fps=25 / 3)
  got, (_, pixels, rate) = decode(tmp_path / "new" / "a.mp4")
  assert got.shape == (6, 32, 48, 3) and rate == pytest.approx(25 / 3)
  assert pixels == "yuv420p"
  assert np.abs(got[:, :rows, :cols].astype(float) - given).mean() < 4
  if rows % 2:  # Padded by the edge, not by black.
    assert np.abs(got[:, -1].astype(float) - got[:, -2]).mean() < 12


def test_mp4_without_libx264(tmp_path, monkeypatch):
  monkeypatch.setattr(video.av, "codecs_available", {"mpeg4"})
  video.write_mp4(tmp_path / "a.mp4", moving(), 25)
  got, (name, _, _) = decode(tmp_path / "a.mp4")
  assert name == "mpeg4" and len(got) == 6


@pytest.mark.parametrize(
  "wrong", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_mp4_refuses(tmp_path, wrong):
  with pytest.raises(ValueError, match="uint8"):
    video.write_mp4(tmp_path / "a.mp4", wrong)


@pytest.mark.parametrize("fps", [0, -5, float("nan"), float("inf")])
def test_mp4_refuses_a_rate_that_is_none(tmp_path, fps):
  with pytest.raises(ValueError, match="frame rate"):
    video.write_mp4(tmp_path / "a.mp4", moving(), fps)
  assert not list(tmp_path.iterdir())


def test_folders(tmp_path):
  (tmp_path / "file").write_text("")
  assert (
    video.check_folder(tmp_path / "new" / "er") == tmp_path / "new" / "er"
    and not (tmp_path / "new").exists()
  )
  for path in (tmp_path / "file", tmp_path / "file" / "in" / "it"):
    with pytest.raises(ConfigError, match="file is a file"):
      video.check_folder(path)


def test_grid_places_videos_and_holds_last_frames():
  videos = [moving(seed=0), moving(frames=3, seed=1), moving(seed=2)]
  out = video.grid(videos, columns=2)
  assert out.shape == (6, 2 * 32 + 2, 2 * 48 + 2, 3)
  np.testing.assert_array_equal(out[:, :32, :48], videos[0])
  np.testing.assert_array_equal(out[5, :32, 50:], videos[1][-1])
  np.testing.assert_array_equal(out[:, 34:, :48], videos[2])
  assert (out[:, 34:, 50:] == 255).all()
  labelled = video.grid(np.stack([videos[0], videos[2]]), 5, ["one", "two"])
  np.testing.assert_array_equal(labelled[:, -32:, :48], videos[0])
  assert (labelled[:, :-32, :48] < 128).any()


def test_grid_refuses():
  with pytest.raises(ValueError, match="one size"):
    video.grid([moving(), moving(rows=30)], 2)
  with pytest.raises(ValueError, match="labels"):
    video.grid([moving()], 1, ["a", "b"])
  with pytest.raises(ValueError, match="at least one"):
    video.grid([], 1)


def test_a_picture_of_frames(tmp_path):
  clip = moving(frames=9)
  video.grid_png(tmp_path / "one.png", [clip], ["a"], frames=3)
  strip = np.asarray(Image.open(tmp_path / "one.png"))
  assert strip.shape == (14 + 32, 3 * 48 + 2 * 2, 3)
  np.testing.assert_array_equal(strip[14:, :48], clip[0])
  np.testing.assert_array_equal(strip[14:, -48:], clip[-1])
  video.grid_png(tmp_path / "two.png", [clip, moving(frames=4)], ["a", "b"])
  assert Image.open(tmp_path / "two.png").size == (4 * 48 + 3 * 2, 2 * (32 + 14) + 2)
