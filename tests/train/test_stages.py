"""Runs whose layers attend densely at first, then ever fewer of them."""

import pytest

from freqformer.config import ConfigError
from freqformer.cost import step_cost
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.experiment import experiment
from freqformer.train.metrics import read
from freqformer.train.run import train
from tests.command.test_fields import small


def config_of(steps, method="sliding_tile(window=(1, 1, 1))", **changes):
  config = small(steps)
  config.model.update(depth=3, remat=False)
  config.model.attention.update(method=method, qk_gain=1.0)
  config.train.update(dict(dense_steps=2, dense_fall=1, lr=0.01, val_every=0) | changes)
  return config


def lines(workdir):
  return [row for row in read(workdir / "metrics.jsonl") if row["kind"] == "train"]


def test_a_run_of_stages_in_two_halves_is_the_whole_and_begins_as_a_dense_one(tmp_path):
  """Two dense steps, one with a dense layer, one without."""
  train(config_of(4), tmp_path / "whole")
  train(config_of(2), tmp_path / "halves")
  train(config_of(4), tmp_path / "halves")
  train(config_of(2, "dense", dense_steps=0, dense_fall=0), tmp_path / "dense")
  whole, halves, dense = (lines(tmp_path / name) for name in ("whole", "halves", "dense"))
  assert [row["loss"] for row in whole] == [row["loss"] for row in halves]
  states = [Checkpoints(tmp_path / name, create=False) for name in ("whole", "halves")]
  found = [own._manager.restore(4)["arrays"] for own in states]
  assert found[0].keys() == found[1].keys()
  assert all((found[0][name] == array).all() for name, array in found[1].items())

  losses = [row["loss"] for row in dense]
  assert [row["loss"] for row in whole[:2]] == pytest.approx(losses, rel=1e-6)
  assert [row["density"] for row in whole] == pytest.approx([1, 1, 1 / 2, 1 / 4], rel=1e-6)
  assert [row["dense_layers"] for row in whole] == [3, 3, 1, 0] and "dense_layers" not in dense[0]
  exp = experiment(config_of(4))
  batch = exp.train.batch_size
  counted = [step_cost(exp.model, exp.latent_shape, dense=count).total for count in (3, 3, 1, 0)]
  for rows in (whole, halves):
    flops = [row["flops"] for row in rows]
    assert flops == pytest.approx([batch * sum(counted[: i + 1]) for i in range(4)])


@pytest.mark.parametrize("method", ["octaves", "block_topk(density=0.5)"])
def test_methods_that_cannot_be_dense_are_refused(method):
  with pytest.raises(ConfigError, match="trained parts of it take part .* set both to 0"):
    experiment(config_of(4, method))
