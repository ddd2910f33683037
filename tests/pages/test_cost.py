"""Training as cost.json counts it."""

import pytest

from freqformer.cost import step_cost
from freqformer.pages.cost import counted
from freqformer.train.experiment import experiment
from tests.command.test_fields import small


def test_training_is_the_mean_over_the_stages_of_a_run():
  """Two steps are dense, one has two dense layers of three, one has one, one has none."""
  config = small(steps=5)
  config.model.depth = 3
  config.model.attention.method = "sliding_tile(window=(1, 1, 1))"
  config.train.update(dense_steps=2, dense_fall=2, distill=1.0, distill_at="layers")
  exp = experiment(config)
  costs = [
    step_cost(exp.model, exp.latent_shape, dense=layers, teacher="layers").total
    for layers in (3, 3, 2, 1, 0)
  ]
  found = counted(exp)["training"]
  assert found["own"]["total_flops"] == pytest.approx(sum(costs) / 5)
  dense = step_cost(exp.model.with_method("dense"), exp.latent_shape)
  assert found["dense"]["total_flops"] == dense.total
