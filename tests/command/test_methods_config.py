"""The sweep over methods: every trial can be built, at the density that its config promises."""

import pathlib

import numpy as np
import pytest
from flax import nnx

from freqformer.command.files import check_keys, load_config, read_config
from freqformer.model.dit import VideoDiT
from freqformer.train.experiment import experiment

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "methods.py"
TRIALS = list(load_config(CONFIG, ("sweep",)).sweep())
SHAPE = (8, 12, 12, 16)  # the demo's latents


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial["model.attention.method"])
def test_trials_have_the_promised_density(trial):
  config = read_config(CONFIG)
  check_keys(config, trial)
  config.update_from_flattened_dict(trial)
  model = experiment(config.to_dict()).model
  shapes = nnx.eval_shape(lambda: VideoDiT(model, SHAPE, 8, nnx.Rngs(0)))
  assert len(shapes.runs) == 1
  ((_, method),), layout = model.runs(), model.layout(SHAPE)
  density = method.pairs(layout, model.heads).pairs / (layout.n**2 * model.heads)
  low, high = (1, 1) if trial["model.attention.method"] == "dense" else (0.19, 0.245)
  assert low <= np.round(density, 3) <= high
