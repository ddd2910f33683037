"""Samples on disk: thousands are drawn batch by batch, and a killed run goes on where it was.

A folder has latents/00000.npz, ... (a batch each, with labels and numbers) and sampling.json, which
says how they were drawn. Sample j is of class j modulo the classes, so that more samples than last
time are the same ones and some more. A sample's noise depends on (seed, number) only.
"""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from flax import nnx
from tqdm import tqdm

from freqformer.config import ConfigError
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.disk import write_whole
from freqformer.evaluate.draw import SAMPLES_PER_CLASS, requests
from freqformer.evaluate.restore import Run

SETTINGS = "sampling.json"


def clip_path(folder, name: str, index: int) -> pathlib.Path:
  """Returns the file of a sample: `<folder>/<class>/<place within the class>.mp4`."""
  return pathlib.Path(folder) / name / f"{index % SAMPLES_PER_CLASS:05d}.mp4"


def spread_requests(run: Run, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns label and number of `count` samples, int32 `[count]` both, dealt to trained classes.

  The first of them are the same for every count.
  """
  classes = len(run.trained_classes)
  labels, indices = requests(run, None, -(-count // classes))
  order = np.argsort(indices % SAMPLES_PER_CLASS, kind="stable")[:count]
  return labels[order], indices[order]


def draw_missing(
  run: Run,
  folder,
  labels: np.ndarray,
  indices: np.ndarray,
  settings: dict,
  config: SampleConfig,
  keep: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
) -> np.ndarray:
  """Draws what a folder lacks and returns the latents of all samples, `[n, t, y, x, c]`.

  Args:
    run: of `load_run`.
    folder: of latents and settings; made if it is not there.
    labels: int `[n]`.
    indices: int `[n]`.
    settings: of the run, the seed among them, as plain JSON: a folder of others is refused.
    config: how to sample; its batch size is that of a file.
    keep: called with latents, labels and indices of each batch, also those that are there already.

  Raises:
    ConfigError: the folder's samples were drawn otherwise.
  """
  folder = pathlib.Path(folder)
  (folder / "latents").mkdir(parents=True, exist_ok=True)
  _check_settings(folder, settings)
  step = None
  latents = []
  starts = range(0, len(labels), config.batch_size)
  with tqdm(total=len(labels), desc="sampling", unit="clip") as bar:
    for number, start in enumerate(starts):
      part = slice(start, start + config.batch_size)
      path = folder / "latents" / f"{number:05d}.npz"
      found = _read(path, labels[part], indices[part])
      if found is None:
        if step is None:  # nothing is compiled where nothing is missing
          step = _compiled(run, config)
        found = step(labels[part], indices[part], settings["seed"])
        _write(path, found, labels[part], indices[part])
      keep(found, labels[part], indices[part])
      latents.append(found)
      bar.update(len(found))
  return np.concatenate(latents)


def _check_settings(folder: pathlib.Path, settings: dict):
  """Writes the settings of a new folder; refuses other ones."""
  path = folder / SETTINGS
  if not path.exists():
    write_whole(path, json.dumps(settings, indent=2))
    return
  earlier = json.loads(path.read_text())
  wanted = json.loads(json.dumps(settings))
  for key in sorted({*earlier, *wanted}):
    if earlier.get(key) != wanted.get(key):
      raise ConfigError(
        f"{folder} has samples drawn with {key}={earlier.get(key)!r}, not {wanted.get(key)!r}: "
        "name another --out, or delete the folder."
      )


def _read(path: pathlib.Path, labels: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
  """Returns a file's latents, None if it is not there or is of fewer samples."""
  if not path.exists():
    return None
  with np.load(path) as data:
    if np.array_equal(data["indices"], indices) and np.array_equal(data["labels"], labels):
      return data["latents"]
  return None


def _write(path: pathlib.Path, latents: np.ndarray, labels: np.ndarray, indices: np.ndarray):
  """Writes a whole file or none."""
  fresh = path.with_name(f".{path.name}")
  try:
    np.savez(fresh, latents=latents, labels=labels, indices=indices)
    os.replace(fresh, path)
  except OSError:
    fresh.unlink(missing_ok=True)
    raise


def _compiled(run: Run, config: SampleConfig) -> Callable:
  """Returns `(labels, indices, seed) -> latents`, compiled once; it waits for the device."""
  model = run.model
  tables = model.tables(run.latent_shape)
  step = sampling.make_step(nnx.graphdef(model), config)
  step = sampling.compile_steps(step, run.params, model, tables, run.latent_shape, config)

  def draw(labels, indices, seed):
    latents, _ = sampling.sample(
      step,
      run.params,
      model,
      run.inputs(labels),
      indices,
      seed,
      tables,
      run.latent_shape,
      config,
      progress=False,
    )
    return latents

  return draw


def read_drawn(folder) -> tuple[np.ndarray, np.ndarray]:
  """Returns latents `[n, t, y, x, c]` and labels `[n]` that eval.py wrote into a folder.

  Raises:
    ConfigError: it has none.
  """
  path = pathlib.Path(folder) / "latents.npz"
  if not path.is_file():
    raise ConfigError(f"{folder} has no latents.npz: run eval.py first, or leave --samples out.")
  with np.load(path) as data:
    return data["latents"], data["labels"]
