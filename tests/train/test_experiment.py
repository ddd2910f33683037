"""Grid and data decide some numbers of a run: once, recorded, and kept."""

import dataclasses
import json
import types

import numpy as np
import pytest
from flax import nnx

from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.evaluate.draw import sample_config
from freqformer.grid.rotary import grid_theta
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT
from freqformer.train.experiment import experiment, of_record, recorded
from tests import tiny_config
from tests.command.process import ROOT

GRID = (3, 3, 4)  # latent tokens of the tiny config
HEAD_DIM = 12


@pytest.fixture
def config():
  return read_config(tiny_config.__file__)


def test_a_run_records_what_its_grid_decides(config):
  exp = experiment(config)
  assert exp.model.rope_theta == grid_theta(GRID, HEAD_DIM)
  record = json.loads(json.dumps(recorded(config, exp).to_dict()))
  assert tuple(record["model"]["rope_theta"]) == exp.model.rope_theta
  assert record["model"]["attention"]["qk_gain"] == exp.model.attention.qk_gain >= 1
  assert of_record(record) == exp


def test_a_run_records_the_spectrum_of_its_latents_and_goes_on_with_it(config):
  with config.unlocked():
    config.model.precondition = True
  rng = np.random.default_rng(0)
  exp = experiment(config)
  assert exp.model.spectrum == ()
  exp = exp.with_spectrum(rng.standard_normal((4, *exp.latent_shape)))
  record = json.loads(json.dumps(recorded(config, exp).to_dict()))
  assert of_record(record) == exp and len(exp.model.spectrum) > 0
  again = experiment(config, record)
  assert again == exp
  # Other latents, such as those of more clips, do not change a model that was trained.
  assert again.with_spectrum(3 * rng.standard_normal((4, *exp.latent_shape))) == exp
  with config.unlocked():
    config.model.precondition = False
  plain = experiment(config)
  assert plain.with_spectrum(rng.standard_normal((4, *exp.latent_shape))) == plain


def test_a_record_without_the_keys_keeps_what_ran(config):
  old = json.loads(config.to_json())
  del old["model"]["rope_theta"]
  del old["model"]["attention"]["qk_gain"]
  before = of_record(old).model
  assert before.rope_theta == (10_000.0,) * 3
  assert before.attention.qk_gain == 1.0
  assert experiment(config, old).model == before  # a run that goes on
  with config.unlocked():
    config.model.rope_theta = (50.0,)
    config.model.attention.qk_gain = 2.0
  asked = experiment(config, old).model
  assert asked.rope_theta == (50.0,) * 3
  assert asked.attention.qk_gain == 2.0


def test_a_record_from_before_windows_were_dealt_still_loads(config):
  """An even window is refused in a config, and runs as it did in a record that lacks the key."""
  for name, unit in (("freqformer", {}), ("sliding_tile", {"unit": "tiles"})):
    old = json.loads(config.to_json())
    own = {"window": (1, 1, 2), **unit}
    old["model"]["attention"] |= {"method": name, name: own, "tile": (3, 3, 1), "block": 9}
    assert of_record(old).model.attention.named(name).deal == "as_is"
    with pytest.raises(ConfigError, match="cannot be centred along x.*deal='as_is' goes on"):
      experiment(old)


def test_a_model_keeps_its_theta_on_other_grids():
  """The sampler makes tables of any grid; the layers hold what the first one decided."""
  config = model_config(
    dict(size="custom", width=24, depth=1, heads=1, patch=(1, 1, 1), attention=dict(method="dense"))
  )
  model = nnx.eval_shape(lambda: VideoDiT(config, (8, 6, 6, 1), 1, nnx.Rngs(0)))
  assert model.runs[0].attention.theta == grid_theta((8, 6, 6), 24)
  assert model.config.rope_theta == grid_theta((8, 6, 6), 24)
  assert model.config.resolved((16, 12, 12, 1)) == model.config


@pytest.mark.parametrize("theta", [(1.0, 2.0), (0.5,), (float("nan"),)])
def test_a_wrong_theta_is_refused(theta, config):
  with config.unlocked():
    config.model.rope_theta = theta
  with pytest.raises(ConfigError, match="rope_theta"):
    experiment(config)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(), "needs config.model.first_frame=True"),
    (dict(model__first_frame=True, data__frames=2), "raise config.data.frames"),
    (dict(model__first_frame=True), "'lowpass' mixes all frames of a clip"),
  ],
)
def test_first_frames_need_a_model_and_latent_frames_of_their_own(values, message, config):
  with config.unlocked():
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in values.items()})
    config.train.first_frame = 0.5
    config.model.precondition = False
  with pytest.raises(ConfigError, match=message):
    experiment(config)
  with config.unlocked():
    config.update_from_flattened_dict({"model.first_frame": True, "data.frames": 8})
    config.data.codec.update(factor=(1, *config.data.codec.factor[1:]))
  assert experiment(config).train.first_frame == 0.5


@pytest.mark.parametrize(
  "dropout, sample, message",
  [
    (0.0, dict(guidance=4.0), "config.sample: guidance=4 needs the null class, which "),
    (0.0, dict(guidance=0.0), "guidance=0 needs the null class"),
    (0.0, dict(guidance=4.0, guidance_interval=(0.01, 0.02)), None),
    (0.0, dict(guidance=1.0), None),
    (1.0, dict(guidance=1.0), "guidance=1 needs the classes, which train.label_dropout=1 never"),
    (1.0, dict(guidance=0.0, guidance_interval=(0.5, 1.0)), "needs the classes"),
    (1.0, dict(guidance=0.0), None),
    (0.5, dict(guidance=4.0), None),
  ],
)
def test_samples_need_what_training_trains(dropout, sample, message, config):
  with config.unlocked():
    config.train.label_dropout = dropout
    config.sample.update(sample)
  record = json.loads(config.to_json())
  if message is None:
    experiment(config)
  else:
    with pytest.raises(ConfigError, match=message):
      experiment(config)
  # A run of before the check can be loaded; to sample from it so is refused.
  run = types.SimpleNamespace(experiment=of_record(record))
  if message is None:
    assert sample_config(run, 2) == dataclasses.replace(run.experiment.sample, batch_size=2)
  else:
    with pytest.raises(ConfigError, match=message.removeprefix("config.sample: ")):
      sample_config(run, 2)


def test_first_frames_need_the_velocity_of_the_draw():
  config = read_config(ROOT / "configs" / "fields.py")
  with config.unlocked():
    config.model.first_frame = True
    config.train.first_frame = 0.5
    with pytest.raises(ConfigError, match="set config.data.target='velocity'"):
      experiment(config)
    config.data.target = "velocity"
  assert experiment(config).train.first_frame == 0.5
