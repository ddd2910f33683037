"""The demo's parts are overrides that its config takes."""

from benchmarks.trained.demo_parts import PARTS
from benchmarks.trained.runs import ROOT
from freqformer.command.files import read_config
from freqformer.train.experiment import experiment


def test_every_part_is_a_config_of_its_own():
  experiments = set()
  for overrides in PARTS.values():
    config = read_config(ROOT / "configs" / "demo.py")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    experiments.add(repr(experiment(config)))
  assert len(experiments) == len(PARTS)
