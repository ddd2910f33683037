"""Every figure has its floor and its controls, at equal counts."""

import types

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data import pans
from freqformer.data.codec import CodecConfig
from freqformer.evaluate import measure
from freqformer.evaluate.backbones import Backbone
from freqformer.evaluate.measure import Clips

RNG = np.random.default_rng(0)
T, SIDE = 8, 16


def moments(videos):
  """Stands in for a network: the mean and the deviation over time of each clip."""
  grey = videos.mean(-1)
  return np.stack([grey.mean((1, 2, 3)), grey.std(1).mean((1, 2))], -1)


NETWORK = Backbone("moments", moments, "0123", "all")


def clips(count, contrast=1.0, noise=0.0):
  """Clips of smooth waves that move; two neighbours are views of one."""
  t = np.arange(T)[:, None, None]
  x = np.arange(SIDE)
  phase = RNG.uniform(0, 2 * np.pi, (count, 1, 1, 1))
  wave = np.sin(2 * np.pi * (x / SIDE + t / T) + phase) * np.ones((SIDE, 1))
  grey = 128 + 50 * contrast * wave + noise * RNG.normal(size=wave.shape)
  videos = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, -1)
  return Clips(videos, np.arange(count) % 2, np.arange(count) // 2, lambda x: x)


@pytest.fixture(scope="module")
def rows():
  metrics = [measure.metric(name, NETWORK, 2) for name in measure.NAMES]
  found = measure.measure(metrics, clips(30, contrast=0.5, noise=6), clips(60), splits=3)
  return {row["name"]: row for row in found}


def test_values_are_beyond_their_floors(rows):
  assert list(rows) == ["fvd_moments", "kvd_moments", "psd", "flicker"]
  for row in rows.values():
    assert row["counts"] == {"samples": 30, "real": 60, "compared": 30, "with": 30, "halvings": 3}
    assert set(row["controls"]) == {"colour_noise", "shuffled", "frozen"}
    assert row["mean"] > 5 * abs(row["floor"]["mean"]) or row["name"] == "flicker"
    assert row["value"] == pytest.approx(row["mean"], rel=0.3)
  # Others, not the same clips once more.
  assert rows["fvd_moments"]["floor"]["mean"] > 1e-6
  assert rows["flicker"]["floor"]["mean"] == pytest.approx(1, abs=0.2)
  assert rows["flicker"]["value"] > 1.5
  assert rows["flicker"]["controls"]["frozen"]["mean"] < 0.01
  assert rows["psd"]["controls"]["shuffled"]["mean"] > 3 * rows["psd"]["floor"]["mean"]
  by_band = rows["psd"]["db_by_time_and_space"]
  assert np.shape(by_band) == (len(rows["psd"]["time_bands"]), len(rows["psd"]["space_bands"]))
  # Half the contrast is -6 dB where the wave is, and noise is added where it is not.
  assert min(x for row in by_band for x in row if x is not None) == pytest.approx(-6, abs=1)
  assert by_band[-1][-1] > 5


def test_tables_have_all(rows):
  head, *lines = measure.table(list(rows.values()))
  assert head == [
    "metric",
    "value",
    "at equal counts",
    "real",
    "colour_noise",
    "shuffled",
    "frozen",
  ]
  assert [line[0] for line in lines] == list(rows) and lines[2][1].endswith("dB")


def test_views_of_a_clip_are_on_one_side():
  groups = np.arange(11) // 2
  for first, second in measure.halvings(groups, splits=5, seed=0):
    assert not set(groups[first]) & set(groups[second])
    assert sorted([*first, *second]) == list(range(11))
    assert abs(len(first) - len(second)) <= 1


def test_too_few_are_refused_before_anything_is_decoded():
  def decode(latents):
    raise AssertionError("decoded")

  few = Clips(np.zeros((5, 1)), np.zeros(5), np.arange(5), decode)
  fvd = measure.metric("fvd", NETWORK, 2)
  with pytest.raises(ConfigError, match="at least 3 samples and twice as many real .* 5 samples"):
    measure.measure([fvd], few, few)


def test_motion_is_a_share_beside_that_of_real_clips():
  names = ["left", "right"]
  t = np.arange(T)[:, None, None]
  x = np.arange(32)
  wave = 128 + 50 * np.sin(2 * np.pi * (x - t) / 16) * np.cos(np.arange(32) / 3)[:, None]
  right = np.repeat(np.uint8(wave)[None, ..., None], 3, -1)
  both = np.concatenate([right[:, ::-1], right])
  data = types.SimpleNamespace(codec=CodecConfig(factor=(1, 8, 8), channels=3), frames=T)
  run = types.SimpleNamespace(experiment=types.SimpleNamespace(data=data), class_names=names)
  assert set(names) <= set(pans.DIRECTIONS)
  real = Clips(both, np.array([0, 1]), np.arange(2), lambda x: x)
  samples = Clips(both, np.array([1, 1]), np.arange(2), lambda x: x)
  row = measure.motion_row(samples, real, run)
  assert row["value"] == 0.5 and row["floor"] == {"mean": 1.0}
  run.class_names = ["Cats", "Dogs"]
  with pytest.raises(ConfigError, match="none of this run's is .e.g. 'Cats'."):
    measure.motion_row(samples, real, run)
