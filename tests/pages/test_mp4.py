"""Files for people: what is written decodes to what was given."""

import av
import numpy as np
import pytest
from PIL import Image

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


def test_grid():
  videos = np.stack([moving(seed=seed) for seed in range(3)])
  out = video.grid(videos, columns=2)
  assert out.shape == (6, 2 * 32 + 2, 2 * 48 + 2, 3)
  np.testing.assert_array_equal(out[:, :32, :48], videos[0])
  np.testing.assert_array_equal(out[:, :32, 50:], videos[1])
  np.testing.assert_array_equal(out[:, 34:, :48], videos[2])
  assert (out[:, 34:, 50:] == 255).all() and (out[:, 32:34] == 255).all()


def test_a_picture_of_frames(tmp_path):
  clips = np.stack([moving(frames=9), moving(frames=9, seed=1)])
  video.grid_png(tmp_path / "two.png", clips, ["a", "b"], frames=3)
  picture = np.asarray(Image.open(tmp_path / "two.png"))
  assert picture.shape == (2 * (14 + 32) + 2, 3 * 48 + 2 * 2, 3)
  np.testing.assert_array_equal(picture[14:46, :48], clips[0, 0])
  np.testing.assert_array_equal(picture[-32:, -48:], clips[1, -1])
  assert (picture[:14] < 128).any()
