"""Films as people have them: turned, stretched, damaged, of any rate, too long and too large."""

import itertools
import pathlib
import re
from fractions import Fraction

import av
import numpy as np
import pytest

from freqformer.data import decode
from freqformer.data.cache import prepare
from freqformer.data.decode import HDR, INTERLACED, SLOW, SMALL, VideoFile, decode_clip
from freqformer.data.protocol import BrokenClip, Clip, Footage, draw_view
from tests.data.helpers import config, moving_square, psnr


def write(path: pathlib.Path, video: np.ndarray, times=None, turn=None, options=None, **context):
  """Writes an H.264 file.

  Args:
    times: seconds of every frame; None: 25 a second.
    turn: (degrees, mirrored) to be displayed by.
    options: of the encoder.
    **context: attributes of the codec context.
  """
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=25, options=options or {})
    stream.height, stream.width = video.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, 1000)
    if turn is not None:
      stream.set_display_rotation(*turn)
    for name, value in context.items():
      setattr(stream.codec_context, name, value)
    for i, picture in enumerate(video):
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      frame.pts = round(1000 * (times[i] if times is not None else i / 25))
      frame.time_base = Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def noisy(frames: int, rows: int = 48, cols: int = 64) -> np.ndarray:
  """A video whose frames are large in any codec."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 255, (frames, rows, cols, 3), np.uint8)


# ---- as displayed ---------------------------------------------------------------------------


@pytest.mark.parametrize("turn", list(itertools.product((0, 90, 180, 270), (False, True))))
def test_pictures_are_turned_and_mirrored_as_they_are_displayed(tmp_path, turn):
  video = moving_square(3)
  with VideoFile(write(tmp_path / "a.mp4", video, turn=turn)) as file:
    (frame,) = file.read([0])
  expected = np.rot90(video[0], turn[0] // 90)
  if turn[1]:
    expected = expected[:, ::-1]
  assert file.size == frame.shape[:2] == expected.shape[:2]
  assert psnr(frame[None], expected[None]) > 35


@pytest.mark.parametrize("turn, size", [(None, (24, 64)), ((90, False), (64, 24))])
def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(tmp_path, turn, size):
  video = moving_square(8)
  path = write(tmp_path / "a.mp4", video, turn=turn, sample_aspect_ratio=Fraction(2, 1))
  with VideoFile(path) as file:
    rows, cols = file.size
  # Turned pixels are twice as high as wide: the picture is as large as if its width had shrunk.
  assert rows / cols == size[0] / size[1]
  c = config("x", "y", resolution=(12, 32), frames=2)
  pixels, drawn = decode_clip(c, "val", Clip("a", str(path), 0))
  if turn is None:  # 24 x 64 has the shape of the view, so that nothing is cut off
    assert drawn["views"][0]["box"] == (0, 0, 1, 1)
    first = drawn["views"][0]["frames"][0]
    assert psnr(pixels[:, 0].repeat(2, 1), video[[first]]) > 20


def test_odd_pictures_are_named(tmp_path, caplog):
  root = tmp_path / "videos"
  root.mkdir()
  video = moving_square(20)
  write(root / "fine.mp4", video)
  write(root / "hdr.mp4", video, color_trc=16)
  write(root / "tv.mp4", video, options={"x264-params": "interlaced=1"})
  write(root / "tiny.mp4", video[:, 4:16, 4:22])
  cache = prepare(config(root, tmp_path / "cache", stride=1, fps=25, val_fraction=0.01), "all")
  notes = {clip["key"]: clip["notes"] for clip in cache.manifest["clips"]}
  assert notes == {"fine.mp4": [], "hdr.mp4": [HDR], "tv.mp4": [INTERLACED], "tiny.mp4": [SMALL]}
  assert f"1 of 4 all clips are used, but interlaced:\n  tv.mp4: {INTERLACED}" in caplog.text


# ---- time -----------------------------------------------------------------------------------


STEADY = {fps: np.arange(round(2 * fps)) / fps for fps in (12, 25, 60)}
# As phones write it: every third frame takes three times as long.
VARIABLE = np.cumsum(np.tile([0.04, 0.04, 0.12], 12))


@pytest.mark.parametrize("times", [*STEADY.values(), VARIABLE], ids=[*map(str, STEADY), "variable"])
def test_every_rate_is_shown_at_the_same_speed(tmp_path, times):
  path = write(tmp_path / "a.mp4", np.repeat(moving_square(1), len(times), 0), times=times)
  with VideoFile(path) as file:
    found = np.array(file.footage.times)
  np.testing.assert_allclose(found, times - times[0], atol=2e-3)
  c = config("x", "y", fps=8.0, stride=1, frames=6, crop="random", views=3)
  _, drawn = decode_clip(c, "train", Clip("a", str(path), 0))
  gaps = np.diff(found).max()
  for view in drawn["views"]:
    shown = found[list(view["frames"])]
    assert view["fps"] == 8
    np.testing.assert_allclose(shown - shown[0], np.arange(6) / 8, atol=gaps)
  # By count, the span follows the file's rate.
  assert decode_clip(config("x", "y"), "val", Clip("a", str(path), 0))[1]["views"][0]["fps"] == (
    pytest.approx(drawn["fps"] / 2, rel=1e-3)
  )


@pytest.mark.parametrize(
  "short, frames, fps",
  [("pad", (0, 3, 6, 9, 11, 11), 8), ("clamp", (0, 2, 4, 7, 9, 11), 11.364), ("skip", None, None)],
)
def test_clips_that_are_too_short_in_seconds(short, frames, fps):
  """0.44 s, where 0.625 s are needed."""
  footage = Footage((8, 8), tuple(np.arange(12) / 25))
  c = config("x", "y", fps=8.0, stride=1, frames=6, short=short)
  if frames is None:
    with pytest.raises(BrokenClip, match="0.62 s are needed at 8 frames a second, it has 0.44"):
      draw_view(c, "val", "a", 0, footage)
    return
  view = draw_view(c, "val", "a", 0, footage)
  assert (view.frames, view.fps) == (frames, fps)


def test_the_last_frame_is_shown_for_a_while():
  """The last of 16 frames begins at .6 s and is shown until .64; a view needs .606 s."""
  footage = Footage((8, 8), tuple(np.arange(16) / 25))
  c = config("x", "y", fps=8.25, stride=1, frames=6, short="skip")
  assert draw_view(c, "val", "a", 0, footage).fps == 8.25


def test_a_clip_slower_than_the_views_repeats_frames_and_is_named(tmp_path):
  path = write(tmp_path / "a.mp4", moving_square(12), times=np.arange(12) / 4)
  c = config("x", "y", fps=8.0, stride=1, frames=6)
  drawn = decode_clip(c, "val", Clip("a", str(path), 0))[1]
  assert drawn["views"][0]["frames"] == (4, 5, 5, 6, 6, 7) and SLOW in drawn["notes"]


def test_frames_are_chosen_by_time_or_by_count():
  with pytest.raises(
    ValueError, match="fps=8 .* by time, stride=2 by count: set stride=1, or fps=0"
  ):
    config("x", "y", fps=8.0)


def test_samples_have_the_rate_of_the_clips(tmp_path):
  root = tmp_path / "videos"
  root.mkdir()
  for i in range(3):
    write(root / f"{i}.mp4", moving_square(20, seed=i), times=np.arange(20) / 50)
  assert prepare(config(root, tmp_path / "cache"), "train").fps == pytest.approx(25)
  timed = config(root, tmp_path / "cache", fps=10.0, stride=1)
  assert prepare(timed, "train").fps == 10


# ---- long and large -------------------------------------------------------------------------


def test_frames_are_cut_as_they_come(tmp_path, monkeypatch):
  """None waits for another one: memory does not grow with their number or size."""
  events = []
  upright = VideoFile._upright
  crop = decode.crop_resize
  monkeypatch.setattr(
    VideoFile, "_upright", lambda self, frame: events.append("decoded") or upright(self, frame)
  )
  monkeypatch.setattr(decode, "crop_resize", lambda *args: events.append("cut") or crop(*args))
  path = write(tmp_path / "a.mp4", moving_square(40))
  decode_clip(config("x", "y", views=1), "train", Clip("a", str(path), 0))
  # The first frame is decoded for its size.
  assert events == ["decoded", *["decoded", "cut"] * 4]


def test_far_views_of_a_long_file_jump_to_key_frames(tmp_path, monkeypatch):
  video = np.repeat(moving_square(40), 20, 0)
  path = write(tmp_path / "a.mp4", video, options={"g": "50"})
  with VideoFile(path) as file:
    wanted = [20, 24, 400, 404, 790]
    through = [frame for i, frame in file.frames(list(range(800))) if i in wanted]
    seen = []
    counts = VideoFile._counts
    monkeypatch.setattr(
      VideoFile, "_counts", lambda self, frame: seen.append(1) or counts(self, frame)
    )
    np.testing.assert_array_equal(file.read(wanted), through)
  assert len(seen) < 200


# ---- damaged --------------------------------------------------------------------------------


def spoilt(path: pathlib.Path, every: int = 197) -> pathlib.Path:
  """Overwrites single bytes in the middle third of the pictures of an .mp4."""
  data = bytearray(path.read_bytes())
  first = data.index(b"mdat") + 4
  size = int.from_bytes(data[first - 8 : first - 4], "big") - 8
  for place in range(first + size // 3, first + 2 * size // 3, every):
    data[place] ^= 0x5A
  path.write_bytes(data)
  return path


def test_damaged_clips_lose_their_bad_frames_and_are_named(tmp_path, caplog):
  root = tmp_path / "videos"
  root.mkdir()
  video = noisy(60)
  write(root / "fine.mp4", video)
  spoilt(write(root / "bad.mp4", video, options={"g": "15"}))
  with VideoFile(root / "bad.mp4") as file:
    assert file.read(list(range(60))) is None
    good = file.length
    frames = file.read(list(range(good)))
  assert 5 < good < 60 and file.damaged > 5
  # Decoding goes on behind the damage: the last frame is the last one.
  assert np.argmax([psnr(frames[-1], picture) for picture in video]) == 59
  c = config(root, tmp_path / "cache", frames=30, stride=1, short="pad")
  cache = prepare(c, "all")
  (bad,) = (clip for clip in cache.manifest["clips"] if clip["key"] == "bad.mp4")
  assert re.fullmatch(r"damaged: at least \d+ of 60 frames cannot be used", bad["notes"][0])
  assert "1 of 2 all clips are used, but damaged" in caplog.text
  left_out = prepare(config(root, tmp_path / "cache", frames=30, stride=1, damaged="skip"), "all")
  assert [clip["key"] for clip in left_out.manifest["skipped"]] == ["bad.mp4"]
  assert "damaged: " in left_out.manifest["skipped"][0]["reason"]


def test_behind_damage_frames_are_counted_and_not_jumped_to(tmp_path, monkeypatch):
  """The time stamps of what is left no longer tell how many frames come before."""
  path = write(tmp_path / "a.mp4", noisy(400), options={"g": "20"})
  wanted = [*range(280), 395]
  for is_damaged in (False, True):
    if is_damaged:
      spoilt(path)
    with VideoFile(path) as file:
      opened = []
      own = file._open
      monkeypatch.setattr(file, "_open", lambda own=own, opened=opened: opened.append(1) or own())
      found = len(list(file.frames(wanted)))
    assert len(opened) == (1 if is_damaged else 2)
    assert found == (280 if is_damaged else 281)


def test_frames_of_another_size_do_not_count(tmp_path):
  path = tmp_path / "a.ts"
  for name, video in (("1", moving_square(10)), ("2", moving_square(10, 48, 64))):
    write(tmp_path / f"{name}.ts", video)
  path.write_bytes((tmp_path / "1.ts").read_bytes() + (tmp_path / "2.ts").read_bytes())
  with VideoFile(path) as file:
    assert file.read(list(range(file.length))) is None
    assert (file.length, file.damaged) == (10, 10)


def test_a_file_without_pictures_says_so(tmp_path):
  path = tmp_path / "a.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.rate = 44100
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  with pytest.raises(BrokenClip, match="a.mp4: it holds no video, only other streams"):
    VideoFile(path, "a.mp4")
