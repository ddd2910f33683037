"""The ways from a dense checkpoint are overrides that the config takes."""

import itertools

from benchmarks.trained.distil import METHODS, WAYS, config_of
from freqformer.train.experiment import experiment


def test_every_run_is_a_config_of_its_own():
  runs = itertools.product(METHODS.values(), WAYS.values())
  found = [experiment(config_of(method, 1, init_from="any", **way)) for method, way in runs]
  assert len(set(map(repr, found))) == len(METHODS) * len(WAYS)
  assert {exp.train.teacher for exp in found} == {"", "output", "layers"}
