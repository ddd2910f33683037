"""Wan's noise levels: those of diffusers, and UniPC on them by the paper's integrals."""

import json

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.diffusion.solvers import unipc
from freqformer.wan.levels import LevelSchedule, read_schedule
from tests import golden

CASES = json.loads(golden.path("wan_levels").read_text())["cases"]  # tools/wan_levels.py
START = np.linspace(-2, 2, 8)
# scheduler/scheduler_config.json of Wan2.1-T2V-1.3B-Diffusers.
PUBLISHED = {
  "_class_name": "UniPCMultistepScheduler",
  "_diffusers_version": "0.33.0.dev0",
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "disable_corrector": [],
  "dynamic_thresholding_ratio": 0.995,
  "final_sigmas_type": "zero",
  "flow_shift": 3.0,
  "lower_order_final": True,
  "num_train_timesteps": 1000,
  "predict_x0": True,
  "prediction_type": "flow_prediction",
  "solver_order": 2,
  "solver_p": None,
  "solver_type": "bh2",
  "thresholding": False,
  "use_flow_sigmas": True,
  "use_karras_sigmas": False,
}


def velocity(x, level):
  return np.tanh(2 * x) + level


def points(table):
  """Returns the sample after each evaluation of a solver's table."""
  found = []
  kept = [START] * table.weights.shape[1]
  for time, weights in zip(table.times, table.weights, strict=True):
    kept = weights @ np.stack([*kept, velocity(kept[0], time)])
    found.append(kept[0])
  return np.stack(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['shift']:g}-{case['steps']}")
def test_levels_and_end_states_are_those_of_diffusers(case):
  """Levels and times are equal; its coefficients are float32, so that ends are to rounding."""
  levels = LevelSchedule(shift=case["shift"]).levels(case["steps"])
  assert levels.sigmas.dtype == np.float64 and levels.timesteps.dtype == np.int64
  np.testing.assert_array_equal(levels.sigmas, np.float32(case["sigmas"]))
  np.testing.assert_array_equal(levels.timesteps, case["timesteps"])
  np.testing.assert_allclose(points(unipc(levels.sigmas))[-1], case["end"], rtol=0, atol=1e-6)


def by_integrals(sigmas):
  """Returns UniPC's points from integrals of interpolated data (arXiv 2302.04867).

  In data prediction the flow is `x_t = sigma_t / sigma_s x_s + sigma_t int e^lambda D dlambda`
  (arXiv 2211.01095, eq. 8). UniC of order 2 makes the integral exact for the parabola through the
  data before, at and behind the step. UniP of order 2, and UniC of order 1, have one unknown, and
  the paper sets it to 1/2 instead: half the difference of data, times `B(h)`.
  """
  lam = np.log((1 - sigmas[:-1]) / sigmas[:-1])
  nodes, node_weights = np.polynomial.legendre.leggauss(40)
  x = START
  corrected = x
  data = []
  found = []
  for i, level in enumerate(sigmas[:-1]):
    new = x - level * velocity(x, level)
    if i == 1:
      growth = (1 - level) * -np.expm1(lam[0] - lam[1])
      x = level / sigmas[0] * corrected + growth * (data[0] + (new - data[0]) / 2)
    elif i > 1:
      half = (lam[i] - lam[i - 1]) / 2
      places = lam[i - 1] + half * (nodes + 1)
      parabola = sum(
        value[:, None] * np.prod([(places - b) / (a - b) for b in lam[i - 2 : i + 1] if b != a], 0)
        for a, value in zip(lam[i - 2 : i + 1], (*data[-2:], new), strict=True)
      )
      integral = half * (parabola * np.exp(places)) @ node_weights
      x = level / sigmas[i - 1] * corrected + level * integral
    data.append(new)
    corrected = x
    after = sigmas[i + 1]
    if after == 0:
      x = new  # order 1: the weight of x is 0
    else:
      h = np.log((1 - after) / after) - lam[i]
      slope = 0 if i == 0 else (new - data[-2]) / (lam[i] - lam[i - 1]) * h
      x = after / level * x - (1 - after) * np.expm1(-h) * (new + slope / 2)
    found.append(x)
  return np.stack(found)


@pytest.mark.parametrize("shift", [1.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_the_table_of_unipc_is_that_of_the_paper(steps, shift):
  sigmas = LevelSchedule(shift=shift).levels(steps).sigmas
  assert len(sigmas) == steps + 1 and (np.diff(sigmas) < 0).all()
  np.testing.assert_allclose(points(unipc(sigmas)), by_integrals(sigmas), rtol=0, atol=1e-12)


def test_times_are_told_without_their_fraction():
  levels = LevelSchedule(shift=5.0).levels(3)
  np.testing.assert_array_equal(levels.timesteps, [999, 909, 714])  # of 999.999, 909.2, 714.9
  with pytest.raises(ValueError, match="steps=0 must be at least 1"):
    LevelSchedule().levels(0)


def write(folder, **changed):
  path = folder / "scheduler_config.json"
  path.write_text(json.dumps(PUBLISHED | changed))
  return path


def test_a_published_file_gives_the_shift(tmp_path):
  assert read_schedule(write(tmp_path)) == LevelSchedule(3.0, 1000)
  assert read_schedule(write(tmp_path, flow_shift=5)).shift == 5


@pytest.mark.parametrize(
  "changed, sentence",
  [
    ({"_class_name": "DDIMScheduler"}, "_class_name='DDIMScheduler' instead of 'UniPC"),
    (
      {"prediction_type": "epsilon", "solver_order": 3},
      "prediction_type='epsilon' instead of 'flow_prediction', solver_order=3 instead of 2",
    ),
    ({"use_flow_sigmas": False}, "UniPC of order 2 on flow sigmas is"),
    ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True instead of False"),
    ({"flow_shift": 0}, "shift=0 must be above 0"),
    ({"flow_shift": None}, "scheduler_config.json: "),
  ],
)
def test_other_schedulers_are_refused(tmp_path, changed, sentence):
  with pytest.raises(ConfigError, match=sentence):
    read_schedule(write(tmp_path, **changed))


def test_keys_that_lack_have_the_defaults_of_diffusers(tmp_path):
  path = tmp_path / "scheduler_config.json"
  path.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler"}))
  with pytest.raises(ConfigError, match="prediction_type='epsilon'.* use_flow_sigmas=False"):
    read_schedule(path)


@pytest.mark.parametrize(
  "contents, sentence",
  [(None, "is missing; name the folder"), ("{", "is not JSON"), ("[]", "holds no JSON object")],
)
def test_files_that_cannot_be_read(tmp_path, contents, sentence):
  path = tmp_path / "scheduler_config.json"
  if contents is not None:
    path.write_text(contents)
  with pytest.raises(ConfigError, match=sentence):
    read_schedule(path)
