"""Distance of each sampler's latents to the limit of many steps, by evaluations of the model.

  python -m benchmarks.trained.samplers --workdir=runs/demo [--evaluations=4,8,16,32] [--samples=4]

All samplers begin with the same noise and end, with enough steps, at the same latents. The
reference is heun with twice as many steps as the longest run has evaluations. A distance is the RMS
difference over the RMS of the reference; classes, guidance and shift are those of the run. The row
`reference` is the distance of another sampler with as many evaluations: nearer ones mean nothing.
"""

import dataclasses

import numpy as np
from absl import flags
from flax import nnx

from benchmarks.rows import RESULTS, read_rows, write_rows
from benchmarks.trained.runs import table
from freqformer.command import cli
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.diffusion.solvers import SOLVERS
from freqformer.evaluate.draw import requests
from freqformer.evaluate.restore import Run, load_run

_NAME = "samplers"


def steps_for(sampler: str, evaluations: int) -> int:
  """Returns the most steps that evaluate the model at most so often."""
  config = SampleConfig(steps=evaluations, sampler=sampler)
  while len(config.guided()) > evaluations:
    config = dataclasses.replace(config, steps=config.steps - 1)
  return config.steps


def measure(run: Run, budgets: list[int], count: int) -> list[dict]:
  """Returns a row per sampler and budget of evaluations, and one of the reference itself."""
  labels, indices = requests(run, None, 1)
  labels = labels[:count]
  indices = indices[:count]
  model = run.model
  tables = model.tables(run.latent_shape)
  base = dataclasses.replace(run.experiment.sample, batch_size=len(labels))
  steps = {}  # one program per sampler

  def latents(sampler, number):
    config = dataclasses.replace(base, sampler=sampler, steps=number)
    if sampler not in steps:
      steps[sampler] = make_step(nnx.graphdef(model), config)
    args = (steps[sampler], run.params, model, labels, indices, 0, tables, run.latent_shape, config)
    return sample(*args)[0]

  def row(name, sampler, number):
    found = distances(latents(sampler, number), reference)
    return {
      "name": name,
      "sampler": sampler,
      "steps": number,
      "evaluations": len(dataclasses.replace(base, sampler=sampler, steps=number).guided()),
      "distance": float(np.sqrt(np.mean(found**2))),
      "distance_by_sample": found.tolist(),
      "reference": f"heun, {longest} steps",
      "samples": len(labels),
      "guidance": base.guidance,
      "shift": base.shift,
      "method": model.config.attention.method,
      "trained_steps": run.step,
    }

  longest = 2 * max(budgets)
  reference = latents("heun", longest)
  rows = [row("reference", "unipc", 2 * longest - 1)]
  for sampler in SOLVERS:
    rows += [row(f"{sampler}/{n}", sampler, steps_for(sampler, n)) for n in budgets]
  return rows


def distances(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Returns the RMS difference of each sample over the RMS of all of the reference, `[n]`."""
  axes = tuple(range(1, latents.ndim))
  square = np.mean((latents - reference) ** 2, axes)
  return np.sqrt(square / np.mean(reference**2))


def text(rows: list[dict]) -> str:
  """Formats rows for people."""
  columns = {
    "sampler": lambda row: row["sampler"],
    "steps": lambda row: str(row["steps"]),
    "evaluations": lambda row: str(row["evaluations"]),
    "distance": lambda row: f"{row['distance']:.4f}",
  }
  return table(rows, columns)


def main(_):
  run = load_run(_WORKDIR.value)
  budgets = [int(text) for text in _EVALUATIONS.value]
  command = f"python -m benchmarks.trained.samplers --evaluations={','.join(map(str, budgets))}"
  write_rows(_NAME, measure(run, budgets, _SAMPLES.value), command)
  print(text(read_rows(RESULTS / f"{_NAME}.json")))


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run.")
  _EVALUATIONS = flags.DEFINE_list("evaluations", ["4", "8", "16", "32"], "Evaluations per sample.")
  _SAMPLES = flags.DEFINE_integer("samples", 4, "Samples, one of each of the first classes.")
  cli.run(main)
