"""Drawing goes on where it was, adds to what is there, and refuses samples of other settings."""

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate import samples
from freqformer.evaluate.draw import draw as draw_samples
from freqformer.evaluate.draw import requests, split_classes
from freqformer.evaluate.restore import Run

RUN = Run(None, None, None, {"class_names": ["a", "b", "c"]})
CONFIG = SampleConfig(batch_size=2)


class Killed(Exception):
  """Ends the second batch of the first run."""


@pytest.fixture
def drawn(monkeypatch):
  """The numbers of the samples that were drawn, batch by batch; sample i is full of i."""
  batches = []

  def compiled(run, config):
    def draw(labels, indices, seed):
      batches.append(indices.tolist())
      if batches == [[0, 10_000], [20_000, 1]]:
        raise Killed
      return np.float32(indices)[:, None, None, None, None] * np.ones((1, 2, 2, 2, 1), np.float32)

    return draw

  monkeypatch.setattr(samples, "_compiled", compiled)
  return batches


def draw(folder, count, seed=0):
  kept = []
  labels, indices = samples.spread_requests(RUN, count)
  latents = samples.draw_missing(
    RUN, folder, labels, indices, {"seed": seed}, CONFIG, lambda x, y, i: kept.extend(i)
  )
  assert kept == indices.tolist()
  return latents[:, 0, 0, 0, 0].tolist(), indices.tolist()


def test_classes_that_were_not_trained_are_left_out_unless_they_are_named():
  counts = {"class_counts": [3, 0, 1]}
  run = Run(None, None, None, RUN.record | counts)
  assert run.trained_classes == ["a", "c"] and RUN.trained_classes == ["a", "b", "c"]
  labels, indices = requests(run, None, 2)
  assert labels.tolist() == [0, 0, 2, 2] and indices.tolist() == [0, 1, 20_000, 20_001]
  assert requests(run, ["b"], 1)[0].tolist() == [1]
  assert samples.spread_requests(run, 5)[0].tolist() == [0, 2, 0, 2, 0]


def test_a_killed_run_goes_on_and_a_longer_one_adds(drawn, tmp_path):
  with pytest.raises(Killed):
    draw(tmp_path, 5)
  found, wanted = draw(tmp_path, 5)
  assert found == wanted == [0, 10_000, 20_000, 1, 10_001]
  # The first batch was there; the interrupted one was drawn again.
  assert drawn == [[0, 10_000], [20_000, 1], [20_000, 1], [10_001]]
  drawn.clear()
  found, wanted = draw(tmp_path, 7)
  assert found == wanted == [0, 10_000, 20_000, 1, 10_001, 20_001, 2]
  # Only what the last file lacked, and what is new; a shorter run draws its own last file.
  assert drawn == [[10_001, 20_001], [2]]


def test_samples_of_other_settings_are_refused(drawn, tmp_path):
  draw(tmp_path, 2)
  with pytest.raises(ConfigError, match="drawn with seed=0, not 1: name another --out"):
    draw(tmp_path, 2, seed=1)


@pytest.mark.parametrize(
  "text, classes",
  [
    ("run", ["run"]),
    ("run,Jump, high", ["run", "Jump, high"]),
    ("Jump, high,run", ["Jump, high", "run"]),
    ("Jump", ["Jump"]),
    ("Jump,run, Jump, high ,a,b,c", ["Jump", "run", "Jump, high", "a,b", "c"]),
    ("a,b", ["a,b"]),
    ("b,a", ["b", "a"]),
    ("run,,", ["run"]),
    ("jump, high,run", ["jump", "high", "run"]),  # refused later: no such classes
    ("", []),
  ],
)
def test_classes_may_have_commas_in_their_names(text, classes):
  names = ["run", "Jump", "Jump, high", "a", "b", "c", "a,b"]
  assert split_classes(text, names) == classes


@pytest.mark.parametrize("seed", [-1, 2**32, 99_999_999_999])
def test_a_seed_that_a_key_cannot_hold_is_refused(seed):
  """JAX would take it modulo 2^32, and tell nobody."""
  with pytest.raises(ConfigError, match=f"^seed={seed} must lie in 0..4,294,967,295: a random key"):
    draw_samples(None, [0], [0], seed, None)


def test_numbers_are_those_of_eval():
  labels, indices = samples.spread_requests(RUN, 6)
  own = dict(zip(*(x.tolist() for x in requests(RUN, None, 2)[::-1]), strict=True))
  assert dict(zip(indices.tolist(), labels.tolist(), strict=True)) == own
  assert samples.clip_path("x", "b", 10_001).as_posix() == "x/b/00001.mp4"


def test_samples_of_eval_are_read(tmp_path):
  with pytest.raises(ConfigError, match="run eval.py first"):
    samples.read_drawn(tmp_path)
  np.savez(tmp_path / "latents.npz", latents=np.zeros((1, 2)), labels=[3])
  latents, labels = samples.read_drawn(tmp_path)
  assert latents.shape == (1, 2) and labels.tolist() == [3]
