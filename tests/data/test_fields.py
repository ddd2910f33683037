"""Random fields: reproducible draws, their spectrum and motion, planted copies, refusals."""

import concurrent.futures
import dataclasses
import math

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data.fields import BOX, Fields, FieldsConfig, plant, spectra
from freqformer.data.loader import train_iterator, val_batches
from freqformer.data.sources import data_config, open_split

SMALL = FieldsConfig(grid=(6, 8, 8), labels="velocity", val_clips=400)


def test_a_draw_depends_on_seed_split_and_number_only():
  fields = Fields(SMALL, "train")
  numbers = [7, 2_000_000_000, 3, 7]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    drawn = list(pool.map(fields.__getitem__, numbers))
  alone = Fields(SMALL, "train")[7]
  for item in (drawn[0], drawn[3]):
    assert item.keys() == {"latent", "label", "index"} and item["index"] == 7
    np.testing.assert_array_equal(item["latent"], alone["latent"])
  others = [Fields(SMALL, "val")[7], Fields(dataclasses.replace(SMALL, seed=1), "train")[7]]
  for other in (*drawn[1:3], *others):
    assert np.abs(other["latent"] - alone["latent"]).max() > 0.1
  with pytest.raises(IndexError, match="There are 400 fields"):
    Fields(SMALL, "val")[400]


def test_the_loader_goes_on_where_it_was_and_never_repeats():
  fields = open_split(SMALL, "train")
  batches = train_iterator(fields, 3, seed=5)
  first = [next(batches) for _ in range(4)]
  resumed = train_iterator(fields, 3, seed=5)
  next(resumed)
  state = resumed.get_state()
  resumed = train_iterator(fields, 3, seed=5)
  resumed.set_state(state)
  for wanted in first[1:]:
    found = next(resumed)
    assert found.keys() == wanted.keys()
    for name in wanted:
      np.testing.assert_array_equal(found[name], wanted[name])
  assert len({int(i) for batch in first for i in batch["index"]}) == 12
  counts = [batch["weight"].sum() for batch in val_batches(open_split(SMALL, "val"), 64)]
  assert sum(counts) == 400


@pytest.fixture(scope="module")
def periodograms():
  """`{label: mean of |F x|^2 / n over clips and channels}`, and how many were averaged."""
  fields = Fields(SMALL, "val")
  found = {}
  for item in map(fields.__getitem__, range(len(fields))):
    power = np.abs(np.fft.fftn(item["latent"], axes=(0, 1, 2))) ** 2 / math.prod(SMALL.grid)
    found.setdefault(int(item["label"]), []).append(power.mean(-1))
  return {label: (np.mean(power, 0), 4 * len(power)) for label, power in found.items()}


def test_clips_have_unit_variance_and_the_spectrum_of_their_velocity(periodograms):
  wanted = spectra(SMALL)
  assert wanted.mean((1, 2, 3)) == pytest.approx(1) and (wanted > 0).all()
  assert sorted(periodograms) == list(range(9))
  for label, (power, count) in periodograms.items():
    # A periodogram over its spectrum is exponential with mean 1 and standard deviation 1, or
    # sqrt(2) where it is real.
    ratio = power / wanted[label]
    assert abs(ratio.mean() - 1) < 5 * math.sqrt(2 / (count * ratio.size))
    assert np.abs(ratio - 1).max() < 6.5 * math.sqrt(2 / count)
    wrong = (power / np.delete(wanted, label, 0)).mean((1, 2, 3))
    assert wrong.min() > 1.15
  variance = np.mean([power.mean() for power, _ in periodograms.values()])
  assert variance == pytest.approx(1, abs=0.1)


def test_a_velocity_moves_the_covariance():
  """On a cubic grid `C_v(d, r) = C_0(d, r - v d)`; on any grid the field is real."""
  config = FieldsConfig(grid=(8, 8, 8), speed=2)
  covariance = np.fft.ifftn(spectra(config), axes=(1, 2, 3))
  np.testing.assert_allclose(covariance.imag, 0, atol=1e-15)
  covariance = covariance.real
  still = covariance[config.velocities.index((0, 0))]
  for velocity, moved in zip(config.velocities, covariance, strict=True):
    for lag in range(8):
      shift = (lag * velocity[0], lag * velocity[1])
      np.testing.assert_allclose(moved[lag], np.roll(still[lag], shift, (0, 1)), atol=1e-12)
  odd = spectra(FieldsConfig(grid=(5, 6, 7)))
  np.testing.assert_allclose(np.fft.ifftn(odd, axes=(1, 2, 3)).imag, 0, atol=1e-15)


def test_decorrelation_fades_the_covariance_over_frames():
  config = FieldsConfig(grid=(16, 4, 4), speed=1)
  faded = dataclasses.replace(config, decorrelation=1.5)
  before = np.fft.ifft(spectra(config), axis=1)[:, :9]
  after = np.fft.ifft(spectra(faded), axis=1)[:, :9]
  assert spectra(faded).min() > 0
  lag = np.arange(9)[:, None, None]
  period = np.exp(-lag / 1.5) + np.exp((lag - 16) / 1.5)
  np.testing.assert_allclose(after, before * period / period[0], atol=1e-12)


COPIES = FieldsConfig(grid=(4, 16, 12), channels=3, copies=3, target="velocity")


@pytest.mark.parametrize("index", range(4))
def test_copies_are_equal_and_far(index):
  latent = Fields(COPIES, "train")[index]["latent"]
  places = {}
  for place in np.ndindex(*COPIES.grid):
    places.setdefault(latent[place].tobytes(), []).append(place)
  pairs = [found for found in places.values() if len(found) > 1]
  assert len(pairs) == COPIES.copies * math.prod(BOX) and {len(found) for found in pairs} == {2}
  gap = np.abs(np.diff(pairs, axis=1)[:, 0])
  gap = np.minimum(gap, np.array(COPIES.grid) - gap)
  assert (gap[:, 1:] >= np.array([6, 4])).any(1).all()
  # White noise of unit variance, which a smooth field's neighbours are not.
  planted = latent[tuple(np.array([found[0] for found in pairs]).T)]
  assert planted.std() == pytest.approx(1, abs=0.15)  # of 288 values
  assert Fields(COPIES, "train").reference is None and Fields(COPIES, "train").target is None


def test_places_of_copies_vary():
  """Neither a place nor the way between two places is fixed."""
  rngs = map(np.random.default_rng, range(40))
  corners = np.array([[[a.ravel()[0] for a in box] for box in plant(COPIES, r)[0]] for r in rngs])
  ways = (corners[:, 1] - corners[:, 0]) % COPIES.grid
  assert len(np.unique(corners[:, 0], axis=0)) > 30 and len(np.unique(ways, axis=0)) > 10


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(copies=3), "target='posterior' is not known with copies=3"),
    (dict(copies=9, target="velocity"), "copies=9 must be at most 8 on grid=(8, 16, 16)"),
    (dict(copies=1, target="velocity", grid=(8, 18, 16)), "a grid of whole boxes of (2, 4, 4)"),
    (dict(copies=1, target="velocity", grid=(8, 4, 4)), "at least two along y or x"),
    (dict(grid=(0, 4, 4)), "grid=(0, 4, 4) must be at least 1"),
    (dict(labels="speed"), "labels='speed' must be one of none, velocity"),
    (dict(target="posteriors"), "did you mean 'posterior'?"),
    (dict(decorrelation=-1.0), "decorrelation=-1.0 must be at least 0"),
    (dict(root="videos"), "config.data has no key 'root'"),
    (dict(source="field"), "config.data.source='field' is unknown; did you mean 'fields'?"),
    (dict(source="folder"), "config.data has no key 'grid'"),
  ],
)
def test_refusals(changes, message):
  values = dict(source="fields", grid=(8, 16, 16)) | changes
  with pytest.raises(ConfigError) as error:
    data_config(values)
  assert message in str(error.value)


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_show_three_channels(channels):
  config = FieldsConfig(grid=(2, 4, 3), channels=channels)
  latents = np.zeros((1, *config.latent_shape), np.float32)
  latents[0, 1, 2, 0, 0] = 3
  fields = Fields(config, "val")
  video = config.decode(latents, fields.statistics)
  assert video.shape == (1, *fields.video_shape, 3) and video.dtype == np.uint8
  red = video[0, 1, 16:24, :8]
  assert (red[..., 0] == 255).all() and (red[..., 1] == (255 if channels == 1 else 128)).all()
  video[0, 1, 16:24, :8] = 128
  assert (video == 128).all()
