"""Writes tests/golden/wan_levels.json: levels, times and end states of diffusers' own scheduler.

python -m tools.wan_levels       needs torch and diffusers, which tests do not
"""

import json
import pathlib

import diffusers
import numpy as np
import torch

FILE = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "wan_levels.json"
SHIFTS = (3.0, 5.0, 8.0)
STEPS = (6, 20, 50)
SETTINGS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_DIGITS = 9  # of end states, which float32 levels give to 7


def case(shift: float, steps: int) -> dict:
  """Returns levels and timesteps, and where `velocity` leads eight points."""
  scheduler = diffusers.UniPCMultistepScheduler(**SETTINGS, flow_shift=shift)
  scheduler.set_timesteps(steps)
  x = torch.linspace(-2, 2, 8, dtype=torch.float64)[None]
  for level, time in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
    x = scheduler.step(velocity(x, level.double()), time, x, return_dict=False)[0]
  return {
    "shift": shift,
    "steps": steps,
    "timesteps": scheduler.timesteps.tolist(),
    "sigmas": [float(str(level)) for level in scheduler.sigmas.numpy().astype(np.float32)],
    "end": [round(value, _DIGITS) for value in x[0].tolist()],
  }


def velocity(x, level):
  """Returns a velocity that is not linear in x; the test has the same."""
  return torch.tanh(2 * x) + level


def main():
  cases = [json.dumps(case(shift, steps)) for shift in SHIFTS for steps in STEPS]
  source = json.dumps(f"diffusers {diffusers.__version__}, UniPCMultistepScheduler: {SETTINGS}")
  rows = ",\n".join(cases)
  FILE.write_text(f'{{"source": {source},\n"cases": [\n{rows}\n]}}\n')


if __name__ == "__main__":
  main()
