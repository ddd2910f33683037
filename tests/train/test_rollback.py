"""A run whose steps are not finite goes back once, on with other batches, and then stops."""

import json

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data.loader import train_iterator
from freqformer.train import run
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.metrics import read
from tests.command.test_fields import small

pytestmark = pytest.mark.xdist_group("fields")


class Poisoned:
  """Batches that are not finite from number `bad` on."""

  def __init__(self, batches, bad):
    self._batches = batches
    self._bad = bad

  def __iter__(self):
    return self

  def __next__(self):
    number = self.get_state()["next_index"]
    batch = next(self._batches)
    return batch if number < self._bad else batch | {"latent": np.nan * batch["latent"]}

  def get_state(self):
    return self._batches.get_state()

  def set_state(self, state):
    self._batches.set_state(state)


@pytest.fixture
def train(tmp_path, monkeypatch):
  """Returns `(bad in each order, **changes) -> seeds of the orders`, eight steps of a run."""

  def call(bad, **changes):
    config = small(steps=8, target="velocity")
    config.train.update(dict(checkpoint_every=3, keep=9, val_every=0) | changes)
    seeds = []

    def begin(split, size, seed, rows):
      seeds.append(seed)
      return Poisoned(iter(train_iterator(split, size, seed, rows)), bad[len(seeds) - 1])

    monkeypatch.setattr(run, "train_iterator", begin)
    run.train(config, tmp_path)
    return seeds

  return call


NEVER = 99


def test_a_run_goes_back_once_and_on_with_other_batches(train, tmp_path, caplog):
  seeds = train((3, NEVER), log_every=1)
  assert seeds[0] == 0 != seeds[1]
  told = json.loads((tmp_path / "run.json").read_text())
  assert told["rollbacks"] == [{"from": 7, "to": 3}] and told["finished"]
  rows = read(tmp_path / "metrics.jsonl")
  losses = [row["loss"] for row in rows if row["kind"] == "train"]
  assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
  assert np.isfinite(losses).all()
  (warning,) = [row["text"] for row in rows if row["kind"] == "warning"]
  assert "rolled back to step 3, and on with other batches and noise: steps 4 to 7" in warning
  assert "In step 7, the batch itself holds" in warning and warning in caplog.text
  key = {"key": np.zeros(2, np.uint32)}
  keys = [Checkpoints(tmp_path, create=False).restore(key, n, ignore_extra=True) for n in (3, 6)]
  assert (keys[0]["key"] != keys[1]["key"]).any()
  # The next process knows: the same order, and no second time.
  assert Checkpoints(tmp_path, create=False).steps() == [3, 6, 8]
  with pytest.raises(ConfigError, match="training stopped: steps 9 to .*In step"):
    train((0,), steps=20)


@pytest.mark.parametrize(
  "bad, changes, text",
  [
    ((3, 3), dict(log_every=50), "steps 4 to 7 all"),  # a second time
    ((3,), dict(rollback=False), "steps 4 to 7 all"),
    ((1,), dict(log_every=1), "steps 2 to 5 all"),  # there is no checkpoint before
  ],
)
def test_a_run_is_stopped(train, bad, changes, text):
  with pytest.raises(ConfigError, match=f"training stopped: {text}.*In step ., the batch"):
    train(bad, **changes)
