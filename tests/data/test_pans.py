"""Camera moves: the motion that is drawn is the one that is recorded, and no split leaks."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from freqformer.config import ConfigError
from freqformer.data import pans
from freqformer.data.pans import PansConfig, Shot, Sprite

SMALL = PansConfig(rows=32, cols=48, frames=5, directions=8, speeds=(1.5,))


def blob(size: int, place, radius: float) -> Image.Image:
  """A white spot on black; places are (down, across) between pixels, as `Shot.place` is."""
  down, across = (np.arange(size) + 0.5 - at for at in place)
  squared = down[:, None] ** 2 + across**2
  grey = np.rint(255 * np.exp(-squared / (2 * radius**2))).astype(np.uint8)
  return Image.fromarray(grey).convert("RGB")


def centroids(video: np.ndarray) -> np.ndarray:
  """Returns the middle of each frame's light, (down, across) from the frame's middle."""
  light = video.astype(float).mean(-1)
  rows, cols = light.shape[1:]
  down = np.arange(rows)[:, None] + 0.5 - rows / 2
  across = np.arange(cols) + 0.5 - cols / 2
  sums = [(light * axis).sum((1, 2)) for axis in (down, across)]
  return np.stack(sums, 1) / light.sum((1, 2))[:, None]


def scene(seed: int, size=(160, 200)) -> Image.Image:
  """A picture whose amplitudes fall as those of photographs do, by 1 / frequency."""
  rng = np.random.default_rng(seed)
  down, across = np.meshgrid(*map(np.fft.fftfreq, size), indexing="ij")
  gain = 1 / np.maximum(np.hypot(down, across), 1 / max(size))[..., None]
  noise = np.fft.fft2(rng.standard_normal((*size, 3)), axes=(0, 1))
  grey = np.fft.ifft2(noise * gain, axes=(0, 1)).real
  return Image.fromarray(np.clip(127.5 + 45 * grey / grey.std(), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", SMALL.motions)
def test_a_spot_moves_as_recorded(name):
  """By the spot's path alone: nothing here knows of poses."""
  moved = pans.motion(name, 1.5, SMALL)
  start = np.array([4.0, 6.0])  # of the spot in the middle frame, pixels of the clip
  scale = 2.0
  photo = blob(160, 80 + scale * start, scale * 2)
  found = centroids(pans.render_clip(photo, Shot(moved, scale, (80.0, 80.0), None), SMALL))
  np.testing.assert_allclose(found[2], start, atol=0.1)
  if name in pans.DIRECTIONS:
    words = set(name.split("_"))
    wanted = [("down" in words) - ("up" in words), ("right" in words) - ("left" in words)]
    wanted = 1.5 * np.array(wanted) / math.hypot(*wanted)
    np.testing.assert_allclose(np.diff(found, axis=0), np.tile(wanted, (4, 1)), atol=0.1)
    np.testing.assert_allclose(moved.velocity, wanted)
  radius = np.hypot(*found.T)
  angle = np.degrees(np.unwrap(np.arctan2(-found[:, 0], found[:, 1])))
  if name.startswith("zoom"):
    # The nearer edge, 16 pixels away, moves by 1.5.
    assert math.log(moved.zoom) == pytest.approx(1.5 / 16 * (1 if name == "zoom_in" else -1))
    np.testing.assert_allclose(radius[1:] / radius[:-1], moved.zoom, atol=0.003)
  if name.startswith("turn"):
    assert math.radians(moved.angle) == pytest.approx(1.5 / 16 * (1 if "left" in name else -1))
    np.testing.assert_allclose(np.diff(angle), moved.angle, atol=0.1)  # of 5.4 degrees


def test_what_a_pixel_cannot_show_is_left_out():
  """Single columns of black and white are grey from four photograph pixels a pixel on."""
  stripes = np.zeros((300, 300, 3), np.uint8)
  stripes[:, ::2] = 255
  for name in ("right", "zoom_out", "turn_left"):
    moved = pans.motion(name, 1.5, SMALL)
    video = pans.render_clip(
      Image.fromarray(stripes), Shot(moved, 4.0, (150.0, 150.0), None), SMALL
    )
    assert video.std() < 2 and abs(video.mean() - 127.5) < 2


@pytest.mark.parametrize("name", SMALL.motions)
def test_the_smallest_photograph_is_never_left(name):
  rows, cols = pans.least_size(SMALL)
  white = Image.new("RGB", (cols, rows), "white")
  for number in range(2):
    shot = pans.draw_shot(SMALL, "white.png", name, number, (rows, cols))
    assert pans.render_clip(white, shot, SMALL).min() == 255
    closest = min(shot.motion.zoom**after for after in (-2, 2))
    assert shot.scale * closest >= 1 - 1e-9  # never larger than the photograph's own pixels


def test_a_clip_is_a_function_of_seed_photograph_and_number():
  config = dataclasses.replace(SMALL, sprite=True)
  drawn = pans.draw_shot(config, "a.jpg", "up", 0, (160, 200))
  assert drawn == pans.draw_shot(config, "a.jpg", "up", 0, (160, 200))
  other = dataclasses.replace(config, seed=1)
  for arguments in (
    (config, "b.jpg", "up", 0),
    (config, "a.jpg", "up", 1),
    (other, "a.jpg", "up", 0),
  ):
    changed = pans.draw_shot(*arguments, (160, 200))
    assert changed.place != drawn.place and changed.sprite.place != drawn.sprite.place
  a, b = (pans.render_clip(scene(0), drawn, config) for _ in range(2))
  assert np.array_equal(a, b) and a.std() > 10


def test_speeds_are_taken_in_turn():
  config = dataclasses.replace(SMALL, speeds=(0.5, 2.0))
  shots = [pans.draw_shot(config, "a.jpg", "right", number, (160, 200)) for number in range(3)]
  assert [shot.motion.velocity[1] for shot in shots] == [0.5, 2.0, 0.5]


def test_a_sprite_moves_on_its_own():
  """A disc of white crosses a black picture that moves the other way."""
  pixels = np.zeros((200, 200, 3), np.uint8)
  pixels[100:] = 255
  sprite = Sprite(velocity=(0.5, 1.5), center=(1.0, -2.0), radius=4.0, place=(150.0, 100.0))
  shot = Shot(pans.motion("left", 1.5, SMALL), 2.0, (50.0, 100.0), sprite)
  found = centroids(pans.render_clip(Image.fromarray(pixels), shot, SMALL))
  after = np.arange(-2, 3)[:, None]
  np.testing.assert_allclose(found, [1.0, -2.0] + after * [0.5, 1.5], atol=0.1)


@pytest.fixture
def folder(tmp_path):
  """Six scenes, one of them three times, and what cannot be used."""
  for seed in range(6):
    scene(seed).save(tmp_path / f"{seed}.png")
  (tmp_path / "more").mkdir()
  scene(0).resize((100, 80)).save(tmp_path / "more" / "copy.jpg")
  scene(0).point(lambda grey: grey // 2).save(tmp_path / "more" / "dark.png")
  (tmp_path / "link.png").symlink_to(tmp_path / "1.png")
  scene(7, (20, 200)).save(tmp_path / "flat.png")
  (tmp_path / "drawing.svg").write_text("<svg/>")
  (tmp_path / "broken.jpg").write_bytes((tmp_path / "more" / "copy.jpg").read_bytes()[:400])
  (tmp_path / "notes.txt").write_text("no picture")
  return tmp_path


@pytest.mark.parametrize("seed", range(4))
def test_no_scene_is_in_both_splits(folder, seed):
  config = dataclasses.replace(SMALL, val=0.4, seed=seed)
  found = pans.find_photographs(folder, config)
  assert set(found.sizes) == {*(f"{i}.png" for i in range(6)), "more/copy.jpg", "more/dark.png"}
  assert found.sizes["more/copy.jpg"] == (80, 100)
  same = {found.splits[key] for key in ("0.png", "more/copy.jpg", "more/dark.png")}
  assert len(same) == 1
  assert sum(found.splits[f"{i}.png"] == "val" for i in range(6)) == 2
  assert found.open("more/copy.jpg").size == (100, 80)


def test_what_cannot_be_used_is_named(folder):
  skipped = pans.find_photographs(folder, SMALL).skipped
  assert set(skipped) == {"flat.png", "drawing.svg", "broken.jpg"}
  rows, cols = pans.least_size(SMALL)
  assert (
    f"it has 20 x 200 pixels (rows x cols), the moves need {rows} x {cols}" in skipped["flat.png"]
  )
  assert skipped["drawing.svg"] == "Pillow cannot read it (no known format)"
  assert "cannot read it" in skipped["broken.jpg"]


def test_a_folder_without_two_scenes_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="nowhere' is not a folder"):
    pans.find_photographs(tmp_path / "nowhere", SMALL)
  with pytest.raises(ConfigError, match=r"two scenes at least.*0 can be used \(0 scenes\)"):
    pans.find_photographs(tmp_path, SMALL)
  scene(0).save(tmp_path / "a.png")
  scene(0).save(tmp_path / "b.png")
  scene(1, (20, 200)).save(tmp_path / "small.png")
  with pytest.raises(ConfigError, match=r"(?s)2 can be used \(1 scenes\), 1 cannot.*small.png: it"):
    pans.find_photographs(tmp_path, SMALL)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(rows=31), "must be even"),
    (dict(directions=6), "directions=6 must be 4, or 8"),
    (dict(speeds=()), "must have a speed"),
    (dict(speeds=(1.0, 0.0)), "speeds=.* must be above 0"),
    (dict(val=1.0), "must be above 0 and below 1"),
  ],
)
def test_wrong_settings_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    PansConfig(**values)
